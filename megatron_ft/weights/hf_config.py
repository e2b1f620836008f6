"""A Hugging Face directory's config.json: the model's shape and its special tokens.

Read without the weights, and without torch, so that a model can be planned before it is downloaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import resolve_hub_cache
from megatron_ft.files.json_file import read_json
from megatron_ft.model.families import family_of, shape_of_config
from megatron_ft.model.family import shown
from megatron_ft.model.shape import ModelShape

CONFIG = "config.json"
SANTACODER = "GPT2LMHeadCustomModel"  # the class in bigcode/santacoder's own code
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Our own argument in a Megatron checkpoint that was converted from a model with such ids.
SPECIAL_IDS_ARG = "hf_special_ids"


class HFConfig(NamedTuple):
    """A model's configuration.

    `notices` are lines for the log. `santacoder`: the tensors are those of santacoder.py.
    """

    shape: ModelShape
    special_ids: dict[str, int | None]
    notices: list[str]
    santacoder: bool


def read_hf_config(directory: Path) -> HFConfig:
    """The configuration in `directory`. Raises UserError for another model than ours."""
    where = directory / CONFIG
    config = read_json(where)
    santacoder = config.get("architectures") == [SANTACODER]
    if santacoder:
        config = _as_gpt_bigcode(config, where)
    shape = shape_of_config(config, str(where))
    special_ids = known_ids(config, shape.vocab_size)
    notices = [
        f"{where}: {name} {config[name]!r:.100} is not one of the vocabulary's {shape.vocab_size} ids and is left out"
        for name in SPECIAL_IDS
        if config.get(name) is not None and name not in special_ids
    ]
    notices += [f"{where}: {line}" for line in family_of(shape).notices(config)]
    return HFConfig(shape, special_ids, notices, santacoder)


def _as_gpt_bigcode(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """SantaCoder's configuration as transformers writes it since it has the model itself."""
    for name, expected in (("attention_head_type", "multiquery"), ("scale_attn_by_inverse_layer_idx", False)):
        if (found := config.get(name, expected)) != expected:
            raise UserError(
                f"{where}: {name} is {shown(found)}, expected {expected!r}, as in bigcode/santacoder; "
                "bigcode/gpt_bigcode-santacoder is that model in transformers' own form"
            )
    return {**config, "model_type": "gpt_bigcode", "architectures": [], "multi_query": True}


def shape_in_config(path: Path | str) -> ModelShape | None:
    """The shape of a Hugging Face directory, or of one in the Hub's cache, weights or not.

    None for anything else. Raises UserError for another model than ours.
    """
    directory, _ = resolve_hub_cache(Path(path))
    return read_hf_config(directory).shape if (directory / CONFIG).is_file() else None


def known_ids(found: Mapping[str, Any], vocab_size: int) -> dict[str, int | None]:
    """The special tokens' ids in `found` that are ids of the vocabulary.

    >>> known_ids({"bos_token_id": 0, "eos_token_id": 50256, "pad_token_id": None}, 49152)
    {'bos_token_id': 0}
    """
    given = {name: found.get(name) for name in SPECIAL_IDS}
    return {name: number for name, number in given.items() if type(number) is int and 0 <= number < vocab_size}
