"""What names and headers of files tell about a run before its ranks start: no torch, at once.

The same checks for `launch/finetune.py`, its --check, launch/submit.py and the scripts in slurm/.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.config.arguments import with_shape
from megatron_ft.config.config import Config
from megatron_ft.config.flag import MEGATRON
from megatron_ft.data.splits import groups_of, prefixes_of
from megatron_ft.errors import UserError
from megatron_ft.launcher.node_check import needed_files
from megatron_ft.metrics.model_facts import model_name
from megatron_ft.model.shape import ModelShape
from megatron_ft.printable import counted
from megatron_ft.training.schedule import FEW_STEPS, few_steps, global_batch_at
from megatron_ft.weights.directory import list_iterations
from megatron_ft.weights.locate import check_readable
from megatron_ft.weights.stored_shape import stored_shape

DATA_COMES = "MEGATRON_FT_DATA_COMES"  # set where an earlier job of a pipeline writes the files
SIZES = {
    "layers": "num_layers", "hidden size": "hidden_size", "attention heads": "num_attention_heads",
    "key/value heads": "num_query_groups", "feed-forward size": "ffn_hidden_size",
    "positions": "max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What was checked, in words, and warnings about it."""

    found: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_start(config: Config, engine: str) -> Checked:
    """Check what a run starts from: its data, their tokenizer, its weights, and whether the data
    are enough.

    Raises UserError for the first that is missing or not the right one.
    """
    counts: dict[str, tuple[int, int]] = {}
    found = ["flags"]
    if os.environ.get(DATA_COMES):
        found.append("the data come from an earlier job")
    else:
        check_files(config)
        counts = count_data(config)
        check_tokenizer(config)
        found += [
            f"{prefix} ({counted(many, 'document')}, {tokens:,} tokens)" for prefix, (many, tokens) in counts.items()
        ]
    load, save = config.checkpoint.load, config.checkpoint.save
    if save is not None and list_iterations(Path(save)):
        found.append(f"the checkpoints in {save}")
    elif load and engine == MEGATRON:  # what other engines start from is theirs to check
        config = check_weights(config, load)
        found.append(f"{load} ({model_name(config.shape)})" if config.shape else load)
    steps, warnings = check_length(config, counts) if counts else ([], [])
    return Checked([*found, *steps], warnings)


def check_files(config: Config) -> None:
    """Raise UserError for the first file that training needs and that does not exist."""
    for path in needed_files(config):
        if not os.path.exists(path):
            raise UserError(f"{path} not found; correct --data-prefix, the split files, --tokenizer-file or --load")


def count_data(config: Config) -> dict[str, tuple[int, int]]:
    """Documents and tokens of each dataset, by prefix. Raises UserError if one is not an index of
    tokens."""
    from megatron_ft.data.indexed import field_paths, stored_counts  # numpy, of which --help has no need

    counts = {}
    for prefix in prefixes_of(config):
        (documents, inputs), (_, targets) = map(stored_counts, field_paths(prefix))
        counts[prefix] = (documents, inputs + targets)
    return counts


def check_tokenizer(config: Config) -> None:
    """Raise UserError for a dataset that is known to be made with another tokenizer."""
    from megatron_ft.data.provenance import path_of, tokenizer_warning

    for prefix in prefixes_of(config):
        if warning := tokenizer_warning(prefix, config.data.tokenizer_file):
            raise UserError(f"{warning}; give its own, or remove {path_of(prefix)} if all ids mean the same")


def check_weights(config: Config, load: str) -> Config:
    """`config` with the shape of the checkpoint to start from, where its files tell it.

    Raises UserError if there is no checkpoint, if it is of a model that is not supported, or of
    another shape than the flags ask for.
    """
    check_readable(load, config.checkpoint.load_iteration)
    stored = stored_shape(load, config.checkpoint.load_iteration)
    if stored and config.shape:
        check_sizes(config.shape, stored, load)
    return with_shape(config, stored) if stored and not config.shape else config


def check_sizes(ours: ModelShape, stored: ModelShape, load: str) -> None:
    """Raise UserError that names the first size in which the flags and the checkpoint differ."""
    for what, name in SIZES.items():
        if getattr(ours, name) != getattr(stored, name):
            raise UserError(
                f"{load}: a model with {getattr(stored, name)} {what}, but the flags (or --preset) ask for "
                f"{getattr(ours, name)}; leave the architecture flags out to take the checkpoint's"
            )


def check_length(config: Config, counts: dict[str, tuple[int, int]]) -> tuple[list[str], list[str]]:
    """The length of training, in words, and warnings; packs the data only where they are few.

    Raises UserError if all epochs together do not fill one batch.
    """
    epochs, length = config.training.train_epochs, config.data.seq_length
    batch = config.training.global_batch_size
    parts = [part for group in groups_of(config, "train") for part in group.parts]
    if config.validation.skip_train or not epochs or not length:
        return [], []
    # Documents that are too long make fewer sequences, the ends of sequences more.
    sequences = math.ceil(sum(counts[part.prefix][1] * (part.end - part.start) for part in parts) / (length + 1))
    if sequences * epochs > 4 * FEW_STEPS * batch:
        return [f"about {sequences * epochs / batch:,.0f} steps"], []
    from megatron_ft.data.packed_dataset import count_sequences

    sequences = count_sequences(config)
    samples, first = math.ceil(sequences * epochs), global_batch_at(config, 0)
    unit = config.training.micro_batch_size * config.parallel.data
    warnings = few_steps(sequences, epochs, batch, unit)
    if samples < first:
        remedy = warnings[0].rpartition("; ")[2]
        raise UserError(
            f"{', '.join(dict.fromkeys(part.prefix for part in parts))}: {counted(sequences, 'packed sequence')} x {epochs:g} "
            f"epochs do not fill one batch of {first}; {remedy}"
        )
    return [counted(math.ceil(samples / batch), "step")], warnings
