"""docs/training.md: its commands run, and its table of the branch's flags is what the program does."""

import re

import pytest
from conftest import ROOT
from doc_commands import run_page

from megatron_ft.config.flags import build_parser
from megatron_ft.config.mtf_flags import ACCEPTED, REFUSED, RENAMED


def known_flags() -> set[str]:
    return {option for action in build_parser()._actions for option in action.option_strings}


def test_the_table_of_branch_flags_is_what_the_program_does():
    rows = re.findall(r"^\| (`--[^|]+) \| (\w+)", (ROOT / "docs/training.md").read_text(), flags=re.MULTILINE)
    treated = {"kept": known_flags(), "renamed": set(RENAMED), "ignored": set(ACCEPTED), "refused": set(REFUSED)}
    told = set()
    for flags, treatment in rows:
        for flag in re.findall(r"`(--[^`]+)`", flags):
            name = flag if flag in ACCEPTED else flag.replace("_", "-")
            assert name in treated[treatment], f"{flag} is not {treatment}"
            told.add(name)
    of_the_branch = (set(ACCEPTED) | set(REFUSED) | set(RENAMED)) - {
        "--deepspeed", "--append-eod", "--finetune-mtf", "--sequence-length"  # not the branch's own
    }  # fmt: skip
    assert of_the_branch <= told


def test_flags_are_of_one_kind():
    kinds = [known_flags(), set(RENAMED), set(ACCEPTED), set(REFUSED)]
    assert sum(len(kind) for kind in kinds) == len(set().union(*kinds))
    assert set(RENAMED.values()) <= known_flags()


@pytest.mark.slow
def test_its_commands_run(tmp_path):
    printed = run_page("training.md", tmp_path)
    assert "done: 6 iterations" in printed
    assert (tmp_path / "run/report.html").exists()
