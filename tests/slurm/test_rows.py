"""Row programs as job arrays on a real cluster: a killed task, and only its shard again."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster, wait_for  # noqa: F401
from conftest import ROOT, one_error_line, run_program
from project import Project


@pytest.fixture
def project(cluster: Cluster, tmp_path: Path) -> Iterator[Project]:
    project = Project(cluster, tmp_path)
    yield project
    cluster.free()


def rows_script(project: Project, *command: str, **settings: str):
    """Run slurm/rows.sh in the project as a user on the login node does."""
    return project.cluster.run(
        "bash",
        project.checkout / "slurm/rows.sh",
        *command,
        ok=False,
        cwd=project.directory,
        env={"CLUSTER_ENV": str(project.checkout / "slurm/cluster.env"), **settings},
    )


COMMAND = ("dataset/commits_to_jsonl.py", "--input", "my rows.jsonl", "--output", "out dir/rows.jsonl")
SETTINGS = {"SHARDS": "3", "SBATCH_OPTIONS": "--cpus-per-task=1 --mem-per-cpu=0"}


@pytest.mark.slow
def test_only_the_shard_of_a_killed_task_is_submitted_again(project):
    rows = project.directory / "my rows.jsonl"
    contents = "x = 1\n" * 1500
    with open(rows, "w", encoding="utf-8") as file:
        for i in range(15_000):  # some seconds for each task, so that one can be killed at its work
            commit = {"commit": str(i), "old_contents": contents, "new_contents": "y", "subject": f"Change {i}"}
            file.write(json.dumps(commit) + "\n")
    first = rows_script(project, *COMMAND, **SETTINGS)
    assert "shards 1,2,3 of 3" in first.stdout, first.stdout + first.stderr
    array, join = int(first.stdout.split("job ")[1].split(",")[0]), int(first.stdout.split()[-1])
    part = project.directory / "out dir/rows-shard-2-of-3.jsonl.partial"
    wait_for(part.exists, 120, lambda: first.stdout + project.cluster.run("squeue").stdout)
    project.cluster.run("scancel", "--full", "--signal=KILL", f"{array}_2")
    assert project.end(join, 180)["JobState"] == "CANCELLED", "it must not join without all parts"
    assert not (project.directory / "out dir/rows.jsonl").exists()
    second = rows_script(project, *COMMAND, **SETTINGS)
    assert "shards 2 of 3" in second.stdout, second.stdout + second.stderr
    assert project.end(int(second.stdout.split()[-1]), 180)["JobState"] == "COMPLETED"
    run_program("dataset/commits_to_jsonl.py", "--input", rows, "--output", project.directory / "whole.jsonl")
    names = ("out dir/rows.jsonl", "whole.jsonl"), ("out dir/rows_report.json", "whole_report.json")
    for joined, whole in names:
        assert (project.directory / joined).read_bytes() == (project.directory / whole).read_bytes()


@pytest.mark.slow
def test_an_array_waits_for_the_job_that_writes_its_input(project):
    shutil.copy(ROOT / "examples/commits.jsonl", project.directory / "source.jsonl")
    wrap = f"{sys.executable} -c \"import shutil; shutil.copy('source.jsonl', 'my rows.jsonl')\""
    copy = project.cluster.sbatch("--output=copy.txt", f"--wrap={wrap}", cwd=project.directory)
    chain = rows_script(project, *COMMAND, **SETTINGS, AFTER=str(copy))
    assert "shards 1-3 of 3" in chain.stdout, chain.stdout + chain.stderr
    assert project.end(int(chain.stdout.split()[-1]), 120)["JobState"] == "COMPLETED"
    assert (project.directory / "out dir/rows.jsonl").stat().st_size > 1000
    again = rows_script(project, *COMMAND, **SETTINGS)
    assert "shards" not in again.stdout, "nothing is missing"
    assert project.end(int(again.stdout.split()[-1]), 120)["JobState"] == "COMPLETED"


def test_mistakes_are_one_line_before_anything_is_submitted(project):
    for command, error in (
        ((), "program is missing"),
        (("dataset/nothing.py", "--output", "x"), "dataset/nothing.py: not found"),
        (("dataset/commits_to_jsonl.py", "--input", "rows.jsonl"), "--output FILE: expected once"),
    ):
        assert error in one_error_line(rows_script(project, *command, **SETTINGS))
    assert "SHARDS=none" in one_error_line(rows_script(project, *COMMAND, SHARDS="none"))
    assert not project.cluster.run("squeue", "-h").stdout
