"""Megatron's split files: their syntax, and errors that name line and column."""

import pytest
from token_files import training_flags

from megatron_ft.data.splits import Group, Part, groups_of, parse_line, read_split_file
from megatron_ft.errors import UserError


def simple(groups: list[Group]) -> list:
    return [(g.name, [(p.weight, p.start, p.end, p.prefix) for p in g.parts]) for g in groups]


@pytest.mark.parametrize("text, groups", [
    ('"train: 1.0 0:0.95 /data/x"\n', [("train", [(1.0, 0.0, 0.95, "/data/x")])]),
    ("train: 1.0 0:0.95 /data/x", [("train", [(1.0, 0.0, 0.95, "/data/x")])]),
    ("mix: 1.0 0:0.95 /path/prefix, 0.5 0:1 /path/other:v2\n",
     [("mix", [(1.0, 0.0, 0.95, "/path/prefix"), (0.5, 0.0, 1.0, "/path/other:v2")])]),
    ('"a: 1 0:.5 x" "b:2 0.5:1 y,1 0:1 z"\n# later\n\n  c: 1 0:1 x\r\n',
     [("a", [(1.0, 0.0, 0.5, "x")]), ("b", [(2.0, 0.5, 1.0, "y"), (1.0, 0.0, 1.0, "z")]), ("c", [(1.0, 0.0, 1.0, "x")])]),
])  # fmt: skip
def test_split_files_are_parsed(tmp_path, text, groups):
    path = tmp_path / "split.txt"
    path.write_bytes(text.encode())
    assert simple(read_split_file(path)) == groups


