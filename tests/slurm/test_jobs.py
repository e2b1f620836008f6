"""How a job lives and ends on a real cluster: signals, limits, lost nodes, exit statuses. Ranks are small programs here, not training."""

import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster, wait_for  # noqa: F401
from conftest import ROOT

START = """
import os, signal, sys, time
from pathlib import Path
save, rank = Path(os.environ["RUN"]), int(os.environ["RANK"])
life = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + int(os.environ.get("MEGATRON_FT_RESUBMITTED", 0))
tracker = save / "latest_checkpointed_iteration.txt"
start = int(tracker.read_text()) if tracker.exists() else 0
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: stop.append(number))
def save_at(iteration):
    if rank == 0:
        tracker.write_text(str(iteration))
        print(f"saved {iteration}", flush=True)
def until_stopped(seconds=60):
    print("up", rank, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], flush=True)
    end = time.monotonic() + seconds
    while not stop and time.monotonic() < end:
        time.sleep(0.05)
    return bool(stop)
"""


class Site:
    """A user's directory with data, a cluster.env of its own and small ranks; spaces in every path."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory / "my project"
        self.save = self.directory / "run 1"
        self.save.mkdir(parents=True)
        for side in ("inputs", "targets"):
            for suffix in ("bin", "idx"):
                (self.directory / f"data_{side}_document.{suffix}").write_bytes(b"x")
        (self.directory / "tokenizer.json").write_text("{}")
        self.ranks = self.directory / "ranks.py"
        container = shlex.join([sys.executable, str(self.ranks)])
        checkout = directory / "my checkout"
        shutil.copytree(ROOT / "slurm", checkout / "slurm")
        (checkout / "launch").symlink_to(ROOT / "launch")
        self.script = checkout / "slurm" / "finetune_starcoderbase.sh"
        (checkout / "slurm" / "cluster.env").write_text(
            f"GPUS_PER_NODE=0\nVENV={shlex.quote(sys.prefix)}\nSCRATCH=$HOME\nRUN={shlex.quote(str(self.save))}\n"
            f"CONTAINER_COMMAND={shlex.quote(container)}\nMAX_REQUEUES=${{MAX_REQUEUES:-5}}\n"
        )
        self.log = self.directory / "main log.txt"

    def submit(self, code: str, *options: str, env: dict[str, str] | None = None, flags: tuple[str, ...] = ()) -> int:
        self.ranks.write_text(START + code)
        return self.cluster.sbatch(
            "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=5", f"--output={self.log}", *options, self.script,
            "--preset", "tiny", "--from-scratch", "--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=1", "--seq-length=256",
            "--global-batch-size=1", "--data-prefix=data", "--tokenizer-file=tokenizer.json", "--train-iters=30", "--lr-warmup-iters=0",
            "--save", self.save, *flags,
            cwd=self.directory, env=env or {},
        )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_text(self, what: str, seconds: float = 30) -> None:
        wait_for(lambda: what in self.text(), seconds, lambda: f"no {what!r} in the log:\n{self.text()}")

    def end(self, job: int, seconds: float = 60) -> dict[str, str]:
        return self.cluster.wait_job(job, seconds=seconds, log=self.log)

    def starts(self) -> list[dict]:
        return [json.loads(line) for line in (self.save / "starts.jsonl").read_text().splitlines()]


@pytest.fixture
def site(cluster, tmp_path) -> Site:
    site = Site(cluster, tmp_path)
    yield site
    cluster.free()


def test_a_failed_rank_ends_the_job_with_its_status_and_its_traceback_last(site):
    code = "until_stopped(1)\nif rank == 1: raise ZeroDivisionError('rank one divides by nothing')\nuntil_stopped()\n"
    job = site.submit(code, "--export=NONE", flags=("--log-interval=7",))
    assert site.end(job)["ExitCode"] == "1:0", site.text()
    assert site.text().rstrip().endswith("ZeroDivisionError: rank one divides by nothing")
    assert "rank 1 on 127." in site.text() and site.cluster.processes(job) == []
    assert "up 1" in (site.save / "logs" / "rank-001.log").read_text()
    assert "up 1" not in site.text(), "the main log is rank 0's alone"
    assert len(site.starts()) == 1


@pytest.mark.slow
def test_a_warned_job_saves_and_comes_back_until_it_is_finished(site):
    code = "save_at(start + 10) if until_stopped(60 if life < 2 else 0) else None\nsys.exit(75 if life < 2 else save_at(30))\n"
    job = site.submit(code)
    for life in range(2):
        wait_for(lambda life=life: site.text().count("up 0") == life + 1, 40, site.text)
        site.cluster.run("scancel", "--batch", "--signal=USR2", str(job))
        site.wait_text(f"saved {10 * (life + 1)}")
    assert site.end(job)["JobState"] == "COMPLETED"
    assert [start["iteration"] for start in site.starts()] == [0, 10, 20]
    assert site.text().count("warned by SIGUSR2") == 2 and "finished at iteration 30" in site.text()
    assert site.cluster.job(job)["Restarts"] == "2"
    ports = set(re.findall(r"up 0 \S+ (\d+)", site.text()))
    assert len(ports) == 3, "a stale rank of an earlier life must not find the new rendezvous"


@pytest.mark.slow
def test_no_progress_and_too_many_requeues_end_the_loop(site):
    idle = site.submit("until_stopped()\nsys.exit(75)\n")
    site.wait_text("up 0")
    site.cluster.run("scancel", "--batch", "--signal=USR2", str(idle))
    assert site.end(idle)["JobState"] == "FAILED"
    assert "no progress" in site.text()

    site.log.unlink()
    job = site.submit(
        "save_at(start + 1) if until_stopped(2) or True else None\nsys.exit(75)\n", env={"MAX_REQUEUES": "1"}
    )
    assert site.end(job)["JobState"] == "FAILED"
    assert site.cluster.job(job)["Restarts"] == "1"
    assert "MAX_REQUEUES=1 is reached" in site.text()


@pytest.mark.slow
def test_where_requeueing_is_forbidden_the_job_is_submitted_again(site):
    code = "if life == 0 and until_stopped():\n    save_at(10); sys.exit(75)\nsave_at(30)\nprint('saw', os.environ.get('COLOUR'))\n"
    job = site.submit(code, "--no-requeue", "--export=ALL,COLOUR=blue", flags=("--wandb-run-name", "two words"))
    waiting = site.cluster.sbatch(
        f"--dependency=afterok:{job}",
        "--kill-on-invalid-dep=yes",
        f"--output={site.directory}/after.txt",
        "--wrap=echo after",
    )
    site.wait_text("up 0")
    site.cluster.run("scancel", "--batch", "--signal=USR2", str(job))
    site.wait_text("submitted again as job")
    again = int(re.search(r"submitted again as job (\d+)", site.text())[1])
    assert site.end(again)["JobState"] == "COMPLETED", site.text()
    assert [start["job"] for start in site.starts()] == [str(job), str(again)]
    assert "saw blue" in site.text()
    site.cluster.wait_job(waiting, "COMPLETED")
    assert site.cluster.job(again)["NumNodes"] == "2"


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(site):
    job = site.submit("if until_stopped():\n    save_at(10)\n    sys.exit(75)\n")
    site.wait_text("up 0")
    site.cluster.run("scancel", str(job))
    site.wait_text("saved 10")
    site.wait_text("ended by SLURM")
    time.sleep(3)
    assert site.cluster.state(job) == "CANCELLED"
    assert site.cluster.processes(job) == [] and len(site.starts()) == 1


@pytest.mark.slow
def test_a_dead_node_ends_the_step_and_the_job_comes_back_without_it(site):
    code = "if life == 0:\n    until_stopped(3)\n    if rank == 0:\n        time.sleep(12); sys.exit('peer is gone')\n    until_stopped()\nsave_at(30)\n"
    cluster = site.cluster
    job = site.submit(code, "--nodelist=" + ",".join(cluster.nodes[:2]))
    site.wait_text("up 0")
    started = time.monotonic()
    dead = cluster.nodes[1]
    cluster.crash_node(dead)
    try:
        site.wait_text("is requeued without", 60)
        cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")  # the test's own demand for the node
        assert site.end(job, seconds=120)["JobState"] == "COMPLETED", site.text()
        assert time.monotonic() - started < 100
        assert [dead in start["nodes"] for start in site.starts()] == [True, False]
    finally:
        cluster.start_node(dead)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="hiding a directory from one node takes root")
def test_a_node_that_does_not_see_the_data_is_named_and_left_out(site):
    cluster = site.cluster
    blind = cluster.nodes[0]
    (site.directory / "sub").mkdir()
    for file in site.directory.glob("data_*"):
        file.rename(site.directory / "sub" / file.name)
    cluster.restart_node(blind, hide=site.directory / "sub")
    try:
        job = site.submit(
            "save_at(30)\n", "--nodelist=" + ",".join(cluster.nodes[:2]), flags=("--data-prefix=sub/data",)
        )
        site.wait_text(f"node {blind} cannot take part")
        cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")  # the test's own demand for the node
        assert site.end(job)["JobState"] == "COMPLETED", site.text()
        assert "sub/data_inputs_document.bin is not there" in site.text()
        assert blind not in site.starts()[1]["nodes"]
    finally:
        cluster.restart_node(blind)


def test_every_script_is_accepted_with_its_own_header(cluster, tmp_path):
    for script in sorted((ROOT / "slurm").glob("finetune_*.sh")):
        nodes = min(3, int(re.search(r"--nodes=(\d+)", script.read_text())[1]))  # as many as the cluster has
        cluster.run("sbatch", "--test-only", f"--nodes={nodes}", script, cwd=tmp_path)
