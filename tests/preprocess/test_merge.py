"""preprocess/merge.py: parts become the dataset of a single run; unfit parts are refused."""

import json
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from tokenize_runs import token_bytes, tokenize, write_rows_and_tokenizer

from megatron_ft.data.provenance import Provenance, join
from megatron_ft.errors import UserError

MERGE = "preprocess/merge.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows_and_tokenizer(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parts(data, tmp_path_factory) -> Path:
    """A directory with `single`, a single run; its shards `part-1`, `-2` and `-10`; and others.

    `again` is shard 2 again, `bare` shard 2 without end-of-text, `other` shard 2 of another
    tokenizer.
    """
    directory = tmp_path_factory.mktemp("parts")
    tokenize(data, directory / "single")
    for shard, number in enumerate((1, 2, 10), 1):
        tokenize(data, directory / f"part-{number}", "--shard", f"{shard}/3")
    (directory / "part-2_packing").mkdir()
    (directory / "part-2_rejected.jsonl").write_text("{}\n")
    tokenize(data, directory / "again", "--shard", "2/3")
    tokenize(data, directory / "bare", "--shard", "2/3", "--no-append-eod")
    spec = json.loads((data / "t.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:-1]  # other ids, the same vocabulary
    (directory / "u.json").write_text(json.dumps(spec))
    tokenize(data, directory / "other", "--tokenizer-file", directory / "u.json", "--shard", "2/3")
    return directory


def merge(parts: Path, *names: str, output: Path) -> list[bytes]:
    run_program(MERGE, *(parts / name for name in names), "--output-prefix", output)
    return token_bytes(output)


def test_shards_in_a_shells_order_become_the_bytes_of_a_single_run(parts, tmp_path):
    assert merge(parts, "part-1", "part-10", "part-2", output=tmp_path / "merged") == token_bytes(parts / "single")


def test_parts_may_be_named_by_all_their_files(parts, tmp_path):
    files = sorted(path.name for path in parts.glob("part-*"))
    assert {"part-2_packing", "part-2_rejected.jsonl"} <= set(files)
    assert merge(parts, *files, output=tmp_path / "merged") == token_bytes(parts / "single")


def test_provenance_of_all_shards_is_that_of_a_single_run(data, parts, tmp_path):
    merge(parts, "part-1", "part-2", "part-10", output=tmp_path / "merged")
    prefixes = (tmp_path / "merged", parts / "single")
    merged, single = (json.loads(Path(f"{prefix}_made_from.json").read_text(encoding="utf-8")) for prefix in prefixes)
    assert merged == single and merged["shard"] == [1, 1] and merged["append_eod"] is True
    assert merged["inputs"] == [["rows.jsonl", (data / "rows.jsonl").stat().st_size]]


def test_provenance_of_parts_with_the_same_keys_keeps_them(data, parts, tmp_path):
    assert Provenance.read(parts / "part-1").keys == (("inputs",), ("outputs", "targets"))
    merge(parts, "part-1", "part-2", "part-10", output=tmp_path / "merged")
    assert Provenance.read(tmp_path / "merged").keys == (("inputs",), ("outputs", "targets"))


@pytest.mark.parametrize(
    "names, message",
    [
        (["part-1", "part-10"], "shard 2 of 3 of rows.jsonl is missing"),
        (["part-1", "part-1", "part-2", "part-10"], "a part is named twice"),
        (["part-1", "part-2", "part-10", "again"], "are both shard 2/3 of rows.jsonl"),
        (["part-1", "bare", "part-10"], "different --append-eod"),
        (["part-1", "other", "part-10"], "made with different tokenizers (t.json, sha256 "),
        (["missing", "missing2"], "missing_inputs_document.idx"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, tmp_path, names, message):
    command = (MERGE, *(parts / name for name in names), "--output-prefix", tmp_path / "merged")
    assert message in one_error_line(run_program(*command, ok=False))
    assert not list(tmp_path.iterdir())


def test_output_that_is_a_part_is_refused(parts):
    before = token_bytes(parts / "part-1")
    command = (MERGE, parts / "part-1", parts / "part-2", "--output-prefix", parts / "part-1")
    assert "part-1 is one of the parts" in one_error_line(run_program(*command, ok=False))
    assert token_bytes(parts / "part-1") == before


def copy_of(prefix: Path, to: Path) -> None:
    for path in prefix.parent.glob(f"{prefix.name}_*document*"):
        (to.parent / path.name.replace(prefix.name, to.name)).write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{", "JSON that ends too early"),
        ("[" * 100_000, "JSON of more than 100 levels"),
        ("null", "holds null, expected a JSON object"),
        ({"version": True}, '"version" is true, expected an integer'),
        ({"shard": [1, 2**40]}, '"shard" is [1, 1099511627776], expected [I, N] with 1 <= I <= N <= 1000000'),
        ({"shard": [3, 2]}, '"shard" is [3, 2]'),
        ({"shard": [0, 2]}, '"shard" is [0, 2]'),
        ({"shard": [-1, -1]}, '"shard" is [-1, -1]'),
        ({"shard": [1.0, 2]}, '"shard" has 1.0 at 0, expected a list of integers of 2 to 2 values'),
        ({"shard": [1]}, '"shard" is a list'),
        ({"shard": "12"}, '"shard" is "12"'),
        ({"inputs": "ab"}, '"inputs" is "ab", expected a list'),
        ({"inputs": [["a", -1]]}, '"inputs" has a list that is not a name and a size in bytes'),
        ({"inputs": [["a", "1"]]}, '"inputs" has a list that is not'),
        ({"inputs": [[["a"], 1]]}, '"inputs" has a list that is not'),
        ({"inputs": [None]}, '"inputs" has null that is not'),
        ({"sha256": 5}, '"sha256" is 5, expected a string of 64 to 64 characters'),
        ({"sha256": "00"}, '"sha256" is "00"'),
        ({"tokenizer": {}}, '"tokenizer" is an object, expected a string'),
        ({"append_eod": 1}, '"append_eod" is 1, expected true or false'),
        ({"literal_special_tokens": [1, None]}, '"literal_special_tokens" has 1 at 0'),
        ({"keys": [["a"], [1]]}, '"keys" has a name that is not a string'),
        ({"flags": {"--seed": 7}}, '"flags" has a value that is not a string'),
        ({"keys": "ab"}, '"keys" is "ab"'),
    ],
    ids=str,
)
def test_damaged_provenance_is_refused(parts, tmp_path, change, reason):
    made_from = parts / "part-2_made_from.json"
    content = change if isinstance(change, str) else json.dumps(json.loads(made_from.read_text()) | change)
    (tmp_path / "damaged_made_from.json").write_text(content)
    with pytest.raises(UserError) as error:
        Provenance.read(tmp_path / "damaged")
    remedy = "tokenize this dataset again, or remove the file"
    assert str(error.value).startswith(f"{tmp_path}/damaged_made_from.json: damaged ({reason}")
    assert str(error.value).endswith(remedy) and "\n" not in str(error.value)


def test_merge_reports_damaged_provenance(parts, tmp_path):
    copy_of(parts / "part-2", tmp_path / "damaged")
    (tmp_path / "damaged_made_from.json").write_text("{")
    command = (MERGE, parts / "part-1", tmp_path / "damaged", "--output-prefix", tmp_path / "merged")
    assert "damaged_made_from.json: damaged" in one_error_line(run_program(*command, ok=False))


def test_unreadable_provenance_is_not_called_damaged(tmp_path):
    path = tmp_path / "set_made_from.json"
    path.mkdir()
    with pytest.raises(UserError, match="a directory, expected a file"):
        Provenance.read(tmp_path / "set")


def made(shard: tuple[int, int], size: int = 100, keys=None) -> Provenance:
    return Provenance("t.json", "0" * 64, True, (), shard, (("rows.jsonl", size),), keys)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"a": made((1, 10**6))},
            "shard 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... of 1000000 of rows.jsonl is missing; tokenize it",
        ),
        (
            {"a": made((1, 2)), "b": made((2, 2), 120)},
            "shard 2 of 2 of rows.jsonl is missing (b was made from rows.jsonl of 120 bytes, expected rows.jsonl of 100 bytes)",
        ),
        (
            {"a": made((1, 2), keys=(("x",),)), "b": made((2, 2), keys=(("y",),))},
            'shard 2 of 2 of rows.jsonl is missing (b was made from the keys [["y"]] of each row, expected [["x"]])',
        ),
    ],
    ids=["many", "other rows", "other keys"],
)
def test_missing_shards_are_named_with_what_is_in_their_place(parts, message):
    with pytest.raises(UserError) as error:
        join(parts)
    assert str(error.value).startswith(message)


