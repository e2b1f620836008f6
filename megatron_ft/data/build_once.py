"""One process builds a directory while the others wait, on one node or on many that share a file system.

No process group and no `flock` (which shared file systems often lack): an exclusively created lock file says who builds, a
heartbeat on it says that the builder lives, and a rename makes the whole directory appear at once. The lock saves work, it does
not keep things correct: should two processes ever build, both write the same content and the first rename wins.
"""

import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import rename_directory, sync_path

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = (
    30.0  # a lock whose heartbeat stood still this long, by the waiter's own clock, belongs to a dead process
)


def build_once(directory: Path, build: Callable[[Path], None]) -> None:
    """Return when `directory` exists and is whole. `build(path)` fills an empty directory; only one process calls it.

    Raises UserError where `directory` does not exist and its parent cannot be written, and whatever `build` raises.
    """
    lock = directory.with_name(directory.name + ".lock")
    watched: tuple[int, float] | None = None  # the lock's last heartbeat and when we first saw it
    pause = 0.02
    while not directory.is_dir():
        if _acquire(lock):
            with _Heartbeat(lock):
                if not directory.is_dir():  # the builder before us may have finished in between
                    _build(directory, build)
            return
        try:
            heartbeat = lock.stat().st_mtime_ns
        except FileNotFoundError:  # released just now: look again
            continue
        now = time.monotonic()
        if watched is None or watched[0] != heartbeat:
            watched = (heartbeat, now)
        if now - watched[1] > STALE_SECONDS or _builder_died(lock):
            _remove_lock(lock)
            watched = None
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def _acquire(lock: Path) -> bool:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "x") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
        return True
    except FileExistsError:
        if not lock.parent.is_dir():
            raise UserError(f"{lock.parent} is a file; give another directory with --data-cache-path DIR") from None
        return False
    except OSError as error:
        raise UserError(
            f"{lock.parent}: a packing index cannot be written here ({error.strerror}); "
            "give a directory that can be written with --data-cache-path DIR"
        ) from error


def _build(directory: Path, build: Callable[[Path], None]) -> None:
    for left_over in directory.parent.glob(f".{directory.name}.*"):  # of a builder that was killed
        shutil.rmtree(left_over, ignore_errors=True)
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
            "make room, or give another directory with --data-cache-path DIR"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _builder_died(lock: Path) -> bool:
    """True where the lock names a process of this host that is gone; a lock of another host is judged by its heartbeat."""
    try:
        host, pid = lock.read_text().split()
    except (OSError, ValueError):  # gone, or being written
        return False
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _remove_lock(lock: Path) -> None:
    """Take a dead builder's lock away. The rename lets one of several waiters do it, so none removes its successor's lock."""
    taken = lock.with_name(f"{lock.name}.{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):
        lock.rename(taken)
        taken.unlink()


class _Heartbeat:
    """Touches the lock while the builder works, and removes it at the end."""

    def __init__(self, lock: Path):
        self.lock = lock
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self.done.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.lock)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception) -> None:
        self.done.set()
        self.thread.join()
        self.lock.unlink(missing_ok=True)
