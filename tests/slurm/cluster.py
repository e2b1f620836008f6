"""A real SLURM on this machine: slurmctld and three slurmd in a private directory, without systemd.

Nodes are named 127.x.y.1 ..., which resolve without /etc/hosts, each on its own port. Each claims 8
GPUs (links to /dev/null), so that the scripts' own headers are accepted. Partitions: main
(preempted by requeue at once), grace (the same after ten seconds), high (preempts both).
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ranks import free_port

NODES = 3
FREEZER = Path("/sys/fs/cgroup/freezer")

SLURM_CONF = """\
ClusterName={name}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd-%n.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/slurmd-%n.log
PlugStackConfig={d}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={d}/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=10
OverTimeLimit=0
SlurmdTimeout=5
SlurmctldTimeout=10
MessageTimeout=10
ReturnToService=1
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 DefaultTime=60 MaxTime=INFINITE
PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 DefaultTime=60 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF DefaultTime=60 MaxTime=INFINITE
"""


def free_ports(number: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < number:
        ports.add(free_port())
    return sorted(ports)


def wait_for(what: Callable[[], object], seconds: float, message: str | Callable[[], str]):
    """Poll until `what()` is true and return it; fail with `message` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"after {seconds} s: {message() if callable(message) else message}")


class Cluster:
    """The running cluster: commands with its environment, jobs to wait for, nodes to kill."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="mft", dir="/tmp"))  # short: sockets below must stay under 108 bytes
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SALLOC"))}
        self.env["SLURM_CONF"] = str(self.dir / "slurm.conf")
        self.env["PATH"] += ":/usr/sbin"
        net = ".".join(
            str(1 + byte % 254) for byte in os.urandom(2)
        )  # two clusters on one machine must not share names
        self.nodes = [f"127.{net}.{i + 1}" for i in range(NODES)]
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        port, *node_ports = free_ports(1 + NODES)
        for folder in ("state", "spool", "dev"):
            (self.dir / folder).mkdir()
        for i in range(8):
            (self.dir / "dev" / f"nvidia{i}").symlink_to("/dev/null")
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_port} CPUs=128 RealMemory=2000000 Gres=gpu:h200:8"
            for node, node_port in zip(self.nodes, node_ports, strict=True)
        )
        user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
        proctrack = "cgroup" if os.access(FREEZER, os.W_OK) else "pgid"
        self.conf = SLURM_CONF.format(
            name=self.dir.name, port=port, user=user, d=self.dir, nodes=nodes, proctrack=proctrack
        )
        (self.dir / "slurm.conf").write_text(self.conf)
        (self.dir / "plugstack.conf").write_text("")
        (self.dir / "gres.conf").write_text(f"Name=gpu Type=h200 File={self.dir}/dev/nvidia[0-7]\n")
        (self.dir / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\nConstrainCores=no\n"
            "ConstrainDevices=no\nConstrainRAMSpace=no\nConstrainSwapSpace=no\n"
        )
        self._daemon("slurmctld", "-c")
        wait_for(lambda: _listens(port), 20, "slurmctld does not answer\n" + self.log("slurmctld"))
        for node in self.nodes:
            self._daemon("slurmd", "-N", node)
        idle = f"{NODES} idle"
        wait_for(
            lambda: idle in self.run("sinfo", "-h", "-p", "main", "-o", "%D %t").stdout,
            30,
            lambda: self.log("slurmctld"),
        )
        self.run("srun", f"-N{NODES}", f"-n{NODES}", "--immediate=10", "true")

    def _daemon(self, program: str, *flags: str, prefix: tuple[str, ...] = ()) -> None:
        name = flags[-1] if program == "slurmd" else program
        with open(self.dir / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [*prefix, program, "-D", *flags], env=self.env, stdout=out, stderr=out, start_new_session=True
            )

    def log(self, name: str) -> str:
        return "".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.dir.glob(f"{name}*.log")))

    def run(self, *command: str | Path, ok: bool = True, **kwargs) -> subprocess.CompletedProcess:
        env = {**self.env, **kwargs.pop("env", {})}
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=60, **kwargs)
        if ok:
            assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def sbatch(self, *command: str | Path, **kwargs) -> int:
        return int(self.run("sbatch", "--parsable", *command, **kwargs).stdout)

    def job(self, job: int | str) -> dict[str, str]:
        """scontrol's fields of a job; {} once SLURM has forgotten it."""
        shown = self.run("scontrol", "-o", "show", "job", str(job), ok=False).stdout
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def state(self, job: int) -> str:
        return self.job(job).get("JobState", "")

    def excluded(self, job: int) -> set[str]:
        """Nodes that a job must not run on."""
        return set(self.run("scontrol", "show", "hostnames", self.job(job)["ExcNodeList"]).stdout.split())

    def wait_job(self, job: int, *states: str, seconds: float = 120, log: Path | None = None) -> dict[str, str]:
        """Wait until the job is in one of `states` (default: any final one)."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
        return wait_for(
            lambda: (self.state(job) in wanted) and self.job(job),
            seconds,
            lambda: f"job {job} is {self.job(job)}\n{log.read_text() if log and log.exists() else ''}",
        )

    def processes(self, job: int) -> list[psutil.Process]:
        """Live processes of a job, on any node."""
        found = []
        for process in psutil.process_iter():
            try:
                env = process.environ()
                if env.get("SLURM_CONF") == self.env["SLURM_CONF"] and env.get("SLURM_JOB_ID") == str(job):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_node(self, node: str) -> None:
        """Kill the daemon but not what it started, as on a node that has lost the network."""
        self.daemons[node].kill()
        self.daemons.pop(node).wait()

    def crash_node(self, node: str) -> None:
        """Kill the daemon and everything it started."""
        self.kill_node(node)
        for process in psutil.process_iter():
            try:
                if self._is_step_of(process, node) or (
                    self._ours(process) and process.environ().get("SLURMD_NODENAME") == node
                ):
                    process.kill()
            except psutil.Error:
                continue

    def start_node(self, node: str, hide: Path | None = None) -> None:
        """Start its daemon; `hide` is a directory that only this node does not see (as root)."""
        covered = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hide)) if hide else ()
        self._daemon("slurmd", "-N", node, prefix=covered)
        wait_for(
            lambda: self.node_state(node) == "idle",
            30,
            lambda: f"{node} is {self.node_state(node)}\n{self.log('slurmd-' + node)}",
        )

    def restart_node(self, node: str, hide: Path | None = None) -> None:
        self.daemons[node].terminate()
        self.daemons.pop(node).wait(10)
        self.start_node(node, hide)

    def node_state(self, node: str) -> str:
        return self.run("sinfo", "-h", "-n", node, "-p", "main", "-o", "%t").stdout.strip()

    def _is_step_of(self, process: psutil.Process, node: str) -> bool:
        """Found by the log it keeps open: slurmstepd's title overwrites its environment."""
        return process.name() == "slurmstepd" and any(
            str(self.dir / f"slurmd-{node}.log") == file.path or str(self.dir / "spool" / node) in file.path
            for file in process.open_files()
        )

    def _ours(self, process: psutil.Process) -> bool:
        return process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]

    def free(self) -> None:
        """End all jobs, so that none is left for the next test."""
        self.run("scancel", "--signal=KILL", "--full", "--state=RUNNING", "--user", self._user(), ok=False)
        self.run("scancel", "--user", self._user(), ok=False)
        wait_for(lambda: not self.run("squeue", "-h").stdout.strip(), 30, lambda: self.run("squeue").stdout)

    def _user(self) -> str:
        return str(os.getuid())

    def stop(self) -> None:
        try:
            self.free()
        finally:
            for daemon in reversed(list(self.daemons.values())):
                daemon.send_signal(signal.SIGTERM)
            for daemon in self.daemons.values():
                try:
                    daemon.wait(5)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            for process in psutil.process_iter():
                try:
                    if self._ours(process) or any(self._is_step_of(process, node) for node in self.nodes):
                        process.kill()
                except psutil.Error:
                    continue
            for node in self.nodes:
                for folder in sorted(FREEZER.glob(f"slurm_{node}/**/"), key=lambda p: -len(p.parts)):
                    try:
                        folder.rmdir()
                    except OSError:
                        continue
            shutil.rmtree(self.dir, ignore_errors=True)


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def missing() -> str | None:
    """Why no cluster can be started, or None."""
    path = os.environ["PATH"] + ":/usr/sbin"
    absent = [name for name in ("slurmctld", "slurmd", "srun", "sbatch") if not shutil.which(name, path=path)]
    return f"SLURM is not installed ({', '.join(absent)} missing); .ci/install-packages installs it" if absent else None


@pytest.fixture(scope="module", name="cluster")
def running_cluster() -> Iterator[Cluster]:
    """A running cluster; without SLURM the test is skipped, with the reason."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
