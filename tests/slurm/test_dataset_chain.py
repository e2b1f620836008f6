"""From mirrors to packed data on a real cluster: the chain of slurm/dataset.sh."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster  # noqa: F401
from conftest import one_error_line, run_program
from project import Project

LICENSE = "Permission is hereby granted, free of charge, to any person obtaining a copy\n"
IDENTITY = ["-c", "user.name=A", "-c", "user.email=a@example.org"]


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path, tokenizer: Path) -> Iterator[Project]:
    project = Project(cluster, tmp_path)
    for name in ("ada/parser", "bob/lexer"):
        make_mirror(project.directory / f"my mirrors/{name}.git", name, tmp_path / "work" / name)
    (project.directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    yield project
    cluster.free()


@pytest.fixture
def tokenizer() -> Path:
    return Path(__file__).parents[1] / "fixtures/tokenizer.json"


def make_mirror(mirror: Path, name: str, work: Path) -> None:
    """A repository with 12 commits, each of which changes one Python file."""

    def git(*words: str | Path) -> None:
        subprocess.run(["git", "-C", str(work), *IDENTITY, *map(str, words)], check=True, capture_output=True)

    work.mkdir(parents=True)
    git("init", "--quiet")
    (work / "LICENSE").write_text(LICENSE, encoding="utf-8")
    for i in range(13):
        lines = [f"def check_{name[:3]}_{i}_{j}(value):\n    return value * {i + j} > {j}\n" for j in range(4)]
        (work / f"module_{i % 3}.py").write_text("\n".join(lines), encoding="utf-8")
        git("add", ".")
        git("commit", "--quiet", "-m", f"Add the checks of stage {i} to {name}\n")
    subprocess.run(["git", "clone", "--quiet", "--mirror", work, mirror], check=True)


def chain(project: Project, **settings: str) -> subprocess.CompletedProcess:
    return project.cluster.run(
        "bash",
        project.checkout / "slurm/dataset.sh",
        *("--min-tokens", "20"),
        ok=False,
        cwd=project.directory,
        env={
            "CLUSTER_ENV": str(project.checkout / "slurm/cluster.env"),
            "SBATCH_OPTIONS": "--cpus-per-task=1 --mem-per-cpu=0",
            "SHARDS": "2",
            **settings,
        },
    )


@pytest.mark.slow
def test_mirrors_become_tokens(project):
    settings = {"REPOS": "my mirrors", "OUTPUT": "out dir", "TOKENIZER_FILE": "tokenizer.json", "FORMAT": "octocoder"}
    submitted = chain(project, **settings)
    jobs = [int(number) for number in re.findall(r"job (\d+)", submitted.stdout)]
    assert len(jobs) == 14, submitted.stdout + submitted.stderr
    for job in jobs:
        ended = project.end(job, 240)["JobState"]
        assert ended == "COMPLETED", "".join(path.read_text() for path in sorted(project.directory.glob("*.log")))
    out = project.directory / "out dir"
    report = json.loads((out / "filtered_report.json").read_text())
    assert report["rows_in"] == 20, "of 13 commits per repository, three add their file"
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert 4 <= len(rows) <= 20 and {row["repos"] for row in rows} == {"ada/parser", "bob/lexer"}
    assert all(row["inputs"].startswith("Question: Add the checks") and row["license"] == "mit" for row in rows)
    shown = run_program("preprocess/view.py", out / "rows", "--tokenizer-file", project.directory / "tokenizer.json")
    assert "Answer:" in shown.stdout


def test_mistakes_are_one_line_before_anything_is_submitted(project):
    right = {"REPOS": "my mirrors", "OUTPUT": "out", "TOKENIZER_FILE": "tokenizer.json"}
    for wrong, error in (
        ({"REPOS": "tokenizer.json"}, "no OWNER/NAME.git found"),
        ({"OUTPUT": ""}, "OUTPUT is missing"),
        ({"TOKENIZER_FILE": "none"}, "TOKENIZER_FILE=none does not exist"),
        ({"MIX": "none.yaml"}, "MIX=none.yaml does not exist"),
        ({"COMMITS": "none.jsonl"}, "none.jsonl does not exist"),
        ({"SHARDS": "0"}, "SHARDS=0"),
    ):
        assert error in one_error_line(chain(project, **(right | wrong)))
    assert not project.cluster.run("squeue", "-h").stdout
