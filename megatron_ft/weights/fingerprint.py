"""Which weights adapters belong to: a LoRA run's manifest names them by place and fingerprint, and no others are taken for them.

The fingerprint is of values, not of files: a copy in another place, format or layout has it too, one in another precision has not. It is
a sample, so that the largest model's takes seconds; training changes every tensor nearly everywhere, and a sample of each shows it.
"""

import hashlib

import torch

from megatron_ft.model.tensor_names import WTE, hf_shape
from megatron_ft.weights.source import WeightSource

ROWS = 8  # of each matrix


def describe_base(source: WeightSource) -> dict:
    """A manifest's `base`: where the weights are, and what they are."""
    path = source.path.absolute()
    path = path if source.iteration is None else path.parent
    return {"path": str(path), "iteration": source.iteration, "fingerprint": fingerprint(source)}


def is_base(source: WeightSource, base: dict) -> bool:
    """Whether these are the weights that a manifest's `base` describes; one without a fingerprint describes any."""
    return base.get("fingerprint") in (None, fingerprint(source))


def fingerprint(source: WeightSource) -> str:
    """Digest of vectors, and of rows spread over each matrix; of the word embeddings the first, since padding rows are not everywhere."""
    digest = hashlib.sha256()
    for name in source.names():
        shape = hf_shape(source.shape, name)
        rows = shape[0]
        if len(shape) == 1:
            parts = [(0, rows)]
        elif name == WTE:
            parts = [(0, ROWS)]
        else:
            parts = [(row, row + 1) for row in sorted({part * (rows - 1) // (ROWS - 1) for part in range(ROWS)})]
        digest.update(f"{name} {shape[1:]}".encode())
        for start, stop in parts:
            digest.update(source.read_slice(name, 0, start, stop).to(torch.float32).numpy().tobytes())
    return digest.hexdigest()