@pytest.mark.parametrize("line, column, message", [
    ("train 1.0 0:0.95 /data/x", 1, "no group name"),
    ("1.0 0.95 x", 1, "no group name"),
    ("train: 1.0 0:0.95", 12, "'1.0 0:0.95' has 2 words"),
    ("train: 1.0 0:0.95 x y z", 21, "'1.0 0:0.95 x y z' has 5 words; expected WEIGHT START:END PREFIX (a prefix cannot contain spaces"),
    ("train: 1.0 0:0.95 x, ", 21, "nothing between the commas"),
    ("train:", 7, "nothing between the commas"),
    ("train: one 0:1 x", 8, "weight 'one' is not a number above 0"),
    ("train: 1 0:1 x, -1 0:1 y", 17, "weight '-1' is not a number above 0"),
    ("train: nan 0:1 x", 8, "weight 'nan'"),
    ("train: 1 0:1.5 x", 10, "range '0:1.5' is not START:END with 0 <= START < END <= 1"),
    ("train: 1 0.5:0.5 x", 10, "range '0.5:0.5'"),
    ("train: 1 0-1 x", 10, "range '0-1'"),
    ("train: 1 0:0.5:1 x", 10, "range '0:0.5:1'"),
    ("train: inf 0:1 x", 8, "weight 'inf'"),
    ("train: 1e400 0:1 x", 8, "weight '1e400'"),
    ("train: 1e308 0:1 x, 1e308 0:1 y", 8, "weight '1e308' is not a number above 0 and at most 1e+12, like 0.5"),
    ("train: 0 0:1 x", 8, "weight '0'"),
    ("train: 1_0 0:1 x", 8, "weight '1_0'"),
    ("train: \u0661 0:1 x", 8, "weight '\u0661'"),
    ("train: 0x1 0:1 x", 8, "weight '0x1'"),
    ("train: " + "9" * 5000 + " 0:1 x", 8, "99 ... 99"),
    ("train: 1 0:1 " + "x" * 5000, 14, "a prefix of 5,000 characters ('xxxx"),
    ("train: 1 nan:1 x", 10, "range 'nan:1'"),
    ("train: 1 0:inf x", 10, "range '0:inf'"),
    ("train: 1 -0.5:1 x", 10, "range '-0.5:1'"),
    ("train: 1 0:1e400 x", 10, "range '0:1e400'"),
    ("train: 1 0:1 a\0b", 15, "the character U+0000 does not belong here"),
    ("t\x1brain: 1 0:1 x", 2, "the character U+001B"),
    ("train: 1 0:1 x\ry: 1 0:1 z", 15, "the character U+000D"),
    ("train: 1 0:1 x\u2028", 15, "the character U+2028"),
    ('train: 1 0:1 a"b', 1, "is outside the quotes, which enclose complete groups"),
    ('train: 1 0:1 "a"', 1, "'train: 1 0:1' is outside the quotes"),
    ('"train: 1 0:1 x', 1, "this quote is not closed"),
    ('"train: 1 0:1 x" valid: 1 0:1 y', 18, "'valid: 1 0:1 y' is outside the quotes"),
    ('"a: 1 0:1 x" "b: 2 0:1"', 20, "'2 0:1' has 2 words"),
])  # fmt: skip
def test_errors_name_the_column(line, column, message):
    with pytest.raises(UserError) as error:
        parse_line(line, "split.txt, line 7")
    assert str(error.value).startswith(f"split.txt, line 7, column {column}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_errors_name_the_line_of_the_file(tmp_path):
    path = tmp_path / "split.txt"
    path.write_text("a: 1 0:1 x\n\n  b: 1 0:2 y\n")
    with pytest.raises(UserError, match="split.txt, line 3, column 8: range '0:2'"):
        read_split_file(path)


@pytest.mark.parametrize("content, message", [
    (b"\n# nothing\n", "no groups"),
    (b"", "no groups"),
    (b"\xff\xfe", "cannot be read as a split file .UTF-16, not UTF-8"),
    (b"train: 1 0:1 caf\xe9", "cannot be read as a split file .not UTF-8 at byte 16"),
    (b"PAR1\xff", "cannot be read as a split file .a Parquet file"),
])  # fmt: skip
def test_files_without_groups_are_refused(tmp_path, content, message):
    path = tmp_path / "split.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_split_file(path)


@pytest.mark.parametrize("path, message", [
    ("/dev/zero", "/dev/zero: more than 16,777,216 bytes, which is not a split file"),
    ("/", "/: cannot be read as a split file .Is a directory"),
    ("/missing", "/missing: cannot be read as a split file .No such file"),
])  # fmt: skip
def test_what_is_not_a_file_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        read_split_file(path)


def test_only_newlines_end_a_line(tmp_path):
    """A form feed or U+2028 does not, so that line numbers are those of an editor."""
    path = tmp_path / "split.txt"
    path.write_bytes("# a\x0cb\u2028c\r\ntrain: 1 0:2 x\r\n".encode())
    with pytest.raises(UserError, match="split.txt, line 2, column 10: range '0:2'"):
        read_split_file(path)


def test_data_prefix_is_divided_into_training_and_validation():
    config = training_flags("--data-prefix", "x", "--validation-fraction", "0.25")
    assert groups_of(config, "train") == [Group("train", (Part(1.0, 0, 0.75, "x", "--data-prefix"),))]
    assert groups_of(config, "valid") == [Group("valid", (Part(1.0, 0.75, 1, "x", "--data-prefix"),))]
    assert groups_of(config, "test") == []
    assert groups_of(training_flags("--data-prefix", "x", "--validation-fraction", "0"), "valid") == []


@pytest.mark.parametrize("fraction, end", [((), 1), (("--validation-fraction", "0.1"), 0.9)])
def test_validation_groups_leave_all_of_data_prefix_to_training_by_default(fraction, end):
    config = training_flags("--data-prefix", "x", "--valid-weighted-split-paths", "own: 1 0:1 y", *fraction)
    assert simple(groups_of(config, "train")) == [("train", [(1.0, 0, end, "x")])]
    assert simple(groups_of(config, "valid")) == [("own", [(1.0, 0.0, 1.0, "y")])]
    assert [n for n in config.notices if "training takes all of --data-prefix" in n] == config.notices[: end == 1]


def test_training_takes_one_group_and_names_differ():
    config = training_flags(
        "--train-weighted-split-paths", "a: 1 0:1 x", "b: 1 0:1 y",
        "--valid-weighted-split-paths", "a: 1 0:1 x", "a: 1 0:1 y",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"training takes one group, found 2 \(a, b\)"):
        groups_of(config, "train")
    with pytest.raises(UserError, match="two valid groups are named 'a'"):
        groups_of(config, "valid")
