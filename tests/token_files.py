"""Small tokenized datasets for tests, and the flags that read them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ft.config.arguments import parse_args
from megatron_ft.config.config import Config
from megatron_ft.data.indexed import IndexedWriter, commit, field_paths


def write_documents(
    prefix: str | Path, documents: Sequence[tuple[Sequence[int], Sequence[int]]], dtype=np.uint16
) -> str:
    """A dataset of (input tokens, target tokens) documents; returns its prefix."""
    with (
        IndexedWriter(field_paths(prefix)[0], np.dtype(dtype)) as inputs,
        IndexedWriter(field_paths(prefix)[1], np.dtype(dtype)) as targets,
    ):
        for source, target in documents:
            inputs.add(source)
            targets.add(target)
        commit([inputs, targets])
    return str(prefix)


def numbered_documents(lengths: Sequence[tuple[int, int]], first: int = 0) -> list[tuple[list[int], list[int]]]:
    """Documents of these (input, target) lengths; every token of document i is first + i."""
    return [([first + i] * a, [first + i] * b) for i, (a, b) in enumerate(lengths)]


def training_flags(*flags: str | Path, seq_length: int = 32, world_size: int = 1) -> Config:
    """Flags as the training program parses them."""
    return parse_args(
        ["--preset", "tiny", "--tokenizer-file", __file__, "--train-iters", "1", "--seq-length", str(seq_length)]
        + [str(flag) for flag in flags],
        world_size,
    )
