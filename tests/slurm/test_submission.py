"""On the login node: checks before submission, job arrays, the chain of all steps, run status."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster  # noqa: F401
from conftest import ROOT, one_error_line, run_program
from doc_commands import run_page
from project import Project

TINY = [
    "--preset", "tiny", "--from-scratch", "--seq-length=256", "--tensor-model-parallel-size=2", "--global-batch-size=1",
    "--train-iters=3", "--lr-warmup-iters=0", "--eval-interval=0",
]  # fmt: skip


@pytest.fixture
def project(cluster, golden, tmp_path) -> Iterator[Project]:
    project = Project(cluster, tmp_path)
    for file in golden.glob("data/eod_*_document.*"):
        shutil.copy(file, project.directory / file.name.replace("eod_", "data_"))
    for name in ("tokenizer.json", "commits.jsonl"):
        shutil.copy(golden / "data" / name, project.directory)
    yield project
    cluster.free()


def login(project: Project, *command: str | Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command in the project as a user on the login node does."""
    return project.cluster.run(
        *command,
        ok=False,
        cwd=project.directory,
        env={"CLUSTER_ENV": str(project.checkout / "slurm" / "cluster.env"), **env},
    )


def submit(project: Project, *words: str, **env: str) -> subprocess.CompletedProcess:
    return login(project, sys.executable, ROOT / "launch" / "submit.py", *words, **env)


def script(project: Project, name: str) -> Path:
    return project.checkout / "slurm" / name


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed; .ci/install-packages installs it")
    scripts = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / "launch" / "job.sh", ROOT / ".ci" / "install-packages"]
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


RECIPES = sorted(path.name for path in (ROOT / "slurm").glob("finetune_*.sh"))
# How each begins, and how many ranks it is checked for: 64 where the batch is large enough.
RANDOM, TRANSFORMERS = ("--from-scratch", "64"), ("--load model", "8")


@pytest.mark.parametrize("name", RECIPES)
def test_flags_after_a_script_override_those_that_set_the_same(name, tmp_path):
    start, ranks = TRANSFORMERS if name == "finetune_octocoder.sh" else RANDOM
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "gpt_bigcode"}')
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "cluster.env").write_text(f"VENV={shlex.quote(sys.prefix)}\nSCRATCH=.\n")
    environment = {**os.environ, "CLUSTER_ENV": str(tmp_path / "cluster.env"), "MEGATRON_FT_CHECK": ranks}
    environment["MEGATRON_FT_DATA_COMES"] = "1"

    def check(*flags: str) -> subprocess.CompletedProcess:
        data = ["--data-prefix", "data", "--tokenizer-file", "tokenizer.json", *start.split()]
        command = ["bash", str(ROOT / "slurm" / name), *data, *flags]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    for flags in (
        "",
        "--train-iters 500",
        "--train_samples=9",
        "--lr-warmup-iters 5",
        "--fp16",
        "--lr-warmup-samples 0",
    ):
        done = check(*flags.split())
        assert done.returncode == 0, done.stderr
    assert "--train-iterss; did you mean --train-iters" in one_error_line(check("--train-iterss", "500"))


