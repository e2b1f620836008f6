"""Presets of the filter: tables of rules in the order they are applied, and their thresholds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_ft.commits import edit_rules as edit
from megatron_ft.commits import rules
from megatron_ft.commits.candidate import Candidate
from megatron_ft.commits.rules import Limits

Predicate = Callable[[Candidate, Limits], bool]


class Rule(NamedTuple):
    """`drops(row, limits)` is True for a row that is to be dropped."""

    name: str
    drops: Predicate


@dataclass(frozen=True)
class Preset:
    """Cheap rules; those that need a tokenizer or other inputs come after them."""

    rules: tuple[Rule, ...]
    limits: Limits = field(default_factory=Limits)
    secrets: str = "off"  # default of --secrets


# CommitPackFT's rules; rules on the cleaned subject have names of their own where they come twice.
COMMITPACKFT = (
    Rule("old_too_long", rules.old_too_long),
    Rule("new_empty", rules.new_empty),
    Rule("unchanged", rules.unchanged),
    Rule("hash_sign", rules.hash_sign),
    Rule("extension", rules.extension),
    Rule("file_name_in_subject", rules.file_name_in_subject),
    Rule("subject_length", rules.subject_length),
    Rule("clean_subject", rules.clean_subject),
    Rule("clean_subject_length", rules.subject_length),
    Rule("not_capitalized", rules.not_capitalized),
    Rule("no_verb", rules.no_verb),
    Rule("noise", rules.noise),
    Rule("noise_phrase", rules.noise_phrase),
    Rule("version_or_hash", rules.version_or_hash),
    Rule("cherry_pick", rules.cherry_pick),
    Rule("commit_id", rules.commit_id),
    Rule("clean_ci_skip", rules.clean_ci_skip),
    Rule("mass_update", rules.mass_update),
    Rule("first_person", rules.first_person),
    Rule("thanks", rules.thanks),
    Rule("code_review", rules.code_review),
    Rule("joke", rules.joke),
    Rule("ticket", rules.ticket),
    Rule("work_in_progress", rules.work_in_progress),
    Rule("url", rules.url),
    Rule("leetcode", rules.leetcode),
    Rule("few_words", rules.few_words),
)
# Commits whose message is an instruction and whose change follows from it, of any style.
EDIT = (
    Rule("old_too_long", rules.old_too_long),
    Rule("merge_or_revert", edit.merge_or_revert),
    Rule("bot", edit.bot),
    Rule("clean_subject", rules.clean_subject),
    Rule("clean_ci_skip", rules.clean_ci_skip),
    Rule("subject_length", rules.subject_length),
    Rule("noise_phrase", rules.noise_phrase),
    Rule("version_or_hash", rules.version_or_hash),
    Rule("commit_id", rules.commit_id),
    Rule("mass_update", rules.mass_update),
    Rule("work_in_progress", rules.work_in_progress),
    Rule("url", rules.url),
    Rule("data_language", edit.data_language),
    Rule("data_size", edit.data_size),
    Rule("strip_license_header", edit.strip_license_header),
    Rule("blank_file", edit.blank_file),
    Rule("unchanged", rules.unchanged),
    Rule("todo", edit.todo),
    Rule("few_letters", edit.few_letters),
    Rule("html_markup", edit.html_markup),
    Rule("changed_lines", edit.changed_lines),
    Rule("edit_distance", edit.edit_distance),
    Rule("does_not_parse", edit.does_not_parse),
)
PRESETS = {
    "commitpackft": Preset(COMMITPACKFT),
    "edit": Preset(EDIT, Limits(min_subject_words=3, max_tokens=4096), secrets="mask"),
}
