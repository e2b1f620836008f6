"""Rows: a malformed line is a bad row with a reason; in a valid one other keys do not matter."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.files.jsonl_row import BadRow, parse_object, parse_row

KEYS = [["inputs"], ["outputs", "targets"]]
CSV = "pandas.read_csv(FILE).to_json(OUT, orient='records', lines=True) converts CSV"


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda a, b, c: a + b + c,
            st.sampled_from([b'{"inputs": "', b'{"inputs": "x", "outputs": "', b"[", b'{"inputs":']),
            st.binary(max_size=30),
            st.sampled_from([b'"}', b"}", b""]),
        ),
        st.recursive(
            st.none() | st.floats() | st.text(),
            lambda c: st.lists(c) | st.dictionaries(st.sampled_from(["inputs", "outputs", "targets", "x"]), c),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_line_is_a_row_of_texts_or_a_bad_row(line):
    try:
        inputs, outputs = parse_row(line, KEYS)
    except BadRow as reason:
        assert str(reason) and "\n" not in str(reason)
        return
    assert inputs.encode() and outputs.encode()  # strings, not empty, no lone surrogate
    row = json.loads(line.decode())
    assert (inputs, outputs) == (row["inputs"], row.get("outputs", row.get("targets")))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "empty line"),
        (b"  \r", "empty line"),
        (b'{"inputs', "incomplete JSON, cut off or continued on the next line"),
        (b'{"inputs": "a", "outputs"', "incomplete JSON, cut off or continued on the next line"),
        (b"{", "JSON over several lines; jq -c . writes one object per line"),
        (b"[", "JSON over several lines; jq -c '.[]' writes one object per line"),
        (b"[" * 100_000, "incomplete JSON, cut off or continued on the next line"),
        (b"[" * 100_000 + b"}" * 100_000, "not JSON"),
        (b"[1]", "a JSON array, not an object; jq -c '.[]' writes one object per line"),
        (b"1", "an integer, not a JSON object"),
        (b'{"inputs": "a"}', "no key 'outputs' or 'targets'; the row has 'inputs'"),
        (b'{"prompt": "a", "completion": "b"}', "no key 'inputs'; the row has 'prompt', 'completion'"),
        (
            b"{%s}" % b", ".join(b'"k%d": 0' % n for n in range(9)),
            "no key 'inputs'; the row has " + ", ".join(f"'k{n}'" for n in range(8)) + ", ...",
        ),
        (b"{}", "no key 'inputs'; the row has no keys"),
        ('{"inputs": "a"}'.encode("utf-16"), "UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 converts the file"),
        ('{"inputs": "a"}'.encode("utf-16-be"), "UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 converts the file"),
        (b'{"inputs": 1, "outputs": "a"}', "'inputs' is an integer, not a string"),
        (b'{"inputs": "a", "outputs": null}', "'outputs' is null, not a string"),
        (b'{"inputs": "a", "targets": ""}', "'targets' is empty"),
        (b'{"inputs": "\xff", "outputs": "a"}', "invalid UTF-8"),
        (b'{"inputs": "\xed\xa0\x80", "outputs": "a"}', "invalid UTF-8"),
        (b'{"inputs": "a", "outputs": "x\\ud800"}', "lone surrogate"),
        (None, "longer than 64 MiB"),
        (b'{"inputs": ["a"], "outputs": "b"}', "'inputs' is a list, not a string"),
        (b'{"inputs": "a", "outputs": true}', "'outputs' is true or false, not a string"),
        (b'{"inputs": %s, "outputs": "b"}' % (b"9" * 5000), "'inputs' is a number, not a string"),
        (b'{"inputs": "a", "outputs": {"b": {}}}', "'outputs' is an object, not a string"),
        (b'{"n": 1}{"n": 2}', "more than one JSON object on the line; jq -c . writes one object per line"),
        (b'{"n": 1} {"n": 2}', "more than one JSON object on the line; jq -c . writes one object per line"),
        (b'{"n": 1}\r{"n": 2}\r', r"lines end in CR only; tr '\r' '\n' converts the file"),
        (b'{"n": 1},', "JSON over several lines; jq -c '.[]' writes one object per line"),
        (b'{"n": 1} # one', "not JSON"),
        (b"{'n': 1}", "a Python dictionary, not JSON; json.dumps writes JSON"),
        (
            b'{"n": "a\tb"}',
            "a control character in a string that is not escaped, such as a tab; json.dumps writes it as an escape",
        ),
        (b"inputs,outputs", "text, not JSON; " + CSV),
        (b"a\tb", "text, not JSON; " + CSV),
        (b"hello", "not JSON"),
        (b"\0" * 30, "begins with NUL bytes, as an interrupted copy leaves them; copy the file again"),
        (b'{"n": 1}' + b"\0" * 30, "holds NUL bytes, as an interrupted copy leaves them; copy the file again"),
        (b"\xff\xfe\0\0{\0\0\0", "UTF-32, not UTF-8; iconv -f UTF-32 -t UTF-8 converts the file"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not the file; git lfs pull downloads it"),
    ],
)
@pytest.mark.parametrize("newline", [b"", b"\n"], ids=["", "newline"])
def test_each_defect_has_its_reason(line, reason, newline):
    line = line and line + newline
    with pytest.raises(BadRow) as error:
        parse_row(line, KEYS)
    assert str(error.value) == reason


def test_escaped_surrogate_pairs_are_accepted():
    assert parse_row(b'{"inputs": "\\ud83d\\ude00", "targets": "b", "outputs": "c"}', KEYS) == ["\U0001f600", "c"]


def nested(depth: int, inner: bytes = b"") -> bytes:
    """Lists and objects in turn, around `inner`."""
    return b'[{"k": ' * depth + (inner or b"[]") + b"}, 1]" * depth


@pytest.mark.parametrize(
    "value",
    [
        b"9" * 5000,
        b"-" + b"9" * 100_000,
        b"1e999",
        b"NaN",
        nested(20),
        nested(2000),
        nested(50_000),
        nested(2000, b"9" * 5000),
    ],
    ids=["5000 digits", "100000 digits", "1e999", "NaN", "40 levels", "4000 levels", "100000 levels", "both"],
)
def test_values_of_other_keys_do_not_matter(value):
    for line in (
        b'{"x": %s, "inputs": "a", "outputs": "b"}' % value,
        b'{"inputs": "a", "outputs": "b", "x": %s}' % value,
    ):
        assert parse_row(line, KEYS) == ["a", "b"]


@pytest.mark.parametrize("inner", [b"nul", b"1 2", b'"\\x"', b"[1,]", b"{1: 2}", b"}", b"]", b"[", b'"'])
def test_malformed_json_is_a_bad_row_at_any_depth(inner):
    for depth in (1, 99, 100, 101, 2000):
        line = b'{"inputs": "a", "outputs": "b", "x": %s}' % nested(depth, inner)
        with pytest.raises(BadRow):
            parse_row(line, KEYS)


def test_time_is_linear_for_brackets_and_quotes():
    started = time.process_time()
    for line in (b"[" * 2000 + b'"' + b'\\"' * (1 << 20), b"[" * (1 << 20), b"[" * 2000 + b'"[' * (1 << 19)):
        with pytest.raises(BadRow):
            parse_row(line, KEYS)
    assert time.process_time() - started < 20  # far more than linear time takes, far less than quadratic


@pytest.mark.parametrize("value", ["18446744073709551616", "-9223372036854775809", "1e300", "[0.5, [{}]]"])
def test_large_integers_are_not_rounded(value):
    line = f'{{"a": "b", "n": [{{"m": 1.5, "k": {value}}}]}}'
    assert parse_object(line.encode()) == json.loads(line)
    assert repr(parse_object(line.encode())) == repr(json.loads(line))
