"""The families of models, and the presets of all of them."""

from collections.abc import Mapping
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.model.family import Family, shown
from megatron_ft.model.gpt_bigcode import GPT_BIGCODE
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.starcoder2 import STARCODER2

FAMILIES = {family.model_type: family for family in (GPT_BIGCODE, STARCODER2)}
# Published models, and `tiny` ones for demonstrations and tests, by the names of --preset.
PRESETS = {name: shape for family in FAMILIES.values() for name, shape in family.presets.items()}


def family_of(shape: ModelShape) -> Family:
    """The family of a shape."""
    return FAMILIES[shape.family]


def shape_of_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """Shape of a Hugging Face config.json, which is at `where`.

    Raises UserError, naming that file and the field, for what is missing or malformed and for what
    Megatron-Core's model cannot express.
    """
    found = config.get("model_type", "missing")
    family = FAMILIES.get(found) if isinstance(found, str) else None
    if family is None:
        known = " or ".join(f"{name!r} ({family.models})" for name, family in FAMILIES.items())
        hint = "" if found == "missing" else "; --engine transformers trains other causal models"
        raise UserError(
            f"{where}: model_type is {found if found == 'missing' else shown(found)}, expected {known}{hint}"
        )
    return family.read_config(config, where)


def shape_of_manifest(found: Mapping[str, Any], where: str) -> ModelShape:
    """Shape of a manifest's fields, which are at `where`. Raises UserError for malformed ones."""
    shape = ModelShape.from_dict(found, where)
    if shape.family not in FAMILIES:
        raise UserError(f"{where}: family {shape.family!r}; a newer megatron-ft may have written it")
    try:
        family_of(shape).check(shape)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return shape
