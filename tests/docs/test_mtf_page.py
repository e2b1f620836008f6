"""The flag table of docs/mtf.md matches the parser."""

import re

from conftest import ROOT

from megatron_ft.config.command_line import build_parser, former_spellings
from megatron_ft.config.mtf_flags import ACCEPTED, REFUSED

NOT_IN_BRANCH = {"--validation-share", "--deepspeed", "--append-eod", "--finetune-mtf", "--sequence-length"}


def known_flags() -> set[str]:
    return set(build_parser().actions)


def test_flag_table_matches_the_parser():
    page = (ROOT / "docs/mtf.md").read_text()
    rows = re.findall(r"^\| (`--[^|]+) \| (\w+)", page, flags=re.MULTILINE)
    flags_of_status = {
        "kept": known_flags(),
        "renamed": set(former_spellings()),
        "ignored": set(ACCEPTED),
        "refused": set(REFUSED),
    }
    documented = set()
    for flags, status in rows:
        for flag in re.findall(r"`(--[^`]+)`", flags):
            name = flag if flag in ACCEPTED else flag.replace("_", "-")
            assert name in flags_of_status[status], f"{flag} is not {status}"
            documented.add(name)
    assert (set(ACCEPTED) | set(REFUSED) | set(former_spellings())) - NOT_IN_BRANCH <= documented


def test_every_flag_has_one_status():
    kinds = [known_flags(), set(former_spellings()), set(ACCEPTED), set(REFUSED)]
    assert sum(len(kind) for kind in kinds) == len(set().union(*kinds))
    assert set(former_spellings().values()) <= known_flags()
