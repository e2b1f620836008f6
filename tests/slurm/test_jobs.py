"""How a job runs and ends on a real cluster: signals, limits, lost nodes, exit statuses.

Ranks are small programs, not training.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, running_cluster, wait_for  # noqa: F401
from conftest import ROOT
from project import Project

from megatron_ft.config.arguments import parse_args
from megatron_ft.launcher.node_check import checkpoint_gigabytes
from megatron_ft.launcher.slurm_job import Job, parse_fields

START = """
import os, signal, sys, time
from pathlib import Path
save, rank = Path(os.environ["RUN"]), int(os.environ["RANK"])
run = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + int(os.environ.get("MEGATRON_FT_RESUBMITTED", 0))
tracker = save / "latest_checkpointed_iteration.txt"
start = int(tracker.read_text()) if tracker.exists() else 0
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: stop.append(number))
def save_at(iteration):
    if rank == 0:
        written = tracker.with_suffix(f'.{rank}')
        written.write_text(str(iteration))
        written.replace(tracker)
        print(f"saved {iteration}", flush=True)
def until_stopped(seconds=60):
    print("up", rank, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], flush=True)
    end = time.monotonic() + seconds
    while not stop and time.monotonic() < end:
        time.sleep(0.05)
    return bool(stop)
"""


class SmallProject(Project):
    """Its ranks are a small program, which reads no data."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        super().__init__(cluster, directory)
        self.save.mkdir()
        for file in (ROOT / "tests/fixtures").glob("data_*_document.*"):
            shutil.copy(file, self.directory)
        (self.directory / "tokenizer.json").write_text("{}")
        self.ranks = self.directory / "ranks.py"
        self.configure(RUN=self.save, CONTAINER_COMMAND=shlex.join([sys.executable, str(self.ranks)]))

    def submit(self, code: str, *options: str, **kwargs) -> int:
        self.ranks.write_text(START + code)
        return super().submit(*options, **kwargs)


@pytest.fixture
def project(cluster, tmp_path) -> Iterator[SmallProject]:
    yield SmallProject(cluster, tmp_path)
    cluster.free()


SHOWN = """JobId=7 JobName=my run
   UserId=ada(100) GroupId=ada(100) MCS_label=N/A
   Priority=4294901758 Nice=0 Account=research QOS=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=1-02:00:00 TimeMin=N/A
   Partition=main AllocNode:Sid=login:19623
   ReqNodeList=(null) ExcNodeList=node[3-4]
   MinCPUsNode=8 MinMemoryCPU=1000M MinTmpDiskNode=0
   Features=fast&ib DelayBoot=00:00:00
   Command={script} --lr 1
   WorkDir=/home/ada/my project
   StdOut=/home/ada/my project/my run-7.log
"""  # of scontrol 22.05


def test_a_resubmitted_job_keeps_its_script_arguments_and_resources(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MEGATRON_FT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "h100:8")
    script = tmp_path / "my train.sh"
    script.touch()
    job = Job("7", "my run", ("node1", "node2"), 8, 12, 0, parse_fields(SHOWN.format(script=script)))
    assert job.resubmission(["node2"]) == [
        "sbatch", "--parsable", "--dependency=afterany:7", "--job-name=my run", "--chdir=/home/ada/my project",
        "--output=/home/ada/my project/my run-7.log", "--open-mode=append", "--partition=main", "--nodes=2", "--ntasks-per-node=8",
        "--cpus-per-task=12", "--gpus-per-node=h100:8", "--time=1-02:00:00", "--account=research", "--constraint=fast&ib",
        "--exclude=node[3-4],node2", "--no-requeue", str(script), "--lr", "1",
    ]  # fmt: skip
    assert "--exclude=node[3-4]" in job.resubmission()


