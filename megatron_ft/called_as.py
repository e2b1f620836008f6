"""Programs by the names their user calls them: `megatron-ft verify` for convert/verify.py.

A file's name with hyphens is its command: preprocess/train_tokenizer.py is `train-tokenizer`. The
programs of dataset/ and evaluation/, and the converters, are the commands of a group: `dataset
near-dedup`, `evaluate score`, `convert megatron-to-hf`.
"""

import os
import re

NAME = "megatron-ft"
GROUPS = {"dataset": "dataset", "evaluation": "evaluate"}  # by folder
CONVERTERS = ("megatron_to_hf", "hf_to_megatron", "reshard")
# In the order of a project: rows, tokens, training, what comes after.
FOLDERS = ("dataset", "preprocess", "launch", "convert", "evaluation")
# Parts of other programs, which people do not call.
INTERNAL = {"dataset/row_shards.py", "launch/preflight.py", "launch/rank.py"}
# How the user called this program, where that was not by its file: `megatron-ft tokenize`.
CALLED_AS = os.environ.pop("MEGATRON_FT_CALLED_AS", None)
_PROGRAM = re.compile(rf"(?<![\w/.])(?:python )?((?:{'|'.join(FOLDERS)})/(?:\w+/)*\w+\.py)\b")


def words_of(program: str) -> tuple[str, ...]:
    """The words after `megatron-ft` for a program's file.

    >>> words_of("preprocess/tokenize.py"), words_of("dataset/commitpackft/near_dedup.py")
    (('tokenize',), ('dataset', 'near-dedup'))
    """
    folder, _, name = program.partition("/")
    stem = name.rpartition("/")[2].removesuffix(".py")
    group = ("convert",) if stem in CONVERTERS else (GROUPS[folder],) if folder in GROUPS else ()
    return (*group, stem.replace("_", "-"))


def as_called(text: str, called_as: str | None = CALLED_AS) -> str:
    """The text with programs named as the user calls them.

    >>> as_called("check it: python convert/verify.py A B", "megatron-ft convert reshard")
    'check it: megatron-ft verify A B'
    >>> as_called("see launch/plan.py", None)
    'see launch/plan.py'
    """
    if called_as is None:
        return text
    return _PROGRAM.sub(lambda m: m[0] if m[1] in INTERNAL else " ".join([NAME, *words_of(m[1])]), text)
