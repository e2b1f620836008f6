"""Each rule of the filter's presets: what it drops, what it keeps, and the published defects."""

import dataclasses
import json

import pytest
from filter_cases import COMMITPACKFT, EDIT, GOOD, HIDDEN, LICENSE, NEW, OLD, candidate_from, file, subject

from megatron_ft.commits.edit_distance import is_closer_than
from megatron_ft.commits.input_rules import LicenseRule, OptOutRule
from megatron_ft.commits.opt_out import read_owners
from megatron_ft.commits.presets import PRESETS
from megatron_ft.commits.rules import VERBS, Limits, clean_ci_skip, clean_subject, commit_id
from megatron_ft.commits.token_rule import SEPARATOR, TokenRule
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.tokenizer.tokenizer import load_tokenizer

CASES = {"commitpackft": COMMITPACKFT, "edit": EDIT}
# Data and prose are kept whatever the hash of the commit.
ALL_DATA = {name: dataclasses.replace(PRESETS[name].limits, data_fraction=1.0) for name in PRESETS}


def dropped_by(preset: str, limits: Limits | None = None, **changes: str) -> str | None:
    """The name of the preset's rule that drops GOOD with these changes; None if it is kept."""
    table = PRESETS[preset]
    candidate = candidate_from(GOOD | changes)
    limits = limits or table.limits
    return next((rule.name for rule in table.rules if rule.drops(candidate, limits)), None)


def listed(kind: int) -> list:
    return [
        pytest.param(preset, rule, subject(case) if isinstance(case, str) else case, id=f"{preset}-{rule}-{n}")
        for preset, rules in CASES.items()
        for rule, cases in rules.items()
        for n, case in enumerate(cases[kind])
    ]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_rule_has_cases_and_the_good_row_is_kept(preset):
    assert list(CASES[preset]) == [rule.name for rule in PRESETS[preset].rules]
    assert dropped_by(preset) is None


@pytest.mark.parametrize(("preset", "rule", "row"), listed(0))
def test_rule_drops(preset, rule, row):
    assert dropped_by(preset, ALL_DATA[preset], **row) == rule


@pytest.mark.parametrize(("preset", "rule", "row"), listed(1))
def test_rule_keeps(preset, rule, row):
    assert dropped_by(preset, ALL_DATA[preset], **row) is None


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_rule_behind_another_one(name):
    rule = next(rule for rule in PRESETS["commitpackft"].rules if rule.name == name)
    dropped, kept = HIDDEN[name]
    assert [rule.drops(candidate_from(GOOD | subject(text)), Limits()) for text in dropped] == [True] * len(dropped)
    assert [rule.drops(candidate_from(GOOD | subject(text)), Limits()) for text in kept] == [False] * len(kept)


def test_commit_id_is_found_wherever_it_is():
    for start in range(90):
        texts = [f"{'x' * start}{'0' * digits}{'x' * 50}" for digits in (39, 40)]
        assert [commit_id(candidate_from(GOOD | subject(text)), Limits()) for text in texts] == [False, True], start


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  Add  a\tlimit [skip ci] ", "Add a limit"),
        ("[client] Add a limit", "Add a limit"),
        ("[client] wait: Add a limit [minor]", "Add a limit"),
        ("wait: [client] Add a limit", "[client] Add a limit"),
        ("wait: loop: Add a limit", "loop: Add a limit"),
        ("[two words] Add a limit", "[two words] Add a limit"),
        ("[skip ci]", ""),
        ("[a] b: [c]", ""),
    ],
)
def test_cleaning_removes_tags_and_nothing_else(text, cleaned):
    candidate = candidate_from(GOOD | subject(text))
    assert not clean_subject(candidate, Limits())
    assert (candidate.subject, candidate.lower) == (cleaned, cleaned.lower())
    assert candidate.row() == GOOD | subject(cleaned)


def test_ci_skip_is_removed_with_its_blanks():
    candidate = candidate_from(GOOD | subject("Add a [ci skip] limit [ci skip]"))
    assert not clean_ci_skip(candidate, Limits())
    assert candidate.subject == "Add a limit"


# Defects of the published code: the row that it drops, or keeps by chance.
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(file("x.py", "Python"), id="extensions are compared with and without the dot"),
        pytest.param(file("x.rs", "Rust"), id="for nine languages"),
        pytest.param(subject("Plug the leak in the waiting loop"), id="plug is listed with a blank"),
        pytest.param(subject("Make it swipe to the next one"), id="wip is found in words"),
        pytest.param(file(".vimrc.local.vim", "VimL"), id="some dot files pass"),
        pytest.param({**file(".emacs", "Emacs Lisp")}, id="the name before the only dot is empty"),
    ],
)
def test_published_defect_is_fixed(row):
    assert dropped_by("commitpackft", **row) is None


def test_dot_of_a_directory_is_not_an_extension():
    assert dropped_by("commitpackft", **file("v1.0/Makefile", "Makefile")) == "extension"


def test_one_version_bump_in_ten_is_kept_and_always_the_same():
    def kept(seed: int) -> list[int]:
        limits = Limits(seed=seed)
        row = subject("Bump the library to the newest version")
        return [n for n in range(2000) if dropped_by("commitpackft", limits, **row, commit=f"{n:040x}") is None]

    first = kept(1)
    assert 150 < len(first) < 250
    assert kept(1) == first != kept(2)
    for start in ("Bump", "Set version", "Update version"):
        row = subject(f"{start} of the library to the newest")
        for preset in PRESETS:
            assert dropped_by(preset, Limits(mass_update_fraction=0), **row) == "mass_update"
            assert dropped_by(preset, Limits(mass_update_fraction=1), **row) is None


