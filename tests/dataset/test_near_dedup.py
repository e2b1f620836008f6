"""dataset/commitpackft/near_dedup.py: a row that is nearly equal to one that stays goes."""

import functools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_error_line, run_program
from hypothesis import given
from hypothesis import strategies as st

from megatron_ft.commits import minhash

pytest.importorskip("duckdb", reason="needs the extra dataset")
pytest.importorskip("rensa", reason="needs the extra dataset")

NEAR_DEDUP = "dataset/commitpackft/near_dedup.py"
WORD = re.compile(r"[A-Za-z0-9_\x80-\U0010ffff]+")
THRESHOLD = 0.85


def reference_shingles(text: str) -> set[tuple[str, ...]]:
    """All 5 consecutive words, or all of fewer."""
    words = WORD.findall(text)
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def text_of(row: dict) -> str:
    return "\n".join([row["old_contents"], row["new_contents"], row["subject"]])


@functools.cache
def shingles_of(text: str) -> frozenset[tuple[str, ...]]:
    return frozenset(reference_shingles(text))


def similarity(a: dict, b: dict) -> float:
    first, second = shingles_of(text_of(a)), shingles_of(text_of(b))
    return len(first & second) / len(first | second)


class Maker:
    """Commit rows of random lines with random ids."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def words(self, count: int) -> list[str]:
        return [
            self.random.choice(["get", "set", "read", "open", "close", "find"]) + f"_{self.random.randrange(500)}"
            for _ in range(count)
        ]

    def row(self, old: list[str], new: list[str], subject: str | None = None) -> dict:
        lines = ["\n    ".join(" ".join(words[i : i + 6]) for i in range(0, len(words), 6)) for words in (old, new)]
        return {
            "commit": f"{self.random.getrandbits(160):040x}",
            "old_contents": lines[0],
            "new_contents": lines[1],
            "subject": subject or " ".join(self.words(5)),
        }

    def edited(self, words: list[str], fraction: float) -> list[str]:
        """The words with one hunk of them replaced, `fraction` of all."""
        count = round(fraction * len(words))
        start = self.random.randrange(len(words) - count)
        return [*words[:start], *self.words(count), *words[start + count :]]

    def pair(self, fraction: float) -> tuple[dict, dict]:
        """A row, and the row with that fraction of both contents edited."""
        old = self.words(300)
        new = self.edited(old, 0.03)
        first = self.row(old, new)
        return first, self.row(self.edited(old, fraction), self.edited(new, fraction), first["subject"])


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def deduplicated(directory: Path, rows: list[dict], *flags) -> tuple[list[dict], dict]:
    """The rows that stay, and the report."""
    path = write_rows(directory / "rows.jsonl", rows)
    run_program(NEAR_DEDUP, "--input", path, "--output", directory / "out.jsonl", *flags)
    assert {file.name for file in directory.iterdir()} == {"rows.jsonl", "out.jsonl", "out_report.json"}
    return read_rows(directory / "out.jsonl"), json.loads((directory / "out_report.json").read_text())


@pytest.fixture(scope="module")
def planted() -> tuple[list[dict], list[tuple[dict, dict]]]:
    """Rows in random order, and the near-duplicates among them: 1% to 5% of the words edited."""
    maker = Maker(1)
    pairs = [maker.pair(fraction / 100) for fraction in (1, 2, 3, 4, 5) for _ in range(20)]
    others = [maker.pair(fraction) for fraction in (0.15, 0.2, 0.4) for _ in range(10)]
    rows = [row for pair in [*pairs, *others] for row in pair]
    maker.random.shuffle(rows)
    return rows, pairs


def test_planted_near_duplicates_are_removed_and_nothing_else(planted, tmp_path):
    rows, pairs = planted
    kept, report = deduplicated(tmp_path, rows)
    ids = {row["commit"] for row in kept}
    assert [row for row in rows if row["commit"] in ids] == kept  # as they were, in order
    found = sum(len({first["commit"], second["commit"]} & ids) == 1 for first, second in pairs)
    assert found >= 0.95 * len(pairs)
    similar = [pair for pair in pairs if similarity(*pair) >= THRESHOLD]
    assert len(similar) > 0.9 * len(pairs)
    assert [
        max(pair, key=lambda row: row["commit"]) for pair in similar if {row["commit"] for row in pair} <= ids
    ] == []
    for row in rows:
        if row["commit"] not in ids:
            assert any(other["commit"] < row["commit"] and similarity(row, other) >= THRESHOLD for other in kept)
    assert report["removed"] == report["near_duplicates"] == len(rows) - len(kept) == report["clusters"]
    assert report["rows"] == len(rows) and report["cluster_sizes"] == {"2": report["clusters"]}
    assert all(THRESHOLD <= sample["similarity"] <= 1 and sample["kept"] in ids for sample in report["samples"])


def test_result_does_not_depend_on_the_order_of_rows_and_files(planted, tmp_path):
    rows, _ = planted
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    expected, _ = deduplicated(tmp_path / "a", rows)
    shuffled = rows.copy()
    random.Random(2).shuffle(shuffled)
    write_rows(tmp_path / "b/1.jsonl", shuffled[:100])
    write_rows(tmp_path / "b/2.jsonl", shuffled[100:])
    run_program(NEAR_DEDUP, "--input", tmp_path / "b", "--output", tmp_path / "out.parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    kept = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    ids = {row["commit"] for row in expected}
    assert kept == [row for row in shuffled if row["commit"] in ids]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_three_steps_by_shards_give_the_bytes_of_one_run(planted, tmp_path, suffix):
    rows, _ = planted
    rows = [*rows, *rows[:30]]
    (tmp_path / "one").mkdir()
    _, expected = deduplicated(tmp_path / "one", rows)
    data = tmp_path / "one/rows.jsonl"
    signatures = [tmp_path / f"{i}.{suffix}" for i in (1, 2, 3)]
    for i, path in enumerate(signatures, 1):
        run_program(NEAR_DEDUP, "--input", data, "--step", "signatures", "--shard", f"{i}/3", "--output", path)
    gone = tmp_path / f"gone.{suffix}"
    run_program(NEAR_DEDUP, "--input", data, "--step", "join", "--signatures", *signatures, "--output", gone)
    apply = [NEAR_DEDUP, "--input", data, "--step", "apply", "--removed", gone, "--output"]
    run_program(*apply, tmp_path / "all.jsonl")
    for i in (1, 2, 3):
        run_program(*apply, tmp_path / f"part-{i}.jsonl", "--shard", f"{i}/3")
    whole = (tmp_path / "one/out.jsonl").read_bytes()
    assert (tmp_path / "all.jsonl").read_bytes() == whole
    assert b"".join((tmp_path / f"part-{i}.jsonl").read_bytes() for i in (1, 2, 3)) == whole
    reports = [json.loads((tmp_path / f"part-{i}_report.json").read_text()) for i in (1, 2, 3)]
    assert sum(report["removed"] for report in reports) == expected["removed"]
    joined = json.loads((tmp_path / "gone_report.json").read_text())
    assert joined.items() >= {name: expected[name] for name in ("rows", "copies", "clusters", "samples")}.items()
    error = one_error_line(run_program(*apply, tmp_path / "no.jsonl", "--shard", "1/2", ok=False))
    assert "--shard 1/2" in error and "3 shards" in error and not (tmp_path / "no.jsonl").exists()


def test_steps_of_data_without_duplicates_keep_all(tmp_path):
    rows, gone, kept = (tmp_path / f"{name}.jsonl" for name in ("rows", "gone", "kept"))
    maker = Maker(1)
    rows.write_text(
        "".join(json.dumps(maker.row(maker.words(60), maker.words(60))) + "\n" for _ in range(20)), encoding="utf-8"
    )
    run_program(NEAR_DEDUP, "--input", rows, "--step", "signatures", "--output", tmp_path / "signatures.parquet")
    run_program(
        NEAR_DEDUP, "--input", rows, "--step", "join", "--signatures", tmp_path / "signatures.parquet", "--output", gone
    )
    run_program(NEAR_DEDUP, "--input", rows, "--step", "apply", "--removed", gone, "--output", kept)
    assert gone.read_bytes() == b"" and kept.read_bytes() == rows.read_bytes()


def test_copies_go_at_any_size_and_the_smallest_id_stays(tmp_path):
    texts = [
        {"old_contents": "", "new_contents": "", "subject": ""},
        {"old_contents": "a", "new_contents": "b", "subject": "c"},
    ]
    rows = [{"commit": f"{n:040x}", **text} for n in (7, 3, 5) for text in texts]
    rows.append({"commit": "0" * 40, "old_contents": "b", "new_contents": "a", "subject": "c"})
    kept, report = deduplicated(tmp_path, rows)
    assert kept == rows[2:4] + rows[-1:]
    assert (report["copies"], report["near_duplicates"], report["cluster_sizes"]) == (4, 0, {"3": 2})


def test_versions_that_have_drifted_apart_stay(tmp_path):
    """Each version is similar to the next one; a row goes only for one that stays."""
    maker = Maker(3)
    words = maker.words(400)
    versions = []
    for number in range(12):
        versions.append({**maker.row(words, words, "change"), "commit": f"{number:040x}"})
        words = [*words[: 25 * number], *maker.words(25), *words[25 * (number + 1) :]]
    assert all(similarity(a, b) >= THRESHOLD for a, b in zip(versions, versions[1:], strict=False))
    kept, report = deduplicated(tmp_path, versions)
    assert kept[0] == versions[0] and 3 < len(kept) < len(versions)
    for row in versions:
        assert row in kept or any(similarity(row, other) >= THRESHOLD for other in kept)
    assert not any(similarity(a, b) >= THRESHOLD for a in kept for b in kept if a != b)


def test_large_cluster_takes_one_comparison_per_row(tmp_path):
    maker = Maker(4)
    words = maker.words(300)
    rows = [maker.row(words, maker.edited(words, 0.01), "change") for _ in range(400)]
    kept, report = deduplicated(tmp_path, rows)
    assert kept == [min(rows, key=lambda row: row["commit"])]
    assert report["cluster_sizes"] == {"400": 1} and report["compared_pairs"] < 3 * len(rows)


def test_other_fields_and_rows_without_ids(planted, tmp_path):
    rows = [{"inputs": row["old_contents"], "outputs": row["new_contents"]} for row in planted[0]]
    kept, _ = deduplicated(tmp_path, rows, "--fields", "inputs", "outputs")
    assert 150 < len(kept) < 170
    again, _ = deduplicated(tmp_path, rows[::-1], "--fields", "inputs", "outputs")
    assert again == kept[::-1]


def test_bad_rows_are_errors_or_skipped_and_counted(planted, tmp_path):
    rows = planted[0][:20]
    with_bad = [rows[0], {"commit": "1", "subject": "s"}, *rows[1:], {**rows[0], "subject": None}]
    path = write_rows(tmp_path / "rows.jsonl", with_bad)
    error = one_error_line(run_program(NEAR_DEDUP, "--input", path, "--output", tmp_path / "out.jsonl", ok=False))
    assert f"{path}, line 2: no key 'old_contents'" in error and "--fields" in error
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    kept, report = deduplicated(tmp_path, with_bad, "--skip-bad-rows")
    assert report["rows"] == 20 and sum(report["bad_rows"].values()) == 2


def test_steps_of_different_inputs_are_errors(planted, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", planted[0][:50])
    fewer = write_rows(tmp_path / "fewer.jsonl", planted[0][:49])
    signatures, gone, out = (tmp_path / name for name in ("signatures.jsonl", "gone.jsonl", "out.jsonl"))
    run_program(NEAR_DEDUP, "--input", data, "--step", "signatures", "--output", signatures)
    join = [NEAR_DEDUP, "--step", "join", "--signatures", signatures, "--output", gone, "--input"]
    assert "49 rows, but there are signatures of 50" in one_error_line(run_program(*join, fewer, ok=False))
    assert "made by " in one_error_line(run_program(*join, data, "--fields", "subject", ok=False))
    assert not gone.exists()
    run_program(*join, data)
    apply = [NEAR_DEDUP, "--step", "apply", "--output", out, "--input", fewer, "--removed"]
    assert "49 rows, but" in one_error_line(run_program(*apply, gone, ok=False))
    assert "not the report of --step join" in one_error_line(run_program(*apply, signatures, ok=False))
    assert "gone_report.json" in one_error_line(run_program(*apply, tmp_path / "x/gone.jsonl", ok=False))
    wrong = [NEAR_DEDUP, "--input", data, "--step", "join", "--signatures", fewer, "--output", gone]
    assert "line 1: not a signature: no 'id'" in one_error_line(run_program(*wrong, ok=False))
    assert not out.exists() and not list(tmp_path.glob(".near_dedup*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "0.2"], "--threshold 0.2: must be from 0.5 to 1"),
        (["--memory", "1"], "--memory 1: must be at least 64 MiB"),
        (["--shard", "1/2"], "--shard is for --step signatures"),
        (["--step", "join"], "--signatures belongs to --step join"),
        (["--removed", "x"], "--removed belongs to --step apply"),
        (["--input", "-"], "--input -: the rows are read more than once"),
    ],
)
def test_wrong_flags_are_errors(tmp_path, flags, message):
    data = write_rows(tmp_path / "rows.jsonl", [{"commit": "1"}])
    done = run_program(NEAR_DEDUP, "--input", data, "--output", tmp_path / "out.jsonl", *flags, ok=False)
    assert message in one_error_line(done) and done.returncode == 2


def test_an_id_may_hold_a_lone_surrogate(tmp_path):
    row = '{"commit": "%s", "old_contents": "a", "new_contents": "b", "subject": "c"}\n'
    (tmp_path / "in.jsonl").write_text(row % "\\ud800" + row % "1")
    run_program(NEAR_DEDUP, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == row % "1"


def test_no_step_overwrites_its_input(tmp_path):
    rows = write_rows(tmp_path / "in.jsonl", [Maker(1).row(["a"], ["b"])])
    signatures, gone = tmp_path / "signatures.parquet", tmp_path / "gone.jsonl"
    run_program(NEAR_DEDUP, "--input", rows, "--step", "signatures", "--output", signatures)
    run_program(NEAR_DEDUP, "--input", rows, "--step", "join", "--signatures", signatures, "--output", gone)
    for flags in (["join", "--signatures", signatures], ["apply", "--removed", gone]):
        before = flags[-1].read_bytes()
        done = run_program(NEAR_DEDUP, "--input", rows, "--step", *flags, "--output", flags[-1], ok=False)
        assert "is both input and output" in one_error_line(done) and flags[-1].read_bytes() == before


def test_memory_does_not_grow_with_the_data(tmp_path):
    """4 and 16 MB of rows, all of them candidates."""
    maker, peaks = Maker(5), []
    probe = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    for pairs in (500, 2000):
        path = write_rows(tmp_path / "rows.jsonl", (row for _ in range(pairs) for row in maker.pair(0.02)))
        flags = ["--input", path, "--output", tmp_path / "out.jsonl", "--memory", "64"]
        command = [sys.executable, "-c", probe, ROOT / NEAR_DEDUP, *flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split("PEAK ")[1]) / 1024)
    assert peaks[1] < peaks[0] + 60 and peaks[1] < 500, peaks


@given(st.lists(st.text(alphabet="ab_ .\n\u00e9\u4e2d", max_size=40), max_size=12), st.integers(4, 60))
def test_shingles_are_those_of_the_texts_whatever_the_block(texts, block):
    hashes, offsets = minhash.shingles(texts)
    found = [hashes[start:stop].tolist() for start, stop in zip(offsets, offsets[1:], strict=False)]
    expected = [reference_shingles(text) for text in texts]
    assert [len(set(row)) for row in found] == [len(row) for row in expected]
    for row, reference in zip(found, expected, strict=True):
        for other, other_reference in zip(found, expected, strict=True):
            assert len(set(row) & set(other)) == len(reference & other_reference)
    assert [bool(row) for row in minhash.bands(texts)] == [bool(row) for row in expected]


def test_long_text_is_hashed_in_blocks(monkeypatch):
    text = "\n".join(" ".join(Maker(6).words(7)) for _ in range(50))
    hashes, offsets = minhash.shingles([text, "", text])
    monkeypatch.setattr(minhash, "BLOCK_BYTES", 200)
    in_blocks, same_offsets = minhash.shingles([text, "", text])
    assert hashes.tolist() == in_blocks.tolist() and offsets.tolist() == same_offsets.tolist()


def test_jaccard_of_sets():
    a, b = np.array([1, 2, 3, 4], np.uint64), np.array([3, 4, 5], np.uint64)
    assert minhash.jaccard(a, b) == 2 / 5 and minhash.jaccard(a, a) == 1 and minhash.jaccard(a, a[:0]) == 0
