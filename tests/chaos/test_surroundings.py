"""Training in surroundings that fail: damaged logs, few descriptors, read-only data, disks without
space or inodes, a clock that is set back."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_runs import FLAGS, final_state, run, write_inputs
from conftest import ROOT, one_error_line, run_program

from megatron_ft.metrics.lines import EVENTS, METRICS, VALIDATION, read_log
from megatron_ft.weights.directory import BEST, OWNER, TRACKER

pytestmark = pytest.mark.slow
DAMAGE = (
    b"\xff\xfe\n",
    b"null\n",
    b'{"iteration": "5", "part": "x", "group": [], "event": null}\n',
    b'{"iteration": ' + b"[" * 10_000 + b"\n",
    b'{"iteration": ' + b"9" * 5000 + b"}\n",
    b'{"iteration": 1, "lo',
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def launcher(inputs: str, save: Path, iterations: int) -> list[str]:
    """Command line of the launcher for one rank."""
    flags = f"--num-processes 1 {FLAGS} {inputs} --train-iters {iterations} --save {save}"
    return [sys.executable, str(ROOT / "launch/finetune.py"), *flags.split()]


def in_shell(setup: str, command: list[str]) -> str:
    """Output of a command that a shell runs after `setup`; status 0, without traceback."""
    done = subprocess.run(
        ["bash", "-c", f'{setup} && exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def test_damaged_logs_owners_and_trackers_at_every_restart_change_no_number(inputs, tmp_path):
    draw, save, more = (
        random.Random(12),
        tmp_path / "save",
        "--train-iters 8 --save-interval 2 --eval-interval 2 --eval-iters 1",
    )
    assert run(inputs, tmp_path / "uninterrupted", more)[0] == 0
    for restart, stop in enumerate((2, 4, 6, 8)):
        status, log = run(inputs, save, f"{more} --exit-interval {stop}")
        assert status == (0 if stop == 8 else 75), log
        if stop == 8:
            break
        for name in (METRICS, VALIDATION, EVENTS):
            content = (save / name).read_bytes()
            lines = draw.sample(DAMAGE[:-1], 3)
            (save / name).write_bytes(lines[0] + content + b"".join(lines[1:]) + DAMAGE[-1])
        for name in (TRACKER, BEST, OWNER):
            (save / name).write_bytes((b"\xc2\xb3", b"", b"\x00\xff" * 50_000)[restart])
    steps = read_log(save, METRICS)
    assert [step["iteration"] for step in steps] == list(range(1, 9))
    losses = [step["loss"] for step in read_log(tmp_path / "uninterrupted", METRICS)]
    assert [step["loss"] for step in steps] == losses
    assert final_state(save)[1:] == final_state(tmp_path / "uninterrupted")[1:]
    assert "report" not in (save / EVENTS).read_text() and (save / "report.html").is_file()
    assert run_program("launch/status.py", tmp_path).stdout.count("8/8") == 2


def test_training_runs_with_256_open_files(inputs, tmp_path):
    assert "done: 2 iterations" in in_shell("ulimit -n 256", launcher(inputs, tmp_path / "save", 2))


def mounts(setup: str, start: str = 'exec "$@"') -> list[str]:
    """Command line that runs another one with `start` after `setup`, in a mount namespace; skips
    where neither root nor a user namespace may mount."""
    for privileges in ([], ["--map-root-user"]):
        namespace = ["unshare", "--mount", *privileges]
        attempt = [*namespace, "mount", "-t", "tmpfs", "none", "/mnt"]
        if shutil.which("unshare") and subprocess.run(attempt, capture_output=True).returncode == 0:
            return [*namespace, "sh", "-c", f"{setup} && {start}", "sh"]
    pytest.skip("mounting is not permitted")


def test_training_with_read_only_data_asks_for_a_cache_directory_and_runs_with_one(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    inputs = write_inputs(folder)
    prefix = mounts(f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}")
    command = [*prefix, *launcher(inputs, tmp_path / "save", 2)]
    line = one_error_line(subprocess.run(command, capture_output=True, text=True, timeout=300))
    assert "Read-only file system" in line and "--data-cache-path DIR" in line
    assert "done: 2 iterations" in in_shell("true", [*command, "--data-cache-path", str(tmp_path / "cache")])


def test_a_disk_without_free_inodes_ends_a_run_that_resumes_when_there_are_more(inputs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    starts = "; ".join(
        f'mount -o remount,nr_inodes={inodes} {disk}; "$@" >{tmp_path}/{inodes}.txt 2>&1; echo $?'
        for inodes in (1, 25, 1000)
    )
    flags = ("--save-interval", "1", "--data-cache-path", str(tmp_path / "cache"))
    prefix = mounts(f"mount -t tmpfs none {disk}", f"{{ {starts}; }}")
    statuses = in_shell("true", [*prefix, *launcher(inputs, disk / "save", 8), *flags])
    assert statuses.split() == ["2", "2", "0"]
    nothing, few, enough = ((tmp_path / f"{inodes}.txt").read_text() for inodes in (1, 25, 1000))
    assert nothing == f"error: --save {disk}/save: No space left on device; free disk space or inodes\n"
    assert "Traceback" not in few and "2 saves in a row failed" in few.splitlines()[-1]
    saved = max(map(int, re.findall(r"^saved iteration (\d+)", few, flags=re.MULTILINE)))
    assert f"iter_{saved:07d} (iteration {saved}, " in enough and "done: 8 iterations" in enough


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_full_for_metrics_and_report_loses_only_them(inputs, tmp_path, full_disk):
    save = tmp_path / "save"
    save.mkdir()
    for name in (METRICS, EVENTS, ".report.html.new"):
        (save / name).symlink_to(full_disk / name)
    shown = in_shell("true", launcher(inputs, save, 2))
    assert shown.count("lines are lost until there is free space again") == 2
    assert "done: 2 iterations" in shown and (save / "iter_0000002/manifest.json").is_file()
    (full_disk / "filler").unlink()
    shown = in_shell("true", launcher(inputs, save, 4))
    assert "done: 4 iterations" in shown and "lines are lost" not in shown
    assert [step["iteration"] for step in read_log(save, METRICS)] == [3, 4]


def test_a_clock_that_is_set_back_between_two_starts_changes_nothing(inputs, tmp_path):
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed; .ci/install-packages installs it")
    save = tmp_path / "save"
    in_shell("true", launcher(inputs, save, 2))
    back = ["faketime", "-f", "-3d", *launcher(inputs, save, 4)]
    assert "done: 4 iterations" in in_shell("true", back)
    assert json.loads((save / "iter_0000004/manifest.json").read_bytes())["iteration"] == 4
    assert [step["iteration"] for step in read_log(save, METRICS)] == [1, 2, 3, 4]