def test_errors_are_reported_before_the_job_is_queued(project):
    train = str(script(project, "finetune_starcoderbase_1b.sh"))
    data = ["--data-prefix=data", "--tokenizer-file=tokenizer.json", "--save=run"]
    two = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    mistakes = [
        ([*two, train, *TINY, *data, "--lrr", "1"], {}, "unknown flag --lrr; did you mean --lr?"),
        ([*two, train, *TINY, *data, "--data-prefix=nowhere"], {}, "nowhere_inputs_document.bin not found"),
        (
            ["--nodes=3", *two[1:], train, *TINY, *data],
            {},
            "3 processes cannot be split into --tensor-model-parallel-size 2",
        ),
        (["--partition=gpus", *two, train, *TINY, *data], {}, "invalid partition"),
        (
            ["--nodes=4", *two[1:], train, *TINY, *data, "--global-batch-size=2"],
            {},
            "Requested node configuration is not available",
        ),
        (
            [*two, train, *TINY, *data, "--engine=mtf"],
            {"MEGATRON_PATH": str(project.directory)},
            "check out branch mtf",
        ),
        ([*two, train, *TINY, *data], {"CLUSTER_ENV": "/none/cluster.env"}, "/none/cluster.env not found: cp"),
        (["finetune.sh"], {}, "no script among"),
    ]
    for words, env, message in mistakes:
        assert message in one_error_line(submit(project, *words, **env))
    assert not project.cluster.run("squeue", "-h").stdout
    job = project.cluster.sbatch(
        "--output=early.txt", train, cwd=project.directory, env={"CLUSTER_ENV": "/none/cluster.env"}
    )
    assert project.end(job)["JobState"] == "FAILED"
    assert "/none/cluster.env not found: cp" in (project.directory / "early.txt").read_text()


def test_submission_tells_how_to_follow_the_job(project):
    train = str(script(project, "finetune_starcoderbase_1b.sh"))
    data = ["--data-prefix=data", "--tokenizer-file=tokenizer.json", "--save=my run"]
    two = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    submitted = submit(project, "--hold", *two, train, *TINY, *data)
    checked, queued, *follow = submitted.stdout.splitlines()
    job = queued.removeprefix("Submitted batch job ")
    project.cluster.run("scancel", job)
    assert checked.startswith("checked: flags; data (") and submitted.stderr == ""
    assert follow == [f"log: tail -F finetune_starcoderbase_1b-{job}.log", "status: python launch/status.py 'my run'"]


def test_a_script_requests_as_many_nodes_as_its_gpus_need(project):
    project.configure(GPUS_PER_NODE="4", CPUS_PER_TASK="3", SBATCH_PARTITION="grace")
    train = str(script(project, "finetune_starcoderbase_1b.sh"))
    data = ["--data-prefix=data", "--tokenizer-file=tokenizer.json", "--from-scratch", "--train-iters=20"]
    shown = submit(project, train, *data, MEGATRON_FT_DRY_RUN="1")
    assert "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=3" in shown.stdout, shown.stderr
    assert re.search(r"^training command of each rank: .* --preset starcoderbase-1b ", shown.stdout, re.MULTILINE)
    given = submit(project, "-N1", train, *data, MEGATRON_FT_DRY_RUN="1")
    assert given.stdout.startswith("sbatch --cpus-per-task=3 -N1 "), given.stderr


