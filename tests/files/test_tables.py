"""Tables in JSONL and parquet: equal rows in and out, shards that add up, bad input."""

import json
from collections import Counter

import pyarrow.parquet
import pytest

from megatron_ft.errors import UserError
from megatron_ft.files.tables import TableWriter, open_tables, read_table

ROWS = [{"id": i, "text": f"row {i} é\n" * (i % 7), "tags": ["a"] * (i % 3)} for i in range(5000)]
COLUMNS = {"id": "int64", "text": "string", "tags": "list:string"}


def written(path, rows=ROWS, columns=None):
    with TableWriter(path, columns) as table:
        for row in rows:
            table.write(row)
        table.commit()
    return path


def rows_of(*paths, shard=(1, 1), bad=None):
    return [row.fields for chunk in read_table(open_tables(paths), shard, bad) for row in chunk.rows]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.zst", "t.parquet"])
def test_what_is_written_is_read(tmp_path, name):
    assert rows_of(written(tmp_path / name)) == ROWS
    assert rows_of(written(tmp_path / name, columns=COLUMNS)) == ROWS


def test_shards_of_mixed_files_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ft.files.tables.ROW_GROUP_BYTES", 20_000)
    paths = written(tmp_path / "a.parquet"), written(tmp_path / "b.jsonl"), written(tmp_path / "c.parquet", ROWS[:9])
    assert pyarrow.parquet.ParquetFile(paths[0]).num_row_groups > 5
    expected = [*ROWS, *ROWS, *ROWS[:9]]
    for count in (1, 2, 7, 40):
        assert [row for i in range(count) for row in rows_of(*paths, shard=(i + 1, count))] == expected


def test_a_line_is_written_unchanged(tmp_path):
    line = b'{"b" : 1,  "a":2}\n'
    with TableWriter(tmp_path / "t.jsonl") as table:
        table.write(json.loads(line), line)
        table.write_line(line)
        table.commit()
    assert (tmp_path / "t.jsonl").read_bytes() == line * 2 and table.rows == 2
    with TableWriter(tmp_path / "t.parquet") as table:
        table.write_line(line)
        table.commit()
    assert rows_of(tmp_path / "t.parquet") == [{"b": 1, "a": 2}] and table.rows == 1


def test_bad_rows_are_counted_or_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\nnope\n{"a": 2}\n[1]\n')
    bad: Counter[str] = Counter()
    assert rows_of(path, bad=bad) == [{"a": 1}, {"a": 2}] and bad.total() == 2
    with pytest.raises(UserError, match=r"t.jsonl, line 2: not JSON; .*--skip-bad-rows"):
        rows_of(path)


def test_a_row_says_where_it_stands(tmp_path):
    paths = written(tmp_path / "a.parquet", ROWS[:3]), written(tmp_path / "b.jsonl", ROWS[:3])
    *_, parquet, jsonl = [list(chunk.rows)[-1] for chunk in read_table(open_tables(paths))]
    assert "a.parquet, row 3: no text" in str(parquet.error("no text"))
    assert "b.jsonl, line 3: no text" in str(jsonl.error("no text"))


def test_damaged_parquet_and_unfitting_rows_are_one_line(tmp_path):
    path = written(tmp_path / "t.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="t.parquet: cannot be read"):
        rows_of(path)
    with pytest.raises(UserError, match="do not fit its columns"):
        written(tmp_path / "new.parquet", [{"id": "x", "text": "", "tags": []}], COLUMNS)
    assert not (tmp_path / "new.parquet").exists()


def test_a_table_that_is_not_committed_leaves_nothing(tmp_path):
    for name in ("t.parquet", "t.jsonl"):
        with TableWriter(tmp_path / name) as table:
            table.write({"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_parquet_keeps_keys_that_the_first_row_lacks(tmp_path, monkeypatch):
    rows = [{"a": 1}, {"a": 2, "turns": [{"role": "user", "text": "x" * 100}]}]
    with TableWriter(tmp_path / "t.parquet") as table:
        for row in rows:
            table.write(row)
        table.commit()
    assert rows_of(tmp_path / "t.parquet") == [{"a": 1, "turns": None}, rows[1]]
    monkeypatch.setattr("megatron_ft.files.tables.ROW_GROUP_BYTES", 50)
    with pytest.raises(UserError, match="rows do not fit its columns .new key 'late'.; write .jsonl instead"):
        with TableWriter(tmp_path / "new.parquet") as table:
            table.write(rows[1])  # fills a group
            table.write({"a": 3, "late": "y" * 60})
    assert not (tmp_path / "new.parquet").exists()
