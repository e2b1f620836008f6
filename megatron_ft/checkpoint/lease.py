"""One run owns a save directory at a time; whoever lost it can never write there again.

`DIR/.owner.json` names the owner by a token. A start takes the directory over when the owner is gone: its process is dead (same host),
it is an earlier life of the same SLURM job, or its heartbeat has stood still. A checkpoint is committed under a lock and only by the
token in the file, so the ranks of a run that was thought dead find that they may not.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.weights.directory import OWNER

LOCK = ".owner.lock"
BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # seconds without one after which an owner on another host is taken for dead


class Owner:
    """The claim of this process on `save`. Made by rank 0; other ranks only write into directories named after its token."""

    def __init__(self, save: Path) -> None:
        self.save = save
        self.token = uuid.uuid4().hex[:12]
        self._stop = threading.Event()

    def claim(self, log=print) -> None:
        """Become the owner. Waits while an owner on another host may be dead; raises UserError when the owner lives."""
        waited_since = None
        while True:
            with self._locked():
                owner, beat = self._read()
                reason = "" if owner is None else _alive(owner)
                if (
                    reason is None and waited_since is not None
                ):  # no way to ask: has the heartbeat moved while we waited?
                    if beat != waited_since[1]:
                        reason = "its heartbeat moves"
                    elif time.monotonic() - waited_since[0] >= STALE:
                        reason = ""
                if reason == "":
                    self._write()
                    break
            if reason:
                raise UserError(
                    f"--save {self.save} belongs to a run that is alive (process {owner['pid']} on {owner['host']}, since {owner['since']}; "
                    f"{reason}): stop that run, or give another --save"
                )
            if waited_since is None:
                waited_since = (time.monotonic(), beat)
                log(
                    f"{self.save}: last written by process {owner['pid']} on {owner['host']}; waiting {STALE:.0f} s for a sign of life"
                )
            time.sleep(2.0)
        threading.Thread(target=self._beat, daemon=True).start()

    @contextmanager
    def writing(self):
        """Held around every step that others see: raises UserError when the directory has another owner now."""
        with self._locked():
            owner, _ = self._read()
            if owner is None or owner["token"] != self.token:
                holder = f"process {owner['pid']} on {owner['host']}" if owner else "nobody"
                raise UserError(
                    f"--save {self.save} has been taken over by {holder}; this run stops and writes nothing more"
                )
            yield

    def release(self) -> None:
        """Give the directory up, if it is still ours."""
        self._stop.set()
        with self._locked():
            owner, _ = self._read()
            if owner and owner["token"] == self.token:
                (self.save / OWNER).unlink()

    def _write(self) -> None:
        process = psutil.Process()
        owner = {
            "token": self.token,
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "pid": process.pid,
            "process_started": process.create_time(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        replace_file(self.save / OWNER, json.dumps(owner).encode())

    def _read(self) -> tuple[dict | None, int]:
        path = self.save / OWNER
        try:
            return json.loads(path.read_bytes()), path.stat().st_mtime_ns
        except FileNotFoundError:
            return None, 0
        except ValueError:  # damaged from outside: names nobody
            return None, 0

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                with self._locked():
                    owner, _ = self._read()
                    if owner is None or owner["token"] != self.token:
                        return
                    os.utime(self.save / OWNER)
            except OSError:  # a full or vanished disk is the next save's to report
                continue

    @contextmanager
    def _locked(self):
        with open(self.save / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _alive(owner: dict) -> str | None:
    """Why an owner is known to live, "" when it is known to be dead, None when this host cannot tell."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and owner.get("slurm_job") == job:  # a job has one life at a time: the requeued one follows a dead one
        return "" if int(os.environ.get("SLURM_RESTART_COUNT") or 0) > owner["slurm_restarts"] else _process(owner)
    return _process(owner)


def _process(owner: dict) -> str | None:
    if (owner["host"], owner.get("namespace")) != (socket.gethostname(), _namespace()):
        return None
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["process_started"]) < 1.0
        return "the process runs" if same and process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def _namespace() -> str:
    """Process ids mean something inside one namespace only: two containers may share a host name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
