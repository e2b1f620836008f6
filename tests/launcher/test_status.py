"""launch/status.py shows every run that can be read, whatever its neighbors hold."""

import errno
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_program

from megatron_ft.weights import directory

STEP = {"iteration": 7, "loss": 1.5, "tokens_per_second": 1000.0, "step_seconds": 2.0, "time": 1.0}


def add_run(runs: Path, name: str) -> Path:
    run = runs / name
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    (run / "events.jsonl").write_text('{"iteration": 0, "event": "start", "train_iters": 10, "time": 1}\n')
    return run


def status(runs: Path) -> list[str]:
    env = {**os.environ, "PATH": "/nonexistent"}  # without squeue
    shown = run_program("launch/status.py", runs, env=env).stdout
    assert all(line.isprintable() for line in shown.splitlines())
    return shown.splitlines()[1:]


def cells(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(name)]
    return line.split()


DAMAGE = {
    "not UTF-8": b"\xff\xfe\n",
    "null": b"null\n",
    "no keys": b"{}\n",
    "a string for a number": b'{"iteration": "8", "event": "start", "train_iters": "10"}\n',
    "strings for optional numbers": b'{"iteration": 7, "loss": "x", "tokens_per_second": "x", "step_seconds": [], "event": "stop"}\n',
    "NaN": b'{"iteration": NaN, "event": "start", "train_iters": NaN}\n',
    "a long integer": b'{"iteration": ' + b"9" * 5000 + b"}\n",
    "nested": b'{"iteration": ' + b"[" * 50_000 + b"\n",
    "control characters": b'{"iteration": 7, "event": "\\u001b[2J", "job": "\\u001b[2J\\n7"}\n',
    "a job that is no string": b'{"job": [7]}\n',
    "truncated": b'{"iteration": 8, "lo',
}


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "starts.jsonl"])
@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_hides_neither_its_run_nor_the_others(tmp_path, name, line, capsys):
    add_run(tmp_path, "good")
    with (add_run(tmp_path, "other") / name).open("ab") as file:
        file.write(line)
    lines = show(tmp_path, capsys)
    assert cells(lines, "good")[1:4] == ["7/10", "1.5000", "1,000"]
    assert "7/10" in cells(lines, "other")


def show(runs: Path, capsys) -> list[str]:
    """As `status`, in this process, which saves a start of Python per case."""
    spec = importlib.util.spec_from_file_location("launch_status", ROOT / "launch/status.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    path, argv = sys.path[:], sys.argv
    try:
        sys.modules["launch_status"] = module  # for its dataclass
        spec.loader.exec_module(module)
        module._lines = lambda *command: []
        sys.argv = ["status.py", str(runs)]
        module.main()
    finally:
        sys.path[:], sys.argv = path, argv
        sys.modules.pop("launch_status", None)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    return lines[1:]


def test_a_run_that_cannot_be_read_is_one_line_beside_the_others(tmp_path):
    add_run(tmp_path, "good")
    for name in ("metrics.jsonl", "events.jsonl"):
        damaged = add_run(tmp_path, f"with {name} as a directory") / name
        damaged.unlink()
        damaged.mkdir()
    looped = add_run(tmp_path, "looped")
    (looped / "iter_0000005").symlink_to("iter_0000005")
    (add_run(tmp_path, "tracked") / "latest_checkpointed_iteration.txt").write_text("\u00b3")
    (add_run(tmp_path, "e\x1b[2Jscape")).joinpath("iter_0000004").mkdir()
    lines = status(tmp_path)
    assert len(lines) == 6
    assert all("7/10" in cells(lines, name) for name in ("good", "looped", "tracked"))
    assert "e\\x1b[2Jscape" in "\n".join(lines)


def test_a_run_that_may_not_be_listed_says_so_beside_the_others(tmp_path, capsys, monkeypatch):
    add_run(tmp_path, "good")
    add_run(tmp_path, "closed")

    def refuse(save: Path) -> list[int]:
        if save.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(save))
        return [5]

    monkeypatch.setattr(directory, "list_iterations", refuse)
    (tmp_path / "good/iter_0000005").mkdir()
    lines = show(tmp_path, capsys)
    assert "cannot be read (Permission denied)" in lines[0] and "5, 0 s ago" in lines[1]