def test_parts_of_unknown_provenance_are_merged_without_one(parts, tmp_path):
    copy_of(parts / "other", tmp_path / "unknown")
    run_program(MERGE, parts / "part-1", tmp_path / "unknown", "--output-prefix", tmp_path / "merged")
    assert not (tmp_path / "merged_made_from.json").exists()


def test_parts_of_standard_input_are_never_duplicates(data, tmp_path):
    """Standard input has no name to compare; it may be different rows each time."""
    for i in (1, 2):
        with open(data / "rows.jsonl", "rb") as rows:
            tokenize(data, tmp_path / f"in-{i}", rows=Path("-"), stdin=rows)
    merge(tmp_path, "in-1", "in-2", output=tmp_path / "merged")
    assert (tmp_path / "merged_made_from.json").exists()


def test_rejected_rows_are_those_of_a_single_run(data, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"inputs": "a", "outputs": "b"}\n{\n{"inputs": "a"}\n{"inputs": "a", "outputs": "b"}\n[]\n')
    tokenize(data, tmp_path / "single", "--skip-bad-rows", rows=rows)
    for i in (1, 2):
        tokenize(data, tmp_path / f"part-{i}", "--skip-bad-rows", "--shard", f"{i}/2", rows=rows)
    assert merge(tmp_path, "part-1", "part-2", output=tmp_path / "merged") == token_bytes(tmp_path / "single")
    merged, single = (tmp_path / f"{name}_rejected.jsonl" for name in ("merged", "single"))
    assert merged.read_bytes() == single.read_bytes() and len(single.read_text().splitlines()) == 3
