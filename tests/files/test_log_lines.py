"""Log lines: what a crash, a full disk or another program damaged is skipped, the rest is read."""

import pytest

from megatron_ft.files.log_lines import read_lines

GOOD = [{"iteration": 1, "loss": 2.5}, {"iteration": 2, "loss": 2}]
LINES = [b'{"iteration": 1, "loss": 2.5}\n', b'{"iteration": 2, "loss": 2}\n']


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"iteration": 1, "lo',
        b'{"iteration": 1, "lo\n',
        b"\xff\xfe\n",
        b"\0" * 5000 + b"\n",
        b"\n",
        b"null\n",
        b"[1]\n",
        b'"text"\n',
        b"[" * 100_000 + b"\n",
        b"9" * 5000 + b"\n",
        b"x" * (3 << 20) + b"\n",
        b'{"iteration": "1", "loss": 2.0}\n',
        b'{"iteration": true, "loss": 2.0}\n',
        b'{"iteration": 1, "loss": NaN}\n',
        b'{"iteration": 1, "loss": 1%s}\n' % (b"0" * 5000),
        b'{"loss": 2.0}\n',
    ],
    ids=lambda line: repr(line[:40]),
)
def test_damaged_lines_are_skipped(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        LINES[0] + damaged.removesuffix(b"\n") + b"\n" + LINES[1] + (b"" if damaged.endswith(b"\n") else damaged)
    )
    assert read_lines(path, {"iteration": int, "loss": float}) == GOOD


def test_only_the_end_is_read_with_last_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0] * 1000 + LINES[1])
    assert read_lines(path, last_bytes=len(LINES[1]) + 5) == GOOD[1:]
    assert len(read_lines(path, last_bytes=1 << 20)) == 1001


def test_missing_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == [] == read_lines(tmp_path)
