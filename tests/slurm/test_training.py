"""Training of the tiny model on two nodes of a real cluster, stopped in every way a site does it.

The final weights are always those of the uninterrupted run.
"""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from cluster import Cluster, running_cluster, wait_for  # noqa: F401
from project import Project

from megatron_ft.weights.open import open_weights

pytestmark = pytest.mark.slow
STEPS = 30


class TrainingProject(Project):
    """The reference data, tokenized; checkpoints every tenth step."""

    def __init__(self, cluster: Cluster, directory: Path, golden: Path) -> None:
        super().__init__(cluster, directory)
        for file in golden.glob("data/eod_*_document.*"):
            shutil.copy(file, self.directory / file.name.replace("eod_", "data_"))
        shutil.copy(golden / "data" / "tokenizer.json", self.directory)

    def submit(self, *options: str, **kwargs) -> int:
        flags = ("--log-interval=1", "--save-interval=10", "--eval-interval=0", *kwargs.pop("flags", ()))
        return super().submit(*options, flags=flags, **kwargs)

    def steps(self) -> list[int]:
        path = self.save / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["iteration"] for line in lines if line.endswith("}") and '"loss"' in line]

    def wait_step(self, step: int) -> None:
        wait_for(lambda: step in self.steps(), 60, lambda: f"only steps {self.steps()}\n{self.text()}")

    def weights(self) -> dict[str, torch.Tensor]:
        source = open_weights(self.save)
        assert source.iteration == STEPS
        return {name: source.read(name) for name in source.names()}


@pytest.fixture(scope="module")
def uninterrupted(cluster, golden, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of a clean run, submitted with --export=NONE from the project's directory."""
    project = TrainingProject(cluster, tmp_path_factory.mktemp("clean"), golden)
    job = project.submit("--export=NONE")
    assert project.end(job, 120)["JobState"] == "COMPLETED", project.text()
    assert len(project.starts()) == 1 and project.steps() == list(range(1, STEPS + 1))
    assert cluster.processes(job) == []
    return project.weights()


@pytest.fixture
def project(cluster, golden, tmp_path) -> Iterator[TrainingProject]:
    yield TrainingProject(cluster, tmp_path, golden)
    cluster.free()


def assert_as_uninterrupted(
    project: TrainingProject, job: int, uninterrupted: dict[str, torch.Tensor], starts: int, seconds: float = 20
) -> None:
    """The job has ended after `starts` starts, with the weights of the uninterrupted run.

    After `seconds` none of its processes is left.
    """
    assert project.end(job, 120)["JobState"] == "COMPLETED", project.text()
    assert len(project.starts()) == starts, project.text()
    assert project.steps() == list(range(1, STEPS + 1)), "every step is in the metrics once"
    weights = project.weights()
    assert weights.keys() == uninterrupted.keys()
    assert all(torch.equal(weights[name], uninterrupted[name]) for name in weights)
    wait_for(lambda: not project.cluster.processes(job), seconds, lambda: str(project.cluster.processes(job)))


def training_processes(cluster: Cluster, job: int) -> list[psutil.Process]:
    """The ranks themselves, not their launchers."""
    return [
        process for process in cluster.processes(job) if process.cmdline()[1:4] == ["-P", "-m", "megatron_ft.finetune"]
    ]


def test_a_run_that_reaches_its_time_limit_twice_ends_with_the_same_weights(project, uninterrupted):
    cluster = project.cluster
    job = project.submit("--signal=B:USR2@60")
    project.wait_step(3)
    ranks = training_processes(cluster, job)
    assert len(ranks) == 2
    for rank in ranks:  # slurmctld checks limits every 30 s: training must not have finished by then
        rank.send_signal(signal.SIGSTOP)
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 65))
    cluster.run("scontrol", "update", f"JobId={job}", f"EndTime={end}")
    project.wait_text("warned by SIGUSR2", 60)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    project.wait_text("is requeued")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    project.wait_text("resumes from iteration", 60)
    resumed = project.starts()[1]["iteration"]
    project.wait_step(resumed + 2)
    cluster.run("scancel", "--batch", "--signal=USR2", str(job))
    project.wait_text("is requeued", times=2)
    assert_as_uninterrupted(project, job, uninterrupted, starts=3)


def test_a_preempted_run_ends_with_the_same_weights_with_and_without_grace(project, uninterrupted):
    cluster = project.cluster
    job = project.submit("--partition=grace", "--nodelist=" + ",".join(cluster.nodes[:2]))
    for partition in ("grace", "main"):
        project.wait_step(3 if partition == "grace" else 12)
        preemptor = cluster.sbatch(
            "--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null", "--wrap=sleep 1"
        )
        cluster.wait_job(job, "PENDING", seconds=40, log=project.log)
        if partition == "grace":
            cluster.run("scontrol", "update", f"JobId={job}", "Partition=main")
        cluster.wait_job(preemptor, "COMPLETED", seconds=60)
    assert "stopped by SIGUSR2" in project.text() and "stopped by SIGTERM" in project.text()
    assert_as_uninterrupted(project, job, uninterrupted, starts=3)


def test_a_canceled_job_stays_canceled_and_the_same_command_resumes_it(project, uninterrupted):
    job = project.submit()
    project.wait_step(4)
    project.cluster.run("scancel", str(job))
    wait_for(lambda: not project.cluster.processes(job), 20, "the canceled job has processes")
    project.cluster.wait_job(job, "CANCELLED", seconds=20)
    assert_as_uninterrupted(project, project.submit(), uninterrupted, starts=2)
    assert project.cluster.state(job) == "CANCELLED"


def test_a_stale_rank_on_a_lost_node_does_not_write_checkpoints(project, uninterrupted):
    """Its daemon is killed, its rank keeps running while the job runs again elsewhere.

    The rank ends when it notices that the others are gone, at the latest when a collective times
    out.
    """
    cluster = project.cluster
    job = project.submit("--nodelist=" + ",".join(cluster.nodes[:2]), flags=("--distributed-timeout-minutes=1",))
    project.wait_step(2)
    lost = cluster.nodes[0]  # the node of rank 0, which writes the checkpoints
    stale = [process for process in training_processes(cluster, job) if process.environ()["SLURMD_NODENAME"] == lost]
    assert len(stale) == 1
    stale[0].send_signal(signal.SIGSTOP)  # as if the node hung
    cluster.kill_node(lost)
    try:
        wait_for(lambda: cluster.job(job)["Restarts"] == "1", 90, project.text)
        cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")
        project.wait_text("start 2", 60)
        if stale[0].is_running():
            stale[0].send_signal(signal.SIGCONT)  # it continues while the new run is active
        assert project.end(job, 120)["JobState"] == "COMPLETED", project.text()
        assert lost not in project.starts()[1]["nodes"]
    finally:
        cluster.start_node(lost)
    assert_as_uninterrupted(project, job, uninterrupted, starts=2, seconds=90)
