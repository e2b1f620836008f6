"""Which weights adapters belong to: a LoRA run's manifest names them by path and by fingerprint.

The fingerprint is of values, not of files: a copy at another path, in another format or layout has
the same one, a copy in another precision does not. It is of a sample, so it takes seconds for the
largest model; training changes every tensor nearly everywhere, so a sample of each one shows it.
"""

import hashlib

import torch

from megatron_ft.model.hf_names import hf_name
from megatron_ft.model.tensor_names import VOCABULARY, tensor_shape
from megatron_ft.weights.source import WeightSource

ROWS = 8  # per matrix


def describe_base(source: WeightSource) -> dict:
    """A manifest's `base`: where the weights are ("path", "iteration"), and their "fingerprint"."""
    path = source.path.absolute()
    path = path if source.iteration is None else path.parent
    return {"path": str(path), "iteration": source.iteration, "fingerprint": fingerprint(source)}


def is_base(source: WeightSource, base: dict) -> bool:
    """Whether these are the weights that a manifest's `base` describes.

    A `base` without a fingerprint matches any weights.
    """
    return base.get("fingerprint") in (None, fingerprint(source))


def fingerprint(source: WeightSource) -> str:
    """Hex SHA-256 of all vectors and of `ROWS` rows spread over each matrix, in fp32.

    Of the word embeddings these are the first rows, since not every copy has rows of padding.
    """
    digest = hashlib.sha256()
    for name in source.names():
        shape = tensor_shape(source.shape, name)
        rows = shape[0]
        if len(shape) == 1:
            parts = [(0, rows)]
        elif name in VOCABULARY:
            parts = [(0, ROWS)]
        else:
            parts = [(row, row + 1) for row in sorted({part * (rows - 1) // (ROWS - 1) for part in range(ROWS)})]
        digest.update(f"{hf_name(source.shape, name)} {shape[1:]}".encode())
        for start, stop in parts:
            digest.update(source.read_slice(name, 0, start, stop).to(torch.float32).numpy().tobytes())
    return digest.hexdigest()
