"""What a Hugging Face directory's config.json says: the model's shape and its special tokens.

Read without the weights, and without torch, so that a model can be planned before it is downloaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ft.files.hub_cache import resolve_hub_cache
from megatron_ft.files.json_file import read_json
from megatron_ft.model.families import shape_of_config
from megatron_ft.model.shape import ModelShape

CONFIG = "config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HFConfig(NamedTuple):
    """A model's configuration; `notices` are lines for the log."""

    shape: ModelShape
    special_ids: dict[str, int | None]
    notices: list[str]


def read_hf_config(directory: Path) -> HFConfig:
    """The configuration in `directory`. Raises UserError for another model than ours."""
    where = directory / CONFIG
    config = read_json(where)
    shape = shape_of_config(config, str(where))
    special_ids, notices = _special_ids(config, shape.vocab_size, where)
    if shape.exact_gelu:
        notices.append(
            f"{where}: activation_function is 'gelu', the exact form, and is taken at its word; StarCoder was "
            "pre-trained with the tanh form (the tools that merged its checkpoints wrote the other word; the "
            "difference is about 1e-3), which --activation gelu_tanh selects"
        )
    return HFConfig(shape, special_ids, notices)


def shape_in_config(path: Path | str) -> ModelShape | None:
    """The shape of a Hugging Face directory, or of one in the Hub's cache, weights or not.

    None for anything else. Raises UserError for another model than ours.
    """
    directory, _ = resolve_hub_cache(Path(path))
    return read_hf_config(directory).shape if (directory / CONFIG).is_file() else None


def _special_ids(config: Mapping[str, Any], vocab_size: int, where: Path) -> tuple[dict[str, int | None], list[str]]:
    """The special tokens' ids that are in the vocabulary, and lines about those that are not."""
    given = {name: config[name] for name in SPECIAL_IDS if type(config.get(name)) is int}
    outside = {name: number for name, number in given.items() if not 0 <= number < vocab_size}
    notices = [
        f"{where}: {name} {number} is outside of the {vocab_size} ids of the vocabulary and is left out"
        for name, number in outside.items()
    ]
    return {name: number for name, number in given.items() if name not in outside}, notices
