"""One process builds a directory while the others wait, on one node or on several that share a file
system.

No process group, and no `flock`, which shared file systems often lack. An exclusively created lock
file names the builder, a heartbeat on it shows that the builder is alive, and one rename makes the
complete directory visible. The lock saves work; correctness does not depend on it. If two processes
ever build at once, such as a builder that was suspended and the one that replaced it, each fills a
directory of its own, the first rename wins, and the other process uses the winner's.
"""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import sleep

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import rename_directory, sync_path
from megatron_ft.files.json_file import read_json, require
from megatron_ft.files.lease import Heartbeat, HeartbeatWatch, Liveness, ProcessIdentity
from megatron_ft.files.os_error import remedy

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 30.0  # a lock whose heartbeat has stopped for this long may be taken over
ABANDONED_SECONDS = 24 * 3600.0  # nobody builds for this long: what is older may be removed
CACHE = "give another directory with --data-cache-path DIR"
_SCRATCH = re.compile(r"\..+\.[0-9a-f]{8,32}")


@dataclass(frozen=True)
class Builder:
    """The content of a lock file. `token` also names the directory that the builder fills."""

    token: str
    process: ProcessIdentity

    @classmethod
    def read(cls, lock: Path) -> "Builder | None":
        """The builder that a lock names; None if there is none, or while it is being written."""
        try:
            found = read_json(lock, max_bytes=1 << 16)
            name = str(lock)
            return cls(
                require(found, "token", str, name, low=8, high=32),
                ProcessIdentity(
                    require(found, "host", str, name),
                    require(found, "namespace", str, name),
                    require(found, "pid", int, name, low=1, high=2**31 - 1),
                    require(found, "process_started", float, name),
                ),
            )
        except UserError:
            return None

    def to_json(self) -> str:
        """The inverse of `read`."""
        return json.dumps({"token": self.token, **asdict(self.process)})


def build_once(directory: Path, build: Callable[[Path], None]) -> None:
    """Return when `directory` exists and is complete. `build(path)` fills an empty directory; only
    one process calls it.

    Raises UserError if `directory` does not exist and its parent cannot be written, and whatever
    `build` raises.
    """
    lock = directory.with_name(directory.name + ".lock")
    watch = HeartbeatWatch(STALE_SECONDS)
    pause = 0.02
    while not directory.is_dir():
        builder = Builder(uuid.uuid4().hex, ProcessIdentity.of_this_process())
        if _acquire(lock, builder):
            try:
                with Heartbeat(partial(_beat, lock, builder), HEARTBEAT_SECONDS):
                    # The previous builder may have finished in between.
                    if directory.is_dir() or _build(directory, build, lock, builder):
                        return
            finally:
                _release(lock, builder)
            continue  # another process took the lock over; wait for it
        try:
            beat = lock.stat().st_mtime_ns
        except OSError:  # just released
            sleep(pause)
            continue
        other = Builder.read(lock)
        dead = other is not None and other.process.liveness() is Liveness.DEAD
        if dead or watch.observe(beat) is Liveness.DEAD:
            _take_away(lock, other)
            if other and dead:
                shutil.rmtree(_scratch(directory, other.token), ignore_errors=True)
            watch = HeartbeatWatch(STALE_SECONDS)
        sleep(pause)
        pause = min(1.0, pause * 1.5)


def _acquire(lock: Path, builder: Builder) -> bool:
    """Whether this process now holds the lock."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "x", encoding="utf-8") as file:
            try:
                file.write(builder.to_json())
                file.flush()
            except OSError:
                lock.unlink(missing_ok=True)
                raise
        return True
    except (FileExistsError, NotADirectoryError):
        if not lock.parent.is_dir():
            raise UserError(f"{lock.parent}: is a file, expected a directory; {CACHE}") from None
        return False
    except OSError as error:
        raise _not_writable(lock.parent, error) from error


def _build(directory: Path, build: Callable[[Path], None], lock: Path, builder: Builder) -> bool:
    """Whether `directory` exists, by this process or a faster one; False if this process failed
    because it has lost the lock to another one."""
    _remove_abandoned(directory.parent)
    scratch = _scratch(directory, builder.token)
    try:
        scratch.mkdir()
        build(scratch)
        for path in scratch.iterdir():
            sync_path(path)
        rename_directory(scratch, directory)
    except OSError as error:
        if directory.is_dir():
            return True
        if Builder.read(lock) != builder:
            return False
        raise _not_writable(directory, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _scratch(directory: Path, token: str) -> Path:
    return directory.with_name(f".{directory.name}.{token}")


def _remove_abandoned(parent: Path) -> None:
    """Remove what builders left behind whose process could not be checked: another node that
    crashed. A builder that is alive, even if suspended for hours, keeps its files.

    Ages are relative to a file that is written now: clocks of nodes and file servers differ.
    """
    with suppress(OSError):
        entries = [entry for entry in parent.iterdir() if _SCRATCH.fullmatch(entry.name)]
        now = max((entry.stat().st_mtime for entry in parent.glob("*.lock")), default=0.0)
        for entry in entries:
            newest = max([entry.stat().st_mtime, *(path.stat().st_mtime for path in entry.iterdir())])
            if now - newest > ABANDONED_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)


def _not_writable(path: Path, error: OSError) -> UserError:
    what_to_do = "give a writable directory with --data-cache-path DIR"
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) and (other := remedy(error, "")):
        what_to_do = f"{other}, or {CACHE}"
    return UserError(f"{path}: a packing index cannot be written here ({error.strerror or error}); {what_to_do}")


def _beat(lock: Path, builder: Builder) -> bool:
    """Touch the lock; False once another process holds it."""
    if Builder.read(lock) not in (builder, None):
        return False
    os.utime(lock)
    return True


def _release(lock: Path, builder: Builder) -> None:
    """Remove the lock, unless another process has taken it over."""
    if Builder.read(lock) == builder:
        lock.unlink(missing_ok=True)


def _take_away(lock: Path, builder: Builder | None) -> None:
    """Remove the lock of a builder that is dead or suspended.

    Another waiter may have done so already, and hold a lock of its own. It is put back; if a third
    process takes the lock in this moment, two build, which is harmless.
    """
    taken = lock.with_name(f".{lock.name}.{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):
        lock.rename(taken)
        if Builder.read(taken) == builder:
            taken.unlink()
        else:
            taken.rename(lock)
