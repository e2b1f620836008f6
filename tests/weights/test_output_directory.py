"""Converters never overwrite their input or other files, and write completely or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program

from megatron_ft.errors import UserError
from megatron_ft.weights.output_directory import new_directory


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(path: Path, content: str = "new", **kwargs) -> None:
    with new_directory(path, needed=1, **kwargs) as directory:
        (directory / "config.json").write_text(content)
        (directory / "model.safetensors").write_text(content)


def megatron(path: Path, *others: str) -> Path:
    """A directory as a converter to Megatron writes it, and other files."""
    (path / "iter_0000010").mkdir(parents=True)
    for name in ("iter_0000010/weights", "latest_checkpointed_iteration.txt", *others):
        (path / name).write_text("old")
    return path


@pytest.mark.parametrize("output", ["run", "run/../run", "link", ".", "run/iter_0000010"])
def test_the_input_is_never_replaced(tmp_path, output):
    run = megatron(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="contains the input"):
        write(tmp_path / output, sources=[None, run / "iter_0000010"], overwrite=True)
    assert tree(tmp_path) == before


def test_converters_refuse_to_replace_their_input(tmp_path):
    from conversions import tiny_hf

    hf = tiny_hf(tmp_path / "hf")
    run_program("convert/hf_to_megatron.py", "--load", hf, "--save", tmp_path / "run", "--format", "legacy")
    before = tree(tmp_path)
    for program, source, flag, *flags in (
        ("hf_to_megatron", "hf", "--save", "--format", "legacy"),
        ("reshard", "run", "--save", "--tensor-parallel", "2"),
        ("megatron_to_hf", "run", "--output"),
    ):
        for output in (tmp_path / source, tmp_path):
            command = [f"convert/{program}.py", "--load", tmp_path / source, flag, output, *flags, "--overwrite"]
            assert "contains the input" in one_error_line(run_program(*command, ok=False))
            assert tree(tmp_path) == before


@pytest.mark.parametrize("names, refused", [
    (["config.json", "model.safetensors"], None),
    (["config.json", "pytorch_model.bin", "README.md"], None),
    (["adapter_config.json", "adapter_model.safetensors"], None),
    (["latest_checkpointed_iteration.txt", "release/x"], None),
    (["latest_checkpointed_iteration.txt", "iter_0000005/x", "iter_0000010/x"], None),
    (["config.json"], "contains config.json, so no converter wrote it"),
    (["thesis.tex", "latest_checkpointed_iteration.txt", "release/x"], "contains thesis.tex"),
    (["latest_checkpointed_iteration.txt", "iter_0000005/x", "metrics.jsonl"], "contains metrics.jsonl"),  # one of our runs
    (["latest_checkpointed_iteration.txt", "iter_0000005/x", ".owner.json"], "is a training run's save directory"),
    (["config.json", "model.safetensors", ".owner.json"], "is a training run's save directory"),
])  # fmt: skip
def test_overwrite_replaces_only_what_a_converter_wrote(tmp_path, names, refused):
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        write(out)
    if refused:
        with pytest.raises(UserError, match=refused):
            write(out, overwrite=True)
        assert tree(tmp_path) == before
    else:
        write(out, overwrite=True)
        assert tree(tmp_path) == {"out/config.json": b"new", "out/model.safetensors": b"new"}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_keeps_the_existing_directory(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out", needed=1, overwrite=True) as directory:
        (directory / "config.json").write_text("half")
        raise RuntimeError
    assert tree(tmp_path) == {"out/config.json": b"old", "out/model.safetensors": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    for target in ("disk/out", "disk/later"):  # an empty directory, and one that does not exist yet
        link = tmp_path / target.replace("/", "-")
        link.symlink_to(tmp_path / target)
    (tmp_path / "disk/out").mkdir()
    for name in ("out", "later"):
        write(tmp_path / f"disk-{name}")
        write(tmp_path / f"disk-{name}", "newer", overwrite=True)
        assert (tmp_path / f"disk-{name}").is_symlink()
        assert (tmp_path / f"disk/{name}/config.json").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "disk-later", "disk-out"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["later", "out"]


def test_the_next_start_removes_the_scratch_of_a_killed_process_but_not_of_a_running_one(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from megatron_ft.weights.output_directory import new_directory
with new_directory(Path({str(tmp_path / "out")!r}), needed=1) as directory:
    print(directory.name, flush=True)
    time.sleep(60)
"""
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, running = (process.stdout.readline().strip() for process in processes)
    try:
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].wait()
        (tmp_path / "out.writing-another-host-1").mkdir()
        assert killed in os.listdir(tmp_path)
        write(tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == sorted(["out", "out.writing-another-host-1", running])
    finally:
        processes[1].kill()
        processes[1].wait()