def test_a_node_needs_free_space_for_one_checkpoint_of_what_is_trained():
    parameters, per_layer = 15.517e9, 16 * ((6144 + 6400) + 2 * 6144 + 2 * (6144 + 24576))
    for more, count in (("", parameters), ("--lora-rank 16", 40 * per_layer), ("--skip-train", 0)):
        flags = f"--preset starcoderbase --bf16 --data-prefix data --tokenizer-file {__file__} --train-iters 1 {more}"
        assert checkpoint_gigabytes(parse_args(flags.split())) == pytest.approx(14 * count / 1e9, rel=1e-3), more


@pytest.mark.parametrize(
    ("visible", "local_rank"),
    [(None, "3"), ("0,1,2,3", "3"), ("3", "0")],
    ids=["no variable", "all GPUs visible", "one GPU visible"],
)
def test_a_rank_takes_its_gpu_whether_or_not_the_site_binds_tasks(tmp_path, visible, local_rank):
    env = {
        "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node2",
        "MEGATRON_FT_RANKS_ON_NODE": "8", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}),
    }  # fmt: skip
    show = "import os; print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')))"
    command = [sys.executable, ROOT / "launch" / "rank.py", tmp_path / "logs", sys.executable, "-c", show]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "rank-ended rank=11 node=node2 status=0" in done.stderr, done.stderr
    assert (tmp_path / "logs" / "rank-011.log").read_text().splitlines()[-1] == f"11 16 {local_rank} 8"


def test_a_failed_rank_ends_the_job_with_its_status_and_its_traceback_last(project):
    code = "until_stopped(1)\nif rank == 1: raise ZeroDivisionError('rank one divides by nothing')\nuntil_stopped()\n"
    job = project.submit(code, "--export=NONE", flags=("--log-interval=7",))
    assert project.end(job)["ExitCode"] == "1:0", project.text()
    assert project.text().rstrip().endswith("ZeroDivisionError: rank one divides by nothing")
    assert "rank 1 on 127." in project.text() and project.cluster.processes(job) == []
    assert "up 1" in (project.save / "logs" / "rank-001.log").read_text()
    assert "up 1" not in project.text(), "only rank 0 writes to the main log"
    assert len(project.starts()) == 1

    job = project.submit(
        "until_stopped(1)\nif rank == 0: raise ZeroDivisionError('rank zero does, too')\nuntil_stopped()\n"
    )
    assert project.end(job)["ExitCode"] == "1:0"
    assert project.text().rstrip().endswith("ZeroDivisionError: rank zero does, too")


@pytest.mark.parametrize("binding", ["--gpus-per-task=1", "--gpu-bind=single:1"])
def test_every_rank_sees_all_gpus_of_its_node(project, binding):
    # in place of a torch that can use the cluster's GPUs, which are made up
    container = project.directory / "container.sh"
    container.write_text(
        f'case "$*" in *device_count*) echo GPUS 8;; *) exec {shlex.quote(sys.executable)} "$0";; esac\n'
    )
    command = shlex.join(["sh", "-c", f". {shlex.quote(str(container))}", str(project.ranks)])
    project.configure(GPUS_PER_NODE="8", RUN=project.save, CONTAINER_COMMAND=command)
    code = "print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['LOCAL_RANK'])\nsave_at(30)\n"
    eight = ("--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8")
    job = project.submit(code, *eight, binding, flags=("--global-batch-size=4",))
    assert project.end(job)["JobState"] == "COMPLETED", project.text()
    assert "sees 0,1,2,3,4,5,6,7 0" in project.text(), project.text()
    assert "sees 0,1,2,3,4,5,6,7 5" in (project.save / "logs" / "rank-005.log").read_text()


def test_dry_run_in_a_job_prints_what_srun_would_start(project):
    job = project.submit("", flags=("--dry-run",))
    assert project.end(job)["JobState"] == "COMPLETED"
    assert re.search(
        r"MASTER_ADDR=127\.\S+ .*MASTER_PORT=\d+ .*srun --export=ALL --nodes=2 --ntasks=2 .*--kill-on-bad-exit=1",
        project.text(),
        re.DOTALL,
    )
    assert not (project.save / "starts.jsonl").exists()


