"""Training in surroundings that fail: damaged logs, few descriptors, read-only data, full disks,
a clock that is set back."""

import json
import random
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


def in_shell(setup: str, command: list[str], **options) -> str:
    """Output of a command that a shell runs after `setup`; status 0, without traceback."""
    done = subprocess.run(
        ["bash", "-c", f'{setup} && exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
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


def mounts(setup: str) -> list[str]:
    """Command line that runs another one in a mount namespace after `setup`; skips without root."""
    prefix = ["unshare", "--mount", "sh", "-c", f'{setup} && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    return prefix


def test_training_with_read_only_data_asks_for_a_cache_directory_and_runs_with_one(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    inputs = write_inputs(folder)
    prefix = mounts(f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}")
    command = [*prefix, *launcher(inputs, tmp_path / "save", 2)]
    line = one_error_line(subprocess.run(command, capture_output=True, text=True, timeout=120))
    assert "Read-only file system" in line and "--data-cache-path DIR" in line
    assert "done: 2 iterations" in in_shell("true", [*command, "--data-cache-path", str(tmp_path / "cache")])


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
        pytest.skip("faketime is not installed")
    save = tmp_path / "save"
    in_shell("true", launcher(inputs, save, 2))
    back = ["faketime", "-f", "-3d", *launcher(inputs, save, 4)]
    assert "done: 4 iterations" in in_shell("true", back)
    assert json.loads((save / "iter_0000004/manifest.json").read_bytes())["iteration"] == 4
    assert [step["iteration"] for step in read_log(save, METRICS)] == [1, 2, 3, 4]
