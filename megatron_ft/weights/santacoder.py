"""SantaCoder in the form that bigcode/santacoder has on the Hub, with code of its own.

Its tensors are GPT-2's, so the weights of linear layers are [inputs, outputs] (transformers'
Conv1D), and queries are one tensor, the shared key and value another:

    h.N.attn.q_attn.weight [h, h]  h.N.attn.kv_attn.weight [h, 2 d]    GPTBigCode: h.N.attn.c_attn

`SantaCoderTensors` shows such a file as the GPTBigCode model that it is.
"""

from typing import Protocol

import torch

FUSED, QUERY, KEY_VALUE = ".attn.c_attn.", ".attn.q_attn.", ".attn.kv_attn."
LINEAR = (f"{FUSED}weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")


class Tensors(Protocol):
    """A file of tensors."""

    def names(self) -> list[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, memory-mapped."""
        ...


class SantaCoderTensors:
    """A file of SantaCoder's tensors by GPTBigCode's names, in GPTBigCode's shapes."""

    def __init__(self, file: Tensors) -> None:
        self._file = file
        stored = set(file.names())
        self._names = [
            name.replace(QUERY, FUSED)
            for name in file.names()
            if KEY_VALUE not in name and (QUERY not in name or name.replace(QUERY, KEY_VALUE) in stored)
        ]

    def names(self) -> list[str]:
        """GPTBigCode's names, of attention only where both parts are stored."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of GPTBigCode."""
        parts = [self._file.shape(part) for part in self._parts(name)]
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        return shape[::-1] if name.endswith(LINEAR) else shape

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of GPTBigCode: a view, or for attention a copy of one layer's."""
        parts = [self._file.tensor(part) for part in self._parts(name)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return tensor.t() if name.endswith(LINEAR) else tensor

    def _parts(self, name: str) -> list[str]:
        return [name.replace(FUSED, part) for part in (QUERY, KEY_VALUE)] if FUSED in name else [name]