@pytest.mark.slow
def test_a_warned_job_saves_and_requeues_itself_until_it_has_finished(project):
    code = "save_at(start + 10) if until_stopped(60 if run < 2 else 0) else None\nsys.exit(75 if run < 2 else save_at(30))\n"
    job = project.submit(code)
    for run in range(2):
        project.wait_text("up 0", 40, times=run + 1)
        project.cluster.run("scancel", "--batch", "--signal=USR2", str(job))
        project.wait_text(f"saved {10 * (run + 1)}", 45)
    assert project.end(job)["JobState"] == "COMPLETED"
    assert [start["iteration"] for start in project.starts()] == [0, 10, 20]
    assert project.text().count("warned by SIGUSR2") == 2 and "finished at iteration 30" in project.text()
    assert project.cluster.job(job)["Restarts"] == "2"
    ports = set(re.findall(r"up 0 \S+ (\d+)", project.text()))
    assert len(ports) == 3, "a stale rank of the job before the requeue must not find the new rendezvous"


@pytest.mark.slow
def test_the_mtf_engine_is_stopped_with_its_own_signal_and_resumes(project):
    checkout = project.directory.parent / "Megatron-LM"
    (checkout / "megatron").mkdir(parents=True)
    flags = [
        line for line in Path(__file__).with_name("mtf_flags.txt").read_text().splitlines() if line.startswith("--")
    ]
    (checkout / "megatron" / "arguments.py").write_text("".join(f"group.add_argument({flag!r})\n" for flag in flags))
    (checkout / "finetune_mtf.py").write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "save = Path(sys.argv[sys.argv.index('--save') + 1])\n"
        "def on_term(number, frame):\n"
        "    if os.environ['RANK'] == '0':\n"
        "        (save / 'iter_0000007' / 'mp_rank_00').mkdir(parents=True)\n"
        "        (save / 'latest_checkpointed_iteration.txt').write_text('7')\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, on_term)\n"
        "print('start', (save / 'latest_checkpointed_iteration.txt').exists(), flush=True)\n"
        "if not (save / 'latest_checkpointed_iteration.txt').exists(): time.sleep(60)\n"
    )
    project.configure(MEGATRON_PATH=checkout, RUN=project.save)
    plain = project.directory / "plain"
    link = project.directory.parent / "data"  # the branch cannot read paths with spaces
    link.mkdir()
    for file in project.directory.glob("data_*"):
        shutil.copy(file, link)
    job = project.submit("", flags=("--engine=mtf", f"--data-prefix={link}/data"), save=plain)
    project.wait_text("start False")
    project.cluster.run("scancel", "--batch", "--signal=USR2", str(job))
    project.wait_text("start True", 45)
    assert project.end(job)["JobState"] == "COMPLETED"
    assert project.cluster.job(job)["Restarts"] == "1" and "finished at iteration 7" in project.text()


@pytest.mark.slow
def test_no_progress_or_too_many_requeues_end_the_job(project):
    idle = project.submit("until_stopped()\nsys.exit(75)\n")
    project.wait_text("up 0")
    project.cluster.run("scancel", "--batch", "--signal=USR2", str(idle))
    assert project.end(idle)["JobState"] == "FAILED"
    assert "no progress" in project.text()

    project.log.unlink()
    job = project.submit(
        "save_at(start + 1) if until_stopped(2) or True else None\nsys.exit(75)\n", env={"MAX_REQUEUES": "1"}
    )
    assert project.end(job)["JobState"] == "FAILED"
    assert project.cluster.job(job)["Restarts"] == "1"
    assert "MAX_REQUEUES=1 is reached" in project.text()


