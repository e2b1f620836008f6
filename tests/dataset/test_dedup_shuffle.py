"""dataset/dedup_shuffle.py: distinct rows once, in an order set by the seed, in bounded memory."""

import gzip
import importlib.util
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program

DEDUP = "dataset/dedup_shuffle.py"


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    """702 rows: 350 distinct pairs twice over, and two whose texts join to equal bytes."""
    rows: list[dict] = [{"inputs": f"i{n % 50}", "outputs": f"o{n % 70}", "n": n} for n in range(700)]
    rows += [{"inputs": "i", "targets": "10"}, {"inputs": "i1", "targets": "0"}]
    return [json.dumps(row).encode() + b"\n" for row in rows]


def shuffled(directory: Path, lines: list[bytes], *flags) -> tuple[list[bytes], str]:
    """The lines that the program writes for `lines`, and its stderr."""
    (directory / "rows.jsonl").write_bytes(b"".join(lines))
    done = run_program(DEDUP, directory / "rows.jsonl", "--output", directory / "out.jsonl", *flags)
    assert {file.name for file in directory.iterdir()} == {"rows.jsonl", "out.jsonl"}
    return (directory / "out.jsonl").read_bytes().splitlines(keepends=True), done.stderr


def test_first_of_equal_rows_is_kept_unchanged_in_random_order(lines, tmp_path):
    out, stderr = shuffled(tmp_path, lines)
    assert sorted(out) == sorted(lines[:350] + lines[700:])
    assert "702 rows, 350 of them duplicates, 352 -> " in stderr
    in_place = sum(row["n"] == i for i, row in enumerate(map(json.loads, out)) if "n" in row)
    assert in_place < 10


def test_order_is_independent_of_input_order_and_files(lines, tmp_path):
    distinct = lines[:350] + lines[700:]
    out, _ = shuffled(tmp_path, distinct)
    reordered = distinct.copy()
    random.Random(1).shuffle(reordered)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jsonl.gz").write_bytes(gzip.compress(b"".join(reordered[:100])))
    (tmp_path / "in/2.jsonl").write_bytes(b"".join(reordered[100:]))
    again = run_program(DEDUP, tmp_path / "in", "--output", "-")
    assert again.stdout.encode() == b"".join(out)


def test_seed_changes_the_order_only(lines, tmp_path):
    out, _ = shuffled(tmp_path, lines)
    other, _ = shuffled(tmp_path, lines, "--seed", 2)
    assert other != out and sorted(other) == sorted(out)


def test_memory_is_bounded_while_rows_spill(tmp_path):
    """40 MB of rows in 1 MiB of memory: files are distributed again and again."""
    rng = random.Random(3)
    with open(tmp_path / "rows.jsonl", "w", encoding="utf-8") as file:
        for n in range(40_000):
            row = {"inputs": f"{n % 30_000}", "outputs": f"{n % 30_000}" + "x" * rng.randint(900, 1000)}
            file.write(json.dumps(row) + "\n")
    probe = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peaks = {}
    for memory in (1, 512):
        flags = ["--output", tmp_path / f"{memory}.jsonl", "--memory", memory, "--temporary-directory", tmp_path]
        command = [sys.executable, "-c", probe, ROOT / DEDUP, tmp_path / "rows.jsonl", *flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        peaks[memory] = int(done.stdout.split("PEAK ")[1])
    rows = (tmp_path / "1.jsonl").read_bytes()
    assert rows == (tmp_path / "512.jsonl").read_bytes()
    keys = [json.loads(line)["inputs"] for line in rows.splitlines()]
    assert len(set(keys)) == 30_000 and len(keys) >= 30_000
    assert peaks[1] < 45_000  # KiB, of which the interpreter with our imports takes 25,000


@pytest.mark.parametrize(("files", "message"), [(256, ""), (40, "raise the limit with ulimit -n")])
def test_few_open_files_suffice(lines, tmp_path, files, message):
    expected, _ = shuffled(tmp_path, lines)
    command = [sys.executable, ROOT / DEDUP, tmp_path / "rows.jsonl", "--output", "-"]
    limit = f"ulimit -n {files}; exec " + shlex.join(map(str, command))
    done = subprocess.run(["bash", "-c", limit], capture_output=True, text=True)
    if message:
        assert message in one_error_line(done)
    else:
        assert done.stdout.encode() == b"".join(expected)


def test_order_is_independent_of_memory(tmp_path):
    program = load_program()
    # Keys that begin with two zero bytes share a file, and one of the next level.
    rows = [(b"\0\0" + program.key_of([str(n % 400), "x"], 7)[2:], b"%d" % n) for n in range(1000)]
    orders = []
    for memory in (1 << 30, 2000):
        buckets = program.Buckets(tmp_path / str(memory), depth=0)
        for key, line in rows:
            buckets.add(key, line)
        orders.append(list(buckets.in_order(memory, program.Progress("write", None))))
    assert orders[0] == orders[1] and sorted(map(int, orders[0])) == list(range(400))


def load_program():
    """The program as a module, without the change it makes to sys.path."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("dedup_shuffle", ROOT / DEDUP)
    assert spec and spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    sys.path[:] = path
    return program


def test_bad_row_stops_with_its_line_and_leaves_no_output(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"inputs": "a", "outputs": "b"}\n{"inputs": "a"}\n')
    done = run_program(DEDUP, tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl", ok=False)
    assert "rows.jsonl, line 2: no key 'outputs' or 'targets'" in one_error_line(done)
    assert {file.name for file in tmp_path.iterdir()} == {"rows.jsonl"}


def test_skip_bad_rows_skips_and_counts_them(tmp_path):
    out, stderr = shuffled(tmp_path, [b'{"inputs": "a", "outputs": "b"}\n', b'{"inputs": "a"}\n'], "--skip-bad-rows")
    assert out == [b'{"inputs": "a", "outputs": "b"}\n'] and "1 bad row skipped" in stderr
