"""Converters never overwrite their input or other files, and write completely or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program

from megatron_ft.errors import UserError
from megatron_ft.files import output as files_output
from megatron_ft.weights import output_directory
from megatron_ft.weights.directory import remove_leftovers
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


KILLED_WHILE_REPLACING = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from megatron_ft.weights import output_directory
if {fallback}:
    output_directory.exchange = lambda a, b: False

def killed(*arguments):
    os._exit(9)

output_directory.{step} = killed
with output_directory.new_directory(Path({out!r}), needed=1, overwrite=True) as directory:
    (directory / "config.json").write_text("new")
    (directory / "model.safetensors").write_text("new")
"""


@pytest.mark.parametrize(("step", "fallback"), [("exchange", False), ("sync_path", False), ("rename_directory", True)])
def test_a_converter_killed_while_replacing_an_output_loses_nothing(tmp_path, step, fallback):
    write(tmp_path / "out", "old")
    script = KILLED_WHILE_REPLACING.format(root=str(ROOT), step=step, fallback=fallback, out=str(tmp_path / "out"))
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert (tmp_path / "out").exists() != fallback
    with pytest.raises(UserError, match="is not empty"):
        write(tmp_path / "out")
    assert set(tree(tmp_path / "out").values()) == {b"old"}
    write(tmp_path / "out", "newer", overwrite=True)
    assert set(tree(tmp_path).values()) == {b"newer"} and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(output_directory, "exchange", lambda a, b: False)
    write(tmp_path / "out", "old")
    write(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out/config.json": b"new", "out/model.safetensors": b"new"}


def test_a_directory_that_another_converter_is_replacing_is_not_restored(tmp_path):
    aside = tmp_path / f"out.replaced-{os.uname().nodename}-01234567/out"
    aside.mkdir(parents=True)
    with files_output.locked_if_abandoned(aside.parent) as abandoned:
        assert abandoned
        write(tmp_path / "out")
    assert aside.is_dir() and set(tree(tmp_path / "out").values()) == {b"new"}


@pytest.mark.parametrize("name", ["x" * 300, "no/access/out"])
def test_a_path_that_cannot_be_written_is_a_usage_error(tmp_path, name):
    (tmp_path / "no").write_text("a file")
    with pytest.raises(UserError, match="nothing was written|is a file"):
        write(tmp_path / name)


def test_a_start_of_training_removes_its_own_leftovers_and_no_work_of_others(tmp_path):
    ours = ["iter_0000300.writing-0123456789ab", "deleting-iter_0000200-4711", "deleting-iter_0000200"]
    others = [
        "iter_0000300.writing-login1-0123abcd", "hf.writing-login1-0123abcd", "iter_0000300", "deleting-me", "deleting-iter_x",
        "iter_0000300.writing-0123456789ab.bak", "notes.writing-0123456789ab", "out.replaced-login1-0123abcd",
    ]  # fmt: skip
    for name in (*ours, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    assert remove_leftovers(tmp_path) == sorted(ours)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


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