@pytest.mark.slow
def test_where_requeueing_is_forbidden_the_job_resubmits_itself(project):
    code = "if run == 0 and until_stopped():\n    save_at(10); sys.exit(75)\nsave_at(30)\nprint('saw', os.environ.get('COLOR'))\n"
    job = project.submit(code, "--no-requeue", "--export=ALL,COLOR=blue", flags=("--wandb-run-name", "two words"))
    waiting = project.cluster.sbatch(
        f"--dependency=afterok:{job}",
        "--kill-on-invalid-dep=yes",
        f"--output={project.directory}/after.txt",
        "--wrap=echo after",
    )
    project.wait_text("up 0")
    project.cluster.run("scancel", "--batch", "--signal=USR2", str(job))
    project.wait_text("resubmitted as job")
    again = int(re.search(r"resubmitted as job (\d+)", project.text())[1])
    assert project.end(again)["JobState"] == "COMPLETED", project.text()
    assert [start["job"] for start in project.starts()] == [str(job), str(again)]
    assert "saw blue" in project.text()
    project.cluster.wait_job(waiting, "COMPLETED")
    assert project.cluster.job(again)["NumNodes"] == "2"


@pytest.mark.slow
def test_a_canceled_job_saves_and_stays_canceled(project):
    job = project.submit("if until_stopped():\n    save_at(10)\n    sys.exit(75)\n")
    project.wait_text("up 0")
    project.cluster.run("scancel", str(job))
    project.wait_text("saved 10")
    project.wait_text("ended by SLURM")
    time.sleep(3)
    assert project.cluster.state(job) == "CANCELLED"
    assert project.cluster.processes(job) == [] and len(project.starts()) == 1


@pytest.mark.slow
def test_a_dead_node_ends_the_step_and_the_job_is_requeued_without_it(project):
    code = "if run == 0:\n    until_stopped(3)\n    if rank == 0:\n        time.sleep(12); sys.exit('peer is gone')\n    until_stopped()\nsave_at(30)\n"
    cluster = project.cluster
    job = project.submit(code, "--nodelist=" + ",".join(cluster.nodes[:2]))
    project.wait_text("up 0")
    started = time.monotonic()
    dead = cluster.nodes[1]
    cluster.crash_node(dead)
    try:
        # Whichever notices first: the launcher, whose step ends and which probes the nodes, or
        # SLURM, after SlurmdTimeout.
        noticed = (f"node {dead} is lost", "DUE TO NODE FAILURE")
        wait_for(lambda: any(words in project.text() for words in noticed), 60, project.text)
        cluster.wait_job(job, "PENDING", seconds=60)
        cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")  # the test itself asked for the node
        assert project.end(job, seconds=120)["JobState"] == "COMPLETED", project.text()
        assert time.monotonic() - started < 100
        assert [dead in start["nodes"] for start in project.starts()] == [True, False]
    finally:
        cluster.start_node(dead)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="hiding a directory from one node takes root")
def test_a_node_that_does_not_see_the_data_is_named_and_excluded(project):
    cluster = project.cluster
    blind = cluster.nodes[0]
    (project.directory / "sub").mkdir()
    for file in project.directory.glob("data_*"):
        file.rename(project.directory / "sub" / file.name)
    cluster.restart_node(blind, hide=project.directory / "sub")
    try:
        where = ("--nodelist=" + ",".join(cluster.nodes[:2]), f"--exclude={cluster.nodes[2]}")
        job = project.submit("save_at(30)\n", *where, flags=("--data-prefix=sub/data",))
        project.wait_text(f"node {blind} cannot take part")
        cluster.wait_job(job, "PENDING")
        excluded = {blind, cluster.nodes[2]}  # what the user excluded stays excluded
        wait_for(lambda: cluster.excluded(job) == excluded, 10, lambda: str(cluster.job(job)))
        # the test itself asked for these nodes
        cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=", f"ExcNodeList={blind}")
        assert project.end(job)["JobState"] == "COMPLETED", project.text()
        assert "sub/data_inputs_document.bin not found" in project.text()
        assert blind not in project.starts()[1]["nodes"]
    finally:
        cluster.restart_node(blind)


def test_sbatch_accepts_the_header_of_every_training_script(cluster, tmp_path):
    for script in sorted((ROOT / "slurm").glob("finetune_*.sh")):
        nodes = min(3, int(re.search(r"--nodes=(\d+)", script.read_text())[1]))  # as many as the cluster has
        cluster.run("sbatch", "--test-only", f"--nodes={nodes}", script, cwd=tmp_path)
