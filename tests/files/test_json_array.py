"""JSON arrays read by element: the values of json.loads, whatever the layout and the chunks."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ft.files.json_array import elements
from megatron_ft.files.jsonl_row import BadRow

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=3), value, max_size=3), max_leaves=8
)  # fmt: skip
VALUES = st.lists(JSON, max_size=5)


def read(text: bytes, chunk_bytes: int = 1 << 20) -> list:
    return list(elements(io.BytesIO(text), chunk_bytes))


@given(values=VALUES, chunk=st.integers(1, 40), indent=st.sampled_from([None, 0, 3]), ascii=st.booleans())
def test_elements_are_those_of_json(values, chunk, indent, ascii):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    assert read(b" \n" + text + b"\r\n\t", chunk) == values
    assert read(b"\xef\xbb\xbf" + text, chunk) == values


def test_a_number_that_is_cut_off_is_not_taken_for_another():
    for text in (b"[7, 10", b"[7, 1", b"[7, 1.", b"[7, 1.5e"):
        array = elements(io.BytesIO(text))
        assert next(array) == 7
        with pytest.raises(BadRow):
            next(array)


@given(values=VALUES.filter(bool), cut=st.integers(1, 200), chunk=st.integers(1, 40))
def test_a_cut_off_array_is_an_error_after_its_intact_elements(values, cut, chunk):
    text = json.dumps(values).encode()
    found = []
    with pytest.raises(BadRow):
        for value in elements(io.BytesIO(text[: max(0, len(text) - cut)]), chunk):
            found.append(value)
    assert found == values[: len(found)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not a JSON array"),
        (b'{"a": 1}', "not a JSON array"),
        (b"[1,]", "element 2 of the JSON array is not JSON"),
        (b"[1 2]", "'2' after element 1"),
        (b"[1] 2", "'2' after the end"),
        (b'[{"a": "x', "cut off at element 1; copy the file again"),
        (b'[{"a": 1}', "cut off at element 1"),
        (b'[{"a": "\xff"}]', "invalid UTF-8"),
        (b"[" * 5000, "nested too deeply|cut off"),
    ],
)
def test_what_is_not_an_array_has_a_reason(text, reason):
    with pytest.raises(BadRow, match=reason):
        read(text, 16)


def test_an_element_is_limited(monkeypatch):
    monkeypatch.setattr("megatron_ft.files.json_array.MAX_LINE_BYTES", 1 << 20)
    assert read(b'[{"a": "' + b"x" * (1 << 19) + b'"}]', 1000)
    with pytest.raises(BadRow, match="element 2 of the JSON array is longer than 1 MiB"):
        read(b'[{"a": 1}, {"a": "' + b"x" * (1 << 23) + b'"}]', 1000)
