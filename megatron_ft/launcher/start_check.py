"""What names and headers of files tell about a run before its ranks start: no torch, at once."""

import os
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.files.first_bytes import describe
from megatron_ft.launcher.node_check import needed_files
from megatron_ft.model.shape import ModelShape
from megatron_ft.weights.directory import list_iterations
from megatron_ft.weights.hf_config import shape_in_config
from megatron_ft.weights.locate import check_readable

DATA_COMES = "MEGATRON_FT_DATA_COMES"  # set where an earlier job of a pipeline writes the files
SIZES = {
    "layers": "num_layers", "hidden size": "hidden_size", "attention heads": "num_attention_heads",
    "key/value heads": "num_query_groups", "feed-forward size": "ffn_hidden_size",
    "positions": "max_position_embeddings",
}  # fmt: skip


def check_start(config: Config, engine: str) -> None:
    """Raise UserError for the first file that training needs and that is missing or not the right
    one."""
    if os.environ.get(DATA_COMES):
        return
    check_files(config)
    if engine != "megatron-core":  # which other engines start from is theirs to say
        return
    load, save = config.checkpoint.load, config.checkpoint.save
    if load and not (save and list_iterations(Path(save))):  # a resumed run does not read it
        check_readable(load, config.checkpoint.load_iteration)
        if config.shape and (stored := shape_in_config(load)):
            check_sizes(config.shape, stored, load)


def check_files(config: Config) -> None:
    """Raise UserError for the first file that training needs and that does not exist, or that is
    not an index of tokens."""
    from megatron_ft.data.indexed import MAGIC  # imports numpy, of which --help has no need

    for path in needed_files(config):
        if not os.path.exists(path):
            raise UserError(f"{path} not found; correct --data-prefix, the split files, --tokenizer-file or --load")
        if path.endswith(".idx") and os.path.isfile(path):
            with open(path, "rb") as file:
                header = file.read(len(MAGIC))
            if header != MAGIC:
                found = describe(header) or "not a Megatron MMIDIDX index"
                raise UserError(f"{path}: {found}; make it with preprocess/tokenize.py")


def check_sizes(ours: ModelShape, stored: ModelShape, load: str) -> None:
    """Raise UserError that names the first size in which the flags and the checkpoint differ."""
    for what, name in SIZES.items():
        if getattr(ours, name) != getattr(stored, name):
            raise UserError(
                f"{load}: a model with {getattr(stored, name)} {what}, but the flags (or --preset) ask for "
                f"{getattr(ours, name)}; leave the architecture flags out to take the checkpoint's"
            )
