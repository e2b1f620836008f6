"""slurm/evaluate_humanevalpack.sh on a real cluster: a run's newest checkpoint, and all of them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster  # noqa: F401
from conftest import ROOT, one_error_line, run_program
from project import Project

FIXTURES = ROOT / "tests/fixtures"
FLAGS = ("--style", "octocoder", "--tasks", "fixtests", "--languages", "python", "--max-length", "200")


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Iterator[Project]:
    project = Project(cluster, tmp_path)
    shutil.copytree(ROOT / "examples/humanevalpack", project.directory / "my problems")
    yield project
    cluster.free()


def evaluate(project: Project, *words: str | Path, **settings: str):
    """Run the script as a user on the login node does."""
    return project.cluster.run(
        "bash",
        project.checkout / "slurm/evaluate_humanevalpack.sh",
        *words,
        ok=False,
        cwd=project.directory,
        env={
            "CLUSTER_ENV": str(project.checkout / "slurm/cluster.env"),
            "HUMANEVALPACK": "my problems",
            "SBATCH_OPTIONS": "--cpus-per-task=2 --mem-per-cpu=0",
            "GENERATE_OPTIONS": "--cpus-per-task=1 --mem-per-cpu=0",
            **settings,
        },
    )


def train(save: Path) -> None:
    """A run with checkpoints of iterations 2 and 4."""
    run_program(
        *("launch/finetune.py", "--preset", "tiny", "--from-scratch", "--data-prefix", FIXTURES / "data"),
        *("--tokenizer-file", FIXTURES / "tokenizer.json", "--seq-length", "256", "--global-batch-size", "1"),
        *("--train-iters", "4", "--save-interval", "2", "--lr-warmup-iters", "0", "--save", save),
    )


def ended(project: Project, submitted) -> None:
    """Wait for the job whose id was printed last."""
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = project.end(int(submitted.stdout.split()[-1]), 300)
    logs = "".join(path.read_text(errors="replace") for path in sorted(project.directory.glob("*.log")))
    assert job["JobState"] == "COMPLETED", submitted.stdout + logs


@pytest.mark.slow
def test_a_run_is_converted_generated_scored_and_reported(project):
    train(project.save)
    ended(project, evaluate(project, project.save, "my evaluation", *FLAGS, "--samples", "2", SHARDS="2"))
    report = json.loads((project.directory / "my evaluation/report.json").read_bytes())
    score = report["scores"][0]
    assert score["scored"] == score["asked"] == 6 and score["score"]["pass@1"]["estimate"] <= 1
    assert sorted(path.name for path in (project.directory / "my evaluation/generations").iterdir()) == [
        "fixtests-python.1-of-2.jsonl",
        "fixtests-python.2-of-2.jsonl",
    ]


@pytest.mark.slow
def test_every_checkpoint_becomes_a_point_of_the_run_s_curve(project):
    train(project.save)
    words = (project.save, "curve", "--every-checkpoint", *FLAGS)
    first = evaluate(project, *words)
    assert "iterations 2 4" in first.stdout, first.stdout + first.stderr
    ended(project, first)
    lines = [json.loads(line) for line in (project.save / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["group"]) for line in lines] == [(2, "fixtests, python"), (4, "fixtests, python")]
    assert "HumanEvalPack, pass@1" in (project.save / "report.html").read_text(encoding="utf-8")
    assert not list((project.directory / "curve").glob("*/model")), "converted models are removed after scoring"
    again = one_error_line(evaluate(project, *words))
    assert "has no iter_* that is not yet evaluated" in again


def test_mistakes_are_one_line_before_anything_is_submitted(project):
    (project.directory / "model").mkdir()
    for words, settings, error in (
        (("--style", "octocoder"), {}, "the model and the output come first"),
        (("nothing", "out", *FLAGS), {}, "nothing is not a directory"),
        (("model", "out", *FLAGS), {"SHARDS": "many"}, "SHARDS=many: expected a positive integer"),
        (("model", "out", *FLAGS), {"MODE": "strict"}, "MODE=strict: expected faithful or clean"),
        (("model", "out", *FLAGS), {"HUMANEVALPACK": ""}, "HUMANEVALPACK is missing"),
        (("model", "out", "--style", "octo"), {}, "style 'octo': unknown"),
        (("model", "out", "--every-checkpoint", *FLAGS), {}, "has no iter_*"),
    ):
        assert error in one_error_line(evaluate(project, *words, **settings))
    assert not project.cluster.run("squeue", "-h").stdout
