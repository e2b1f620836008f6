"""read_json: one object, or one line that names the file, what it holds and what was expected."""

import json
import os

import pytest

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import MAX_DEPTH, optional, read_json, read_small_text, require


def error_of(path, **limits) -> str:
    with pytest.raises(UserError) as error:
        read_json(path, **limits)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "empty, expected JSON"),
    (b" \n", "empty, expected JSON"),
    (b"null", "holds null, expected a JSON object"),
    (b"[]", "holds a list, expected a JSON object"),
    (b'"a"', "holds a string, expected a JSON object"),
    (b"9" * 5000, "holds a number, expected a JSON object"),
    (b"NaN", "holds a number, expected a JSON object"),
    (b"[" * 100_000, "JSON of more than 100 levels"),
    (b'{"a": ' * 100_000, "JSON of more than 100 levels"),
    (b'{"a": ' * 150 + b"1" + b"}" * 150, "JSON of more than 100 levels"),
    (b'{"a": "\xff"}', "not UTF-8 at byte 7, expected JSON"),
    (b'{"a": 1', "JSON that ends too early; if it was copied, copy it again"),
    (b'{"a": "b', "JSON that ends too early; if it was copied, copy it again"),
    (b'{"a": 1}}', "not JSON (line 1, column 9: Extra data)"),
    (b"{'a': 1}", "not JSON (line 1, column 2: Expecting property name enclosed in double quotes)"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file; git lfs pull downloads it"),
    (b"PK\3\4", "a zip archive; unzip extracts it"),
    ('{"a": 1}'.encode("utf-16"), "UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 converts the file"),
    (bytes(100), "begins with NUL bytes, as an interrupted copy leaves them; copy the file again"),
])  # fmt: skip
def test_each_wrong_kind_has_its_reason(tmp_path, content, reason):
    (tmp_path / "config.json").write_bytes(content)
    found = error_of(tmp_path / "config.json")
    assert found == reason


def test_objects_are_read(tmp_path):
    path = tmp_path / "config.json"
    for content in ({}, {"é": [1, 2.5, None, True, "\ud83d"]}):
        path.write_text(json.dumps(content))
        assert read_json(path) == content
    path.write_bytes(b'\xef\xbb\xbf{"a": NaN, "b": %s, "c": -Infinity}' % (b"9" * 5000))
    assert read_json(path)["b"] == float("inf")
    path.write_bytes(b'{"a": ' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH)
    assert json.dumps(read_json(path), indent=1)


def test_what_cannot_be_read_is_named(tmp_path):
    assert error_of(tmp_path / "none.json") == "no such file"
    assert error_of(tmp_path) == "a directory, expected a file"
    os.mkfifo(tmp_path / "pipe.json")
    assert error_of(tmp_path / "pipe.json") == "not a regular file, expected a file"
    (tmp_path / "loop.json").symlink_to("loop.json")
    assert error_of(tmp_path / "loop.json").startswith("cannot be read (Too many levels of symbolic links)")
    assert error_of(tmp_path / ("x" * 300)).startswith("cannot be read (File name too long)")
    (tmp_path / "big.json").write_text(json.dumps({"a": "b" * 1000}))
    assert error_of(tmp_path / "big.json", max_bytes=1000) == "1,009 bytes, expected at most 1,000"
    (tmp_path / "cut.json").write_text("{")
    assert error_of(tmp_path / "cut.json", remedy="tokenize again").endswith("; tokenize again")


GOOD = {"n": 2, "f": 2, "g": 0.5, "t": "x", "b": False, "l": ["a"], "o": {"k": 1}, "null": None}


def test_values_of_the_expected_type_are_returned():
    found = [
        require(GOOD, key, kind, "c")
        for key, kind in zip(GOOD, (int, float, float, str, bool, list, dict), strict=False)
    ]
    assert found == list(GOOD.values())[:-1] and type(found[1]) is float
    assert require(GOOD, "l", list, "c", of=str, low=1) == ["a"] and require(GOOD, "o", dict, "c", of=int) == {"k": 1}
    assert optional(GOOD, "null", int, "c", 7) == optional(GOOD, "none", int, "c", 7) == 7
    assert optional(GOOD, "n", int, "c", None, low=2, high=2) == 2


@pytest.mark.parametrize(("key", "kind", "bounds", "message"), [
    ("none", int, {}, 'no "none", expected an integer'),
    ("null", str, {}, '"null" is null, expected a string'),
    ("b", int, {}, '"b" is false, expected an integer'),
    ("b", float, {}, '"b" is false, expected a finite number'),
    ("n", bool, {}, '"n" is 2, expected true or false'),
    ("n", str, {}, '"n" is 2, expected a string'),
    ("g", int, {}, '"g" is 0.5, expected an integer'),
    ("n", int, {"low": 3}, '"n" is 2, expected an integer, 3 or more'),
    ("n", int, {"high": 1}, '"n" is 2, expected an integer, at most 1'),
    ("n", int, {"low": 3, "high": 9}, '"n" is 2, expected an integer, 3 to 9'),
    ("t", str, {"low": 2}, '"t" is "x", expected a string of 2 or more characters'),
    ("o", list, {}, '"o" is an object, expected a list'),
    ("l", list, {"of": int}, '"l" has "a" at 0, expected a list of integers'),
    ("o", dict, {"of": str}, '"o" has 1 at \'k\', expected an object of strings'),
    ("o", dict, {"low": 2, "high": 3}, '"o" is an object, expected an object of 2 to 3 values'),
])  # fmt: skip
def test_other_values_are_named(key, kind, bounds, message):
    with pytest.raises(UserError) as error:
        require(GOOD, key, kind, "config.json", **bounds)
    assert str(error.value) == f"config.json: {message}"


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 10**400, "x" * 10_000, [0] * 1000],
    ids=["nan", "inf", "10**400", "text", "list"],
)
def test_unusual_numbers_and_long_values_are_refused_in_a_short_line(value):
    with pytest.raises(UserError) as error:
        require({"a": value}, "a", float, "config.json")
    assert len(str(error.value)) < 100


def test_a_list_in_utf_8_is_read_without_its_byte_order_mark_and_nothing_else_is(tmp_path):
    path = tmp_path / "languages.txt"
    path.write_bytes("\N{BOM}Python\n".encode())
    assert read_small_text(path, "one per line") == "Python\n"
    for content, reason in {
        "Python\n".encode("utf-16-le"): "UTF-16, not UTF-8",
        b"<!DOCTYPE html>\n<html>\n": "an HTML page",
        b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer",
        "Café\n".encode("latin-1"): "not UTF-8; expected one per line",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: {reason}"):
            read_small_text(path, "one per line")
