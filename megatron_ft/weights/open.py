"""Open the weights of any checkpoint, whose format `locate` recognizes."""

from pathlib import Path

from megatron_ft.weights.hf_reader import HFSource
from megatron_ft.weights.legacy_reader import LegacySource
from megatron_ft.weights.locate import HUGGING_FACE, LEGACY, joined, locate
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.torch_dist_reader import TorchDistSource


def open_weights(path: Path | str, iteration: int | str = "latest") -> WeightSource:
    """Open a torch_dist, legacy Megatron or Hugging Face directory; see WeightSource.

    `iteration` selects one of a Megatron directory's checkpoints (`find_iteration`). Raises
    UserError when there is no checkpoint, or one that is incomplete, damaged or not of a family
    that is supported.
    """
    found = locate(path, iteration)
    source: WeightSource
    if found.kind == HUGGING_FACE:
        source = HFSource(found.directory)
    elif found.kind == LEGACY:
        source = LegacySource(found.directory, found.iteration)
    else:
        source = TorchDistSource(found.directory, found.iteration)
    source.notice = joined(found.notice, source.notice)
    return source
