"""The shape of a checkpoint as its config.json or its manifest tells: in milliseconds, no torch."""

from pathlib import Path

from megatron_ft.files.hub_cache import resolve_hub_cache
from megatron_ft.model.families import shape_of_manifest
from megatron_ft.model.shape import ModelShape
from megatron_ft.weights.hf_config import CONFIG, read_hf_config
from megatron_ft.weights.locate import ADAPTER, HUGGING_FACE, locate
from megatron_ft.weights.manifest import NAME, damage_as_user_error, read_manifest


def stored_shape(path: Path | str, iteration: int | str = "latest") -> ModelShape | None:
    """The shape of a torch_dist, legacy Megatron or Hugging Face checkpoint.

    None where only the tensors tell it: of other programs' Megatron checkpoints, and of a PEFT
    adapter. Raises UserError where there is no checkpoint, or one of another model than ours.
    """
    directory, _ = resolve_hub_cache(Path(path))
    if (directory / ADAPTER).is_file() and not (directory / CONFIG).is_file():
        return None
    found = locate(directory, iteration)
    if found.kind == HUGGING_FACE:
        return read_hf_config(found.directory).shape
    if not (found.directory / NAME).is_file():
        return None
    with damage_as_user_error():
        manifest = read_manifest(found.directory)
    return shape_of_manifest(manifest.shape, f"{found.directory / NAME}: shape")
