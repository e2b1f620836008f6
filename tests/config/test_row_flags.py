"""The flags that programs from rows to rows have in common."""

import pytest

from megatron_ft.config.parser import Parser
from megatron_ft.config.row_flags import add_row_flags
from megatron_ft.errors import UserError


def test_shards_are_pairs_and_one_by_default():
    parser = Parser()
    add_row_flags(parser, "rows")
    words = ["--input", "a", "b", "--output", "c"]
    args = parser.parse_args(words)
    assert (args.input, args.output, args.shard, args.skip_bad_rows) == (["a", "b"], "c", (1, 1), False)
    assert parser.parse_args([*words, "--shard", "3/8"]).shard == (3, 8)
    for wrong in ("9/3", "0/3", "1", "x"):
        with pytest.raises(UserError, match=f"argument --shard: {wrong}: expected I/N with I from 1 to N"):
            parser.parse_args([*words, "--shard", wrong])
