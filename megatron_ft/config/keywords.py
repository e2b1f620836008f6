"""Keyword arguments as a command line: how Python calls what the programs call.

    finetune(preset="tiny", train_iters=100, bf16=True, lora_rank=None)

is `--preset tiny --train-iters 100 --bf16`. The names are those of the flags with underscores; True
and False are a switch and its --no-... form, a list several values, and None leaves a flag out.
`config` is a file as for --config, which the others override.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_ft.config.config_file import CONFIG, Setting


def command_line(
    arguments: Mapping[str, Any], known: Mapping[str, argparse.Action], spellings: Mapping[str, str], function: str
) -> list[str]:
    """The words for `arguments`, flags in `known`, of a call of `function`; `spellings` maps former
    names of flags to current ones.

    Raises UserError for a name that is not a flag, or a value of another kind than the flag takes.
    """
    words: list[str] = []
    for name, value in arguments.items():
        if value is None:
            continue
        if name == "config":
            words[:0] = [CONFIG, str(value)]
            continue
        several = isinstance(value, (list, tuple))
        texts = tuple(map(str, value)) if several else (str(value),)
        truth = value if isinstance(value, bool) else None
        setting = Setting(name.replace("_", "-"), texts, several, truth, f"{function}(): {name!r}")
        option = setting.option(known, spellings)
        words += setting.words(option, known[option], known)
    return words