def test_a_quarter_of_data_languages_is_kept():
    row = {**file("a.md", "Markdown")}
    kept = [n for n in range(1000) if dropped_by("edit", **row, commit=f"{n:040x}") is None]
    assert 200 < len(kept) < 300
    assert dropped_by("edit", dataclasses.replace(Limits(), data_fraction=0), **row) == "data_language"


def test_license_header_is_removed_and_an_interpreter_line_stays():
    table = PRESETS["edit"]
    start = "#!/usr/bin/env python\n"
    for header in (
        LICENSE,
        "/* Copyright\n * 2020 */\n\n",
        "<!-- SPDX-License-Identifier: MIT -->\n",
        "// All rights reserved\n// x\n",
    ):
        candidate = candidate_from(
            GOOD | {"old_contents": start + header + OLD, "new_contents": header + NEW, "lang": "Ruby"}
        )
        assert not any(rule.drops(candidate, table.limits) for rule in table.rules)
        assert (candidate.old, candidate.new) == (start + OLD, NEW)
    candidate = candidate_from(GOOD | {"old_contents": "# How to wait\n" + OLD})
    assert not any(rule.drops(candidate, table.limits) for rule in table.rules)
    assert candidate.row() == GOOD | {"old_contents": "# How to wait\n" + OLD}


def test_verbs_are_the_published_257():
    assert len(VERBS) == 257
    assert all(verb == verb.strip().lower() for verb in VERBS)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("a", "", 1), ("abc", "bcd", 2), ("kitten", "sitting", 3), ("x" * 5000, "x" * 4998 + "ay", 2), ("ab" * 6, "ba" * 6, 2)],
)  # fmt: skip
def test_edit_distance(a, b, distance):
    assert [is_closer_than(a, b, limit) for limit in range(6)] == [distance < limit for limit in range(6)]
    assert [is_closer_than(b, a, limit) for limit in range(6)] == [distance < limit for limit in range(6)]


def test_token_rule_counts_pieces_as_the_complete_text(shared_data):
    tokenizer = load_tokenizer(shared_data / "starcoder-tokenizer.json")
    rule = TokenRule(tokenizer)
    code = (shared_data / "oasst-commitpackft.jsonl").read_text(encoding="utf-8")[:60_000].replace("\\n", "\n\n   ")
    for text in (code, "x\n \n\ny = 1\n\n\n" * 900, "\n" * 9000, "word " * 5000, ""):
        assert rule.count(text, 1 << 30) == len(tokenizer.encode(text))


def test_token_rule_keeps_50_to_768_tokens_and_reads_no_further(shared_data):
    tokenizer = load_tokenizer(shared_data / "starcoder-tokenizer.json")
    rule = TokenRule(tokenizer)

    def dropped(words: int) -> bool:
        candidate = candidate_from(GOOD | {"old_contents": "", "new_contents": " word" * words})
        assert len(tokenizer.encode(SEPARATOR + candidate.new)) == words + 1
        return rule(candidate, Limits())

    assert [dropped(words) for words in (48, 49, 767, 768)] == [True, False, False, True]
    assert 768 < rule.count("a line of words\n" * 100_000, 768) < 2000


def test_license_rule_takes_a_missing_license_for_unknown():
    rule = LicenseRule(frozenset({"mit"}))
    assert [
        rule(candidate_from(GOOD | {"license": name}), Limits()) for name in ("mit", "MIT", "gpl-3.0", "unknown", "")
    ] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert not LicenseRule(frozenset({"unknown"}))(
        candidate_from({k: v for k, v in GOOD.items() if k != "license"}), Limits()
    )


def test_opt_out_ignores_case_and_a_fork_keeps_no_row(tmp_path):
    (tmp_path / "owners.txt").write_text("# asked in 2024\nJane-Doe  # twice\n\nacme\n", encoding="utf-8")
    owners = read_owners(tmp_path / "owners.txt")
    assert owners == {"jane-doe", "acme"}
    rule = OptOutRule(owners)
    names = ("jane-doe/x", "fork/x,JANE-DOE/x", "fork/x, acme/y", "fork/x", "jane-doex/x", "fork/acme", "")
    assert [rule(candidate_from(GOOD | {"repos": repos}), Limits()) for repos in names] == [True] * 3 + [False] * 4


@pytest.mark.parametrize("content", [b"jane/repo\n", b"jane doe\n", b"\x80\n"])
def test_opt_out_file_that_lists_no_owners_is_one_error(content, tmp_path):
    (tmp_path / "owners.txt").write_bytes(content)
    with pytest.raises(UserError, match="owners.txt.*expected one"):
        read_owners(tmp_path / "owners.txt")
    with pytest.raises(UserError, match="no such file"):
        read_owners(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"subject": 1}, "'subject' is an integer, not a string"),
        ({"license": ["mit"]}, "'license' is a list, not a string"),
        ({"old_contents": None}, "'old_contents' is null, not a string"),
    ],
)
def test_row_with_a_wrong_type_is_bad(changes, reason):
    with pytest.raises(BadRow, match=reason):
        candidate_from(GOOD | changes)


def test_row_without_a_text_or_with_half_a_surrogate_is_bad():
    with pytest.raises(BadRow, match="no key 'old_file'; the row has 'commit'"):
        candidate_from({"commit": 0})  # before its type
    for name in ("new_contents", "subject", "commit", "lang", "repos"):
        line = json.dumps(GOOD | {name: "\ud800"}).encode()
        with pytest.raises(BadRow, match="lone surrogate"):
            candidate_from(json.loads(line), line)
    candidate_from(GOOD | {"lang": None, "message": "é"})
