"""The wheel in an environment of its own: every step from rows to a trained model, outside any
checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

FIXTURES = ROOT / "tests/fixtures"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """bin/ of an environment with the wheel; dependencies are those of the tests."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"  # so that building leaves nothing in the checkout
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", "-q", *offline, "--no-build-isolation", "-w", str(directory), str(source)]
    subprocess.run(build, check=True, timeout=600)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory / "venv")], check=True)
    python = directory / "venv/bin/python"
    [wheel] = directory.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "-q", *offline, str(wheel)], check=True, timeout=300)
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    # Without the .pth files in there, so without the checkout.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "venv/bin"


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"PATH": f"{environment}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}

    def run_command(*words: str | Path, status: int = 0, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*map(str, words)], cwd=work, env=variables | env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    run_command.work = work
    return run_command


@pytest.fixture(scope="module")
def trained(run) -> Path:
    """A run of two steps, on rows tokenized by the wheel."""
    tokenizer = FIXTURES / "tokenizer.json"
    run("megatron-ft", "tokenize", FIXTURES / "rows.jsonl", "--output-prefix", "data", "--tokenizer-file", tokenizer)
    run("megatron-ft", "view", "data", "--tokenizer-file", tokenizer)
    flags = "--preset tiny --from-scratch --seq-length 256 --global-batch-size 2 --data-prefix data --train-iters 2"
    run("megatron-ft", "finetune", *flags.split(), "--tokenizer-file", tokenizer, "--save", "first")
    return run.work / "first"


def test_it_is_the_wheel_that_runs(run):
    code = "import megatron_ft; print(megatron_ft.__file__)"
    assert str(run.work.parent) in run("python", "-c", code).stdout
    assert str(ROOT) not in run("megatron-ft", "--help").stdout
    assert "usage: megatron-ft dataset mix " in run("megatron-ft", "dataset", "mix", "--help").stdout
    error = run("megatron-ft", "tokenize", "nowhere.jsonl", status=2).stderr
    assert error.count("\n") == 1 and error.startswith("error: ")


def test_plan_and_files_next_to_programs(run):
    planned = run("megatron-ft", "plan", "--preset", "tiny", "--gpu", "h100-80gb", "--global-batch-size", "8").stdout
    assert "proposal 1:" in planned
    run("python", "-c", "from megatron_ft.commits.languages import NAMES; assert NAMES")
    assert "octocoder" in run("megatron-ft", "dataset", "mix", "--help").stdout
    assert "no such file" in run("megatron-ft", "dataset", "mix", "nowhere.yaml", "--output", "o", status=2).stderr


def test_run_is_repeated_from_its_config(run, trained):
    run("megatron-ft", "finetune", "--config", trained / "config.yaml", "--save", "second")
    losses = [
        [json.loads(line)["loss"] for line in (run.work / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_model_is_converted_and_verified(run, trained):
    run("megatron-ft", "convert", "megatron-to-hf", "--load", trained, "--output", "model")
    run("megatron-ft", "verify", trained, "model")
    assert str(trained) in run("megatron-ft", "status", ".").stdout or "first" in run("megatron-ft", "status").stdout


def test_slurm_scripts_are_set_up_and_find_the_programs(run, trained):
    tokenizer = FIXTURES / "tokenizer.json"
    printed = run("megatron-ft", "slurm", "init", "jobs").stdout
    assert "edit jobs/slurm/cluster.env" in printed and "kept" not in printed
    flags = ["--preset", "tiny", "--seq-length", "256", "--from-scratch", "--global-batch-size", "8"]
    env = {"MEGATRON_FT_CHECK": "8", "TOKENIZER_FILE": str(tokenizer), "SAVE": "runs"}
    script = "jobs/slurm/finetune_starcoderbase_1b.sh"
    run("bash", script, *flags, **env, DATA_PREFIX=str(run.work / "data"))
    missing = run("bash", script, *flags, **env, DATA_PREFIX="/nowhere/data", status=2).stderr
    assert "/nowhere/data_inputs_document.bin not found" in missing
    (run.work / "jobs/slurm/cluster.env").write_text("mine")
    assert "slurm/cluster.env" in run("megatron-ft", "slurm", "init", "jobs").stdout
    assert (run.work / "jobs/slurm/cluster.env").read_text() == "mine"
