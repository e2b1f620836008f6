"""Outputs: complete or absent, through links, into FIFOs, compressed by suffix, one writer each."""

import gzip
import os
import signal
import subprocess
import sys
import threading

import pytest
import zstandard
from conftest import ROOT

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.output import OutputFile, scratch_directory


def write(path, content: bytes = b"new") -> None:
    with OutputFile(path) as output:
        output.write(content)
        output.commit()


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/old").write_bytes(b"old")
    for target in ("old", "not-yet"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(f"disk/{target}")
        write(link)
        assert link.is_symlink() and (tmp_path / "disk" / target).read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["disk", "to-not-yet", "to-old"]
    assert sorted(os.listdir(tmp_path / "disk")) == ["not-yet", "old"]


def test_a_fifo_is_written_directly(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "link"):
        writer = threading.Thread(target=write, args=(tmp_path / name,), daemon=True)
        writer.start()
        assert (tmp_path / name).read_bytes() == b"new"
        writer.join(10)
    assert (tmp_path / "fifo").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link"]
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path)


def test_names_of_standard_output(tmp_path):
    for name in ("-", "/dev/stdout"):  # a pipe: no file is created
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from megatron_ft.files.output import OutputFile\n"
        code += f"with OutputFile({name!r}) as o: o.write(b'new'); o.commit()"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
        assert done.stdout == b"new" and not os.listdir(tmp_path)


def test_closed_standard_output_is_one_line(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from megatron_ft.files.output import OutputFile\n"
    code += "from megatron_ft.errors import run_program\nrun_program(lambda: OutputFile('-'))"
    done = subprocess.run(["bash", "-c", 'exec "$@" >&-', "-", sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.startswith(b"error: standard output is closed; redirect it")


def test_the_suffix_selects_the_compression(tmp_path):
    content = b"abc" * 10_000
    for name, read in (
        ("a.gz", gzip.decompress),
        ("a.zst", lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data)),
    ):
        write(tmp_path / name, content)
        first = (tmp_path / name).read_bytes()
        assert len(first) < 1000 and read(first) == content
        write(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == first  # no timestamp
    assert sorted(os.listdir(tmp_path)) == ["a.gz", "a.zst"]


def test_without_a_commit_the_old_file_stays(tmp_path):
    for name in ("a", "a.gz", "a.zst"):
        (tmp_path / name).write_bytes(b"old")
        with pytest.raises(RuntimeError), OutputFile(tmp_path / name) as output:
            output.write(b"half")
            raise RuntimeError
        assert (tmp_path / name).read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a", "a.gz", "a.zst"]


def test_a_second_writer_is_refused_and_does_no_harm(tmp_path):
    with OutputFile(tmp_path / "a") as first:
        first.write(b"first")
        with pytest.raises(UserError, match="another process is writing this file"):
            write(tmp_path / "a")
        first.commit()
        write(tmp_path / "a", b"second")  # after the commit another may write
        with OutputFile(tmp_path / "a") as third:
            third.write(b"third")
            first.__exit__(None, None, None)  # does not remove the third's partial file
            third.commit()
    assert (tmp_path / "a").read_bytes() == b"third" and os.listdir(tmp_path) == ["a"]


def test_scratch_directories_of_killed_processes_are_removed(tmp_path):
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
    code += "from megatron_ft.files.output import scratch_directory\n"
    code += f"with scratch_directory(Path({str(tmp_path)!r}), '.x') as d: print(d.name, flush=True); time.sleep(60)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    dead, living = (process.stdout.readline().strip() for process in processes)
    try:
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        (tmp_path / ".x-another.host-12345678").mkdir()
        (tmp_path / ".other").mkdir()
        assert dead in os.listdir(tmp_path)
        with scratch_directory(tmp_path, ".x") as ours:
            assert sorted(os.listdir(tmp_path)) == sorted([".other", ".x-another.host-12345678", living, ours.name])
        assert not ours.exists()
    finally:
        processes[1].kill()
        processes[1].wait()


@pytest.mark.parametrize("stop, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_program_removes_its_temporary_files(tmp_path, stop, status):
    command = [sys.executable, ROOT / "dataset/dedup_shuffle.py", "-", "--output", tmp_path / "out.jsonl"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b'{"inputs": "a", "outputs": "b"}\n')
    process.stdin.flush()
    while not list(tmp_path.glob(".dedup*/*")):  # a file in the scratch directory, the last to be made
        assert process.poll() is None
    process.send_signal(stop)
    assert process.wait(timeout=120) == status
    assert b"Traceback" not in process.stderr.read() and os.listdir(tmp_path) == []


def test_a_small_file_goes_into_a_pipe_and_does_not_replace_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_file(pipe, b"page")
    assert os.read(reader, 9) == b"page" and pipe.is_fifo()
    os.close(reader)
