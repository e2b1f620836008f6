"""Reading JSONL: every line once and in order, for any shards and compression, in bounded memory;
files of other kinds are named."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.errors import UserError
from megatron_ft.files import jsonl
from megatron_ft.files.jsonl import open_sources, parse_shard, read_blocks
from megatron_ft.files.jsonl_row import BadRow, parse_row


def lines_of(paths, shard=(1, 1)) -> list[bytes | None]:
    """The lines without their newlines, which all must have."""
    lines = [line for block in read_blocks(open_sources(paths), shard) for line in block.lines]
    assert all(line is None or line.endswith(b"\n") for line in lines)
    return [None if line is None else line[:-1] for line in lines]


# No bytes from which a file of another kind begins.
LINE = st.lists(st.sampled_from(b'ab {}"\r\xc3\xa9'), max_size=30).map(bytes)


@settings(max_examples=80, deadline=None)
@given(
    files=st.lists(st.lists(LINE, max_size=12), min_size=1, max_size=4),
    count=st.integers(1, 9),
    block=st.sampled_from([1, 20, 1 << 20]),
    last_newline=st.booleans(),
)
def test_shards_hold_every_line_once_and_in_order(tmp_path_factory, files, count, block, last_newline):
    directory = tmp_path_factory.mktemp("shards")
    paths = []
    for i, lines in enumerate(files):
        data = b"".join(line + b"\n" for line in lines)
        if lines and lines[-1] and not last_newline:
            data = data[:-1]
        paths.append(directory / f"{i}.jsonl")
        paths[-1].write_bytes(data)
    if not any(files):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK_BYTES", block)
        whole = lines_of(paths)
        assert whole == [line for lines in files for line in lines]
        assert [line for i in range(1, count + 1) for line in lines_of(paths, (i, count))] == whole
        for i in range(1, count + 1):
            for part in read_blocks(open_sources(paths), (i, count)):
                lines = part.source.path.read_bytes().split(b"\n")
                assert [lines[part.line_number(k) - 1] + b"\n" for k in range(len(part.lines))] == part.lines


def test_compressed_files_directories_and_standard_input(tmp_path, monkeypatch):
    data = b"".join(b'{"n": %d}\n' % n for n in range(5000))
    frame = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:777]) + gzip.compress(data[777:]))
    (tmp_path / "c.jsonl.zst").write_bytes(frame(data[:999]) + frame(data[999:]))
    (tmp_path / "notes.txt").write_text("not read")
    expected = data.splitlines()
    assert lines_of([tmp_path]) == expected * 3
    assert [line for i in range(1, 4) for line in lines_of([tmp_path], (i, 3))] == expected * 3
    monkeypatch.setattr(jsonl.sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert lines_of(["-"]) == expected


def test_a_line_over_the_limit_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 16)
    (tmp_path / "a.jsonl").write_bytes(
        b"a\n" + b"x" * 100 + b"\n" + b"y" * 101 + b"\n" + b"z" * 9999 + b"\nb\n" + b"w" * 300
    )
    assert lines_of([tmp_path / "a.jsonl"]) == [b"a", b"x" * 100, None, None, b"b", None]


def test_unreadable_files_report_one_line_errors(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "wrong.jsonl.gz").write_bytes(b"\x1f\x8bplain text\n")
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"a": 1}\n' * 1000)[:-9])
    (tmp_path / "wrong.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfdplain text\n")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    for name in (
        "cut.jsonl.gz",
        "wrong.jsonl.gz",
        "cut.jsonl.zst",
        "wrong.jsonl.zst",
        "empty.jsonl",
        "missing.jsonl",
        "nothing",
        "pipe.jsonl",
    ):
        with pytest.raises(UserError, match=name) as error:
            lines_of([tmp_path / name])
        assert "\n" not in str(error.value)


def test_compression_is_detected_by_content(tmp_path):
    rows = [b'{"n": 1}', b'{"n": 2}']
    plain = b"\n".join(rows)
    (tmp_path / "plain.jsonl.gz").write_bytes(plain)
    (tmp_path / "gzip.jsonl").write_bytes(gzip.compress(plain))
    (tmp_path / "zstd.jsonl.gz").write_bytes(zstandard.ZstdCompressor().compress(plain))
    (tmp_path / "pzstd.jsonl").write_bytes(b"\x50\x2a\x4d\x18\4\0\0\0abcd" + zstandard.ZstdCompressor().compress(plain))
    for path in tmp_path.iterdir():
        assert lines_of([path]) == rows, path


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path, pack):
    path = tmp_path / "a.jsonl"
    path.write_bytes(pack(b'\xef\xbb\xbf{"n": 1}\r\n\n  \r\n{"n": 2}\n\n\n'))
    (block,) = read_blocks(open_sources([path]))
    assert [(block.line_number(i), json.loads(line)) for i, line in block.rows()] == [(1, {"n": 1}), (4, {"n": 2})]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_files_joined_by_cat_keep_no_byte_order_mark(tmp_path, pack):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(pack(mark + b'{"n": 1}\n{"n": 2}\n' + mark + b'{"n": 3}\n' + mark + b"\n"))
    assert lines_of([tmp_path / "a.jsonl"]) == [b'{"n": 1}', b'{"n": 2}', b'{"n": 3}', b""]
    (tmp_path / "b.jsonl").write_bytes(b'{"n": "' + mark + b'"}\n')  # within a line it is text
    assert lines_of([tmp_path / "b.jsonl"]) == [b'{"n": "' + mark + b'"}']


def test_outputs_in_an_input_directory_are_left_out(tmp_path, capsys):
    for name in ("a.jsonl", "b.jsonl", "out.jsonl", "out_rejected.jsonl", "set_made_from.json"):
        (tmp_path / name).write_text('{"n": 1}\n')
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    sources = open_sources([tmp_path], [tmp_path / "out.jsonl", "-"])
    assert [source.path.name for source in sources] == ["a.jsonl", "b.jsonl"]
    printed = capsys.readouterr().err
    assert printed == (
        f"{tmp_path}: reading a.jsonl, b.jsonl; leaving out link.jsonl, out.jsonl, out_rejected.jsonl, set_made_from.json\n"
    )
    assert open_sources([tmp_path / "out_rejected.jsonl"])  # read if named
    for same in ("out.jsonl", "link.jsonl"):
        with pytest.raises(UserError, match="is both input and output"):
            open_sources([tmp_path / "a.jsonl", tmp_path / same], [tmp_path / "out.jsonl"])
    (tmp_path / "only").mkdir()
    (tmp_path / "only/x_rejected.jsonl").write_text("{}")
    with pytest.raises(UserError, match="no JSONL file in this directory but x_rejected.jsonl"):
        open_sources([tmp_path / "only"])


@pytest.mark.parametrize(("head", "found"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    (b"<!DOCTYPE html>\n<html>", "an HTML page"),
    (b"\n  <html lang='en'>", "an HTML page"),
    (b"PAR1\x15\x04", "a Parquet file"),
    (b"ARROW1\0\0", "an Arrow file"),
    (b"\xff\xff\xff\xff\x18\x01\0\0\x10", "an Arrow file"),
    (bz2.compress(b'{"n": 1}\n'), "bunzip2"),
    (bz2.compress(b""), "bunzip2"),
    (lzma.compress(b'{"n": 1}\n'), "unxz"),
    (b"PK\x03\x04\x14\0", "a zip archive"),
    (b"\0\5\26\7\0\2\0\0Mac OS X        ", "macOS metadata"),
])  # fmt: skip
def test_files_of_other_kinds_are_named(tmp_path, head, found):
    (tmp_path / "rows.jsonl").write_bytes(head)
    with pytest.raises(UserError, match=r"rows\.jsonl: ") as error:
        open_sources([tmp_path / "rows.jsonl"])
    assert found in str(error.value) and "\n" not in str(error.value)


def test_defect_of_a_file_keeps_its_own_remedy(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"inputs": "a"}\n' + bytes(4096) + b"\n[1\n")
    (block,) = read_blocks(open_sources([tmp_path / "rows.jsonl"]))
    errors = []
    for i, line in block.rows():
        with pytest.raises(BadRow) as reason:
            parse_row(line, [["inputs"], ["outputs"]])
        errors.append(str(block.error(i, reason.value, "fix the row")))
    assert [error.endswith("; fix the row") for error in errors] == [True, False, True]
    assert errors[1].endswith(
        ", line 2: begins with NUL bytes, as an interrupted copy leaves them; copy the file again"
    )


def test_hidden_files_of_a_directory_are_left_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    for name in ("._a.jsonl", ".b.jsonl"):
        (tmp_path / name).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    assert [source.path.name for source in open_sources([tmp_path])] == ["a.jsonl"]
    assert "leaving out ._a.jsonl, .b.jsonl" in capsys.readouterr().err


def test_names_of_files_cannot_control_the_terminal(tmp_path, capsys):
    (tmp_path / "a\x1b[2J\nerror: no.jsonl").write_text('{"n": 1}\n')
    open_sources([tmp_path])
    assert r"reading a\x1b[2J\nerror: no.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("number, remedy", [
    (errno.EMFILE, "ulimit -n"), (errno.EACCES, "permission"), (errno.EIO, "disk")
])  # fmt: skip
def test_a_failed_system_call_is_not_called_damage(tmp_path, monkeypatch, number, remedy):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    sources = open_sources([tmp_path / "a.jsonl"])

    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", fail)
    for read in (lambda: list(read_blocks(sources)), lambda: open_sources([tmp_path / "a.jsonl"])):
        with pytest.raises(UserError, match=remedy) as error:
            read()
        assert "again" not in str(error.value) or number == errno.EIO


def test_shard_numbers_count_from_one():
    assert parse_shard("3/8") == (3, 8)
    for wrong in ("0/8", "9/8", "3", "a/b", "-1/2", "1/0", ""):
        with pytest.raises(UserError, match="--shard"):
            parse_shard(wrong)