@pytest.mark.slow
def test_only_the_failed_shard_of_an_array_is_submitted_again(project):
    rows = project.directory / "my rows.jsonl"
    good = (project.directory / "commits.jsonl").read_text()
    rows.write_text(good[:-2] + "!\n")  # the last row's closing brace: the shards begin where they would
    settings = {
        "SHARDS": "3",
        "TOKENIZER_FILE": "tokenizer.json",
        "OUTPUT_PREFIX": "out dir/rows",
        "SBATCH_OPTIONS": "--cpus-per-task=1",
    }
    command = ["bash", script(project, "preprocess.sh"), rows.name]
    first = login(project, *command, **settings)
    assert "shards 1,2,3 of 3" in first.stdout, first.stderr
    merge = int(first.stdout.split()[-1])
    assert project.end(merge, 120)["JobState"] == "CANCELLED", "the merge must not run without all shards"
    rows.write_text(good)
    second = login(project, *command, **settings)
    assert "shards 3 of 3" in second.stdout, second.stdout + second.stderr
    assert project.end(int(second.stdout.split()[-1]), 120)["JobState"] == "COMPLETED"
    run_program(
        "preprocess/tokenize.py",
        rows,
        "--tokenizer-file",
        project.directory / "tokenizer.json",
        "--output-prefix",
        project.directory / "whole",
    )
    for file in sorted(project.directory.glob("whole_*")):
        assert (project.directory / "out dir" / file.name.replace("whole", "rows")).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_the_chain_runs_from_rows_to_a_hugging_face_directory(project):
    settings = {
        "SHARDS": "1", "TOKENIZER_FILE": "tokenizer.json", "OUTPUT_PREFIX": "out/rows", "SAVE": "run 1", "OUTPUT": "run 1 hf",
        "SBATCH_OPTIONS": "--cpus-per-task=1", "TRAIN_OPTIONS": "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1",
    }  # fmt: skip
    train = script(project, "finetune_starcoderbase_1b.sh")
    wrong = login(
        project, "bash", script(project, "pipeline.sh"), train, "commits.jsonl", "--", *TINY, "--bogus", **settings
    )
    assert "unknown flag --bogus" in one_error_line(wrong) and not project.cluster.run("squeue", "-h").stdout
    chain = login(project, "bash", script(project, "pipeline.sh"), train, "commits.jsonl", "--", *TINY, **settings)
    jobs = [int(number) for number in re.findall(r"job (\d+)", chain.stdout)]
    assert len(jobs) == 4, chain.stdout + chain.stderr
    for job in jobs:
        logs = "".join(path.read_text() for path in project.directory.glob("*.log"))
        assert project.end(job, 180)["JobState"] == "COMPLETED", logs
    assert json.loads((project.directory / "run 1 hf" / "config.json").read_text())["model_type"] == "gpt_bigcode"
    evaluation = {"LOAD": "run 1", "SAVE": "run 1 evaluation", "PRESET": "tiny", "DATA_PREFIX": "out/rows"}
    one_rank = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    evaluate = [*one_rank, script(project, "validate.sh"), *TINY, "--tensor-model-parallel-size=1"]
    submitted = submit(project, *map(str, evaluate), **settings | evaluation)
    (job,) = map(int, re.findall(r"job (\d+)", submitted.stdout))
    assert project.end(job, 120)["JobState"] == "COMPLETED", submitted.stdout + submitted.stderr
    lines = (project.directory / "run 1 evaluation" / "validation.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["group"] == "valid" and not list(project.directory.glob("run 1 evaluation/iter_*"))
    shown = login(project, sys.executable, ROOT / "launch" / "status.py", ".")
    assert re.search(rf"run 1 +{jobs[2]} +COMPLETED +3/3 +\d+\.\d+ +[\d,]+ +done +0 +3, ", shown.stdout), (
        shown.stdout + shown.stderr
    )


def test_status_shows_every_run_without_slurm(tmp_path):
    for name, steps in (("a", 3), ("deep/er/b", 7)):
        save = tmp_path / name
        (save / f"iter_{steps:07d}").mkdir(parents=True)
        lines = [
            json.dumps({"iteration": i + 1, "loss": 2.0 - i / 10, "tokens_per_second": 1500.0, "step_seconds": 60.0})
            for i in range(steps)
        ]
        (save / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 99, "lo')
        starts = [{"job": "41"}, {"job": "42"}]
        (save / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
        events = [{"event": "start", "train_iters": 12}, {"event": "start", "train_iters": 10}, {"event": "saved"}]
        (save / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    shown = run_program("launch/status.py", tmp_path, env={"PATH": "/nonexistent"}).stdout.splitlines()
    assert shown[0].split() == ["RUN", "JOB", "STATE", "STEP", "LOSS", "TOKENS/S", "ETA", "RESTARTS", "CHECKPOINT"]
    assert shown[1].split()[:9] == ["a", "42", "ended", "3/10", "1.8000", "1,500", "7", "min", "1"]
    assert shown[2].startswith("deep/er/b") and "7, 0 s ago" in shown[2]
    assert "no runs found" in one_error_line(run_program("launch/status.py", tmp_path / "a" / "iter_0000003", ok=False))


def test_commands_in_slurm_md_run(tmp_path):
    assert "WORLD_SIZE=2" in run_page("slurm.md", tmp_path)
