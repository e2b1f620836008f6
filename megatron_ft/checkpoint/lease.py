"""One run owns a save directory at a time; a run that has lost it can never write there again.

`DIR/.owner.json` names the owner by a token. A run takes the directory over when the owner is gone:
its process is dead (same host), it is an earlier run of the same SLURM job, or its heartbeat has
stopped. Checkpoints are committed under a lock and only by the owner whose token is in the file, so
ranks of a run that was wrongly taken for dead cannot commit anything.
"""

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.json_file import optional, parse_json, require
from megatron_ft.files.lease import Heartbeat, HeartbeatWatch, Liveness, ProcessIdentity
from megatron_ft.printable import printable
from megatron_ft.weights.directory import OWNER

LOCK = ".owner.lock"
BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # seconds without a heartbeat after which an owner on another host counts as dead
MAX_BYTES = 64 << 10  # of .owner.json; a longer one is damaged
MAX_PID = 2**31 - 1
POLL = 2.0  # seconds between checks of an owner that may be dead


@dataclass(frozen=True)
class Owner:
    """The content of `.owner.json`: the token, process and SLURM job that hold the lease."""

    token: str
    process: ProcessIdentity
    slurm_job: str | None
    slurm_restarts: int
    since: str

    @classmethod
    def this_process(cls, token: str) -> "Owner":
        """This process as the owner, from now on."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        job = os.environ.get("SLURM_JOB_ID")
        return cls(token, ProcessIdentity.of_this_process(), job, _slurm_restarts(), now)

    @classmethod
    def from_json(cls, text: bytes) -> "Owner | None":
        """The owner that a file names; None if the file is damaged."""
        try:
            data = parse_json(text, OWNER)
            process = ProcessIdentity(
                require(data, "host", str, OWNER),
                optional(data, "namespace", str, OWNER, ""),
                require(data, "pid", int, OWNER, low=1, high=MAX_PID),
                require(data, "process_started", float, OWNER),
            )
            return cls(
                require(data, "token", str, OWNER),
                process,
                optional(data, "slurm_job", str, OWNER, None),
                optional(data, "slurm_restarts", int, OWNER, 0),
                require(data, "since", str, OWNER),
            )
        except UserError:
            return None

    def to_json(self) -> bytes:
        """The inverse of `from_json`."""
        slurm = {"slurm_job": self.slurm_job, "slurm_restarts": self.slurm_restarts}
        return json.dumps({"token": self.token, **asdict(self.process), **slurm, "since": self.since}).encode()

    def liveness(self) -> Liveness:
        """Whether the owner is alive, as far as this host can tell without its heartbeat."""
        job = os.environ.get("SLURM_JOB_ID")
        if job and self.slurm_job == job and _slurm_restarts() > self.slurm_restarts:
            return Liveness.DEAD  # SLURM requeues a job only after its previous run has ended
        return self.process.liveness()

    def __str__(self) -> str:
        return printable(f"process {self.process.pid} on {self.process.host}")


class SaveDirectoryLease:
    """This process's lease on the save directory. Taken by rank 0; the other ranks only write into
    directories named after its token."""

    def __init__(self, save: Path) -> None:
        self.save = save
        self.token = uuid.uuid4().hex[:12]
        self._heartbeat = Heartbeat(self._beat, BEAT)

    def claim(self, log: Callable[[str], object] = print) -> None:
        """Become the owner. Waits while an owner on another host may be dead; raises UserError if
        the owner is alive."""
        watch, waiting = HeartbeatWatch(STALE), False
        while True:
            evidence = "its process is running"
            with self._locked():
                owner, beat = self._read()
                liveness = owner.liveness() if owner else Liveness.DEAD
                if liveness is Liveness.UNKNOWN:
                    evidence = "its heartbeat is advancing"
                    liveness = watch.observe(beat)
                if owner is None or liveness is Liveness.DEAD:
                    replace_file(self.save / OWNER, Owner.this_process(self.token).to_json())
                    break
            if liveness is Liveness.ALIVE:
                raise UserError(
                    f"--save {self.save} is in use by a running job ({owner}, since {owner.since}; {evidence}): "
                    "stop that job, or give another --save"
                )
            if not waiting:
                waiting = True
                log(f"{self.save}: last used by {owner}; waiting {STALE:.0f} s for a heartbeat from it")
            time.sleep(POLL)
        self._heartbeat.start()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold during every step that others can see; UserError if the lease has been lost."""
        with self._locked():
            owner, _ = self._read()
            if owner is None or owner.token != self.token:
                raise UserError(
                    f"--save {self.save} has been taken over by {owner or 'nobody'}; this run stops and writes nothing more"
                )
            yield

    def release(self) -> None:
        """Give the directory up, if this process still owns it."""
        self._heartbeat.stop()
        with self._locked():
            owner, _ = self._read()
            if owner and owner.token == self.token:
                (self.save / OWNER).unlink()

    def _read(self) -> tuple[Owner | None, int]:
        """The owner, None if there is none, and its last heartbeat: the file's mtime in ns."""
        path = self.save / OWNER
        try:
            with path.open("rb") as file:
                return Owner.from_json(file.read(MAX_BYTES)), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None, 0

    def _beat(self) -> bool:
        """Touch the file; False once another process owns the directory."""
        with self._locked():
            owner, _ = self._read()
            if owner is None or owner.token != self.token:
                return False
            os.utime(self.save / OWNER)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.save / LOCK, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _slurm_restarts() -> int:
    """How often SLURM has requeued this job."""
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
