"""One process builds a directory while the others wait, on one node or on several that share a file
system.

No process group, and no `flock`, which shared file systems often lack: an exclusively created lock
file names the builder, a heartbeat on it shows that the builder is alive, and one rename makes the
complete directory visible. The lock saves work; correctness does not depend on it. If two processes
ever build at once, both write the same content and the first rename wins.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import rename_directory, sync_path
from megatron_ft.files.lease import Heartbeat, HeartbeatWatch, Liveness, ProcessIdentity

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 30.0  # a lock whose heartbeat has stopped for this long belongs to a dead process


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
        if _acquire(lock):
            try:
                with Heartbeat(lambda: _touch(lock), HEARTBEAT_SECONDS):
                    if not directory.is_dir():  # the previous builder may have finished in between
                        _build(directory, build)
            finally:
                lock.unlink(missing_ok=True)
            return
        try:
            beat = lock.stat().st_mtime_ns
        except FileNotFoundError:  # just released
            continue
        if Liveness.DEAD in (watch.observe(beat), _builder_liveness(lock)):
            _remove_lock(lock)
            watch = HeartbeatWatch(STALE_SECONDS)
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def _acquire(lock: Path) -> bool:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "x") as file:
            json.dump(asdict(ProcessIdentity.of_this_process()), file)
        return True
    except FileExistsError:
        if not lock.parent.is_dir():
            raise UserError(
                f"{lock.parent}: is a file, expected a directory; give another one with --data-cache-path DIR"
            ) from None
        return False
    except OSError as error:
        raise UserError(
            f"{lock.parent}: a packing index cannot be written here ({error.strerror}); "
            "give a writable directory with --data-cache-path DIR"
        ) from error


def _build(directory: Path, build: Callable[[Path], None]) -> None:
    for abandoned in directory.parent.glob(f".{directory.name}.*"):  # by a builder that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        build(partial)
        for path in partial.iterdir():
            sync_path(path)
        rename_directory(partial, directory)
    except OSError as error:
        if directory.is_dir():  # another builder was faster
            return
        raise UserError(
            f"{directory}: the packing index could not be written ({error.strerror or error}); "
            "free disk space, or give another directory with --data-cache-path DIR"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _builder_liveness(lock: Path) -> Liveness:
    """Whether the process named by the lock is alive; UNKNOWN while the lock is being written."""
    try:
        return ProcessIdentity(**json.loads(lock.read_bytes())).liveness()
    except (OSError, ValueError, TypeError):
        return Liveness.UNKNOWN


def _touch(lock: Path) -> bool:
    os.utime(lock)
    return True


def _remove_lock(lock: Path) -> None:
    """Remove a dead builder's lock. The rename succeeds for only one of several waiters, so none
    removes its successor's lock."""
    taken = lock.with_name(f"{lock.name}.{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):
        lock.rename(taken)
        taken.unlink()
