"""dataset/dedup_shuffle.py: every distinct row once, in an order that only the seed decides, in bounded memory."""

import gzip
import json
import random
import subprocess
import sys

from conftest import ROOT, one_error_line, run_program

DEDUP = "dataset/dedup_shuffle.py"


def test_duplicates_go_and_the_order_is_the_seeds_alone(tmp_path):
    rows = [
        {"inputs": f"i{n % 50}", "outputs": f"o{n % 70}", "n": n} for n in range(700)
    ]  # 350 distinct pairs, each twice
    rows += [{"inputs": "i", "targets": "10"}, {"inputs": "i1", "targets": "0"}]  # the same bytes, divided otherwise
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    run_program(DEDUP, tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl")
    out = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    assert sorted(out) == sorted(lines[:350] + lines[700:])  # the first of each, unchanged
    moved = sum(row["n"] == i for i, row in enumerate(map(json.loads, out)) if "n" in row)
    assert moved < 10  # shuffled

    rest = lines[350:]
    random.Random(1).shuffle(rest)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:350])))
    (tmp_path / "in/2.jsonl").write_bytes(b"".join(rest))
    again = run_program(DEDUP, tmp_path / "in", "--output", "-")
    assert again.stdout.encode() == b"".join(out)
    other = run_program(DEDUP, tmp_path / "in", "--output", "-", "--seed", 2)
    assert other.stdout.encode() != b"".join(out) and sorted(other.stdout.encode().splitlines(True)) == sorted(out)
    assert "702 rows, 350 of them duplicates, 352 -> -" in again.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "out.jsonl", "in"}


def test_memory_stays_bounded_while_rows_spill(tmp_path):
    """40 MB of rows with 1 MiB for them: files are divided again and again, and the process grows by a few MiB only."""
    rng = random.Random(3)
    with open(tmp_path / "a.jsonl", "w") as file:
        for n in range(40_000):
            file.write(
                json.dumps({"inputs": f"{n % 30_000}", "outputs": f"{n % 30_000}" + "x" * rng.randint(900, 1000)})
                + "\n"
            )
    probe = "import runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    probe += "finally: print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    peaks = {}
    for memory in (1, 512):
        out = tmp_path / f"{memory}.jsonl"
        command = [
            ROOT / DEDUP,
            tmp_path / "a.jsonl",
            "--output",
            out,
            "--memory",
            memory,
            "--temporary-directory",
            tmp_path,
        ]
        done = subprocess.run(
            [sys.executable, "-c", probe, *map(str, command)], capture_output=True, text=True, check=True
        )
        peaks[memory] = int(done.stdout.split("PEAK ")[1])
    rows = (tmp_path / "1.jsonl").read_bytes()
    assert rows == (tmp_path / "512.jsonl").read_bytes()
    keys = [json.loads(line)["inputs"] for line in rows.splitlines()]
    assert len(set(keys)) == 30_000 and len(keys) >= 30_000
    assert peaks[1] < 45_000  # KiB; the rows alone are 40 MB, an idle interpreter with our imports is 25


def test_files_divided_again_give_the_same_order(tmp_path, monkeypatch):
    import importlib.util

    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("dedup_shuffle", ROOT / DEDUP)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    sys.path[:] = path  # the program put its own first
    rows = [(program.key_of([str(n % 400), "x"], 7), b"%d" % n) for n in range(1000)]
    orders = []
    for memory in (1 << 30, 2000):
        buckets = program.Buckets(tmp_path / str(memory), depth=0)
        for key, line in [
            (b"\0\0" + key[2:], line) for key, line in rows
        ]:  # all in one file, and in one of the next level
            buckets.add(key, line)
        orders.append(list(buckets.in_order(memory, program.Progress("write", None))))
    assert orders[0] == orders[1] and sorted(map(int, orders[0])) == list(range(400))


def test_bad_rows_stop_or_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"inputs": "a", "outputs": "b"}\n{"inputs": "a"}\n')
    done = run_program(DEDUP, tmp_path / "a.jsonl", "--output", tmp_path / "o.jsonl", ok=False)
    assert "a.jsonl, line 2: no key 'outputs' or 'targets'" in one_error_line(done)
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl"}
    done = run_program(DEDUP, tmp_path / "a.jsonl", "--output", tmp_path / "o.jsonl", "--skip-bad-rows")
    assert (
        "1 bad rows left out" in done.stderr
        and (tmp_path / "o.jsonl").read_text() == '{"inputs": "a", "outputs": "b"}\n'
    )
