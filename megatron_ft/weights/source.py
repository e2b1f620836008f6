"""One lazy reader for the weights of any format: `WeightSource`, which each format implements.

A source gives tensors under our names (model/tensor_names.py), complete or in slices,
memory-mapped. Opening one reads names and shapes; weights are read when they are asked for.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch

from megatron_ft.errors import UserError
from megatron_ft.model.activation import ACTIVATIONS, overridden_activation
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import tensor_names
from megatron_ft.weights.manifest import Manifest

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSource(ABC):
    """Weights of one checkpoint.

    Its methods raise UserError for weights that are damaged or contradict each other.
    """

    kind: str  # the format, as messages name it
    path: Path  # the directory that is read
    shape: ModelShape  # its vocab_size is the number of embedding rows stored
    vocab_size: int | None = None  # of these rows, how many are not padding; None: not recorded
    iteration: int | str | None = None  # a number or "release"
    args: dict | None = None  # the run's arguments
    manifest: Manifest | None = None  # of a checkpoint of this package
    notice: str | None = None  # one line for the log where there was a choice of what to read

    def names(self) -> list[str]:
        """Our names of all tensors, in order."""
        return tensor_names(self.shape)

    @property
    def special_ids(self) -> dict[str, int | None]:
        """Ids of the special tokens under config.json's names; empty if they are not recorded."""
        return self.manifest.special_ids if self.manifest else {}

    def override_activation(self, activation: str | None) -> str | None:
        """Give the shape the activation of the flag, which is None without the flag.

        Returns a line for the log where that is another one than the checkpoint's.
        """
        if line := overridden_activation(self.shape, activation):
            self.shape = replace(self.shape, exact_gelu=ACTIVATIONS[str(activation)])
        return line

    @cached_property
    def dtype(self) -> torch.dtype:
        """The widest of all tensors' dtypes: it holds every value of the checkpoint."""
        return widest(map(self.dtype_of, self.names()))

    def check_dtypes(self) -> None:
        """Raise UserError for the first tensor whose dtype is not that of unquantized weights."""
        for name in self.names():
            if self.dtype_of(name) not in DTYPES:
                raise UserError(
                    f"{self.path}: {name} in {self.dtype_of(name)}; expected weights that are not quantized, "
                    "in float32, bfloat16 or float16"
                )

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of one tensor."""
        return widest(piece.dtype for piece in self.pieces(name)[1])

    @abstractmethod
    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        """The axis along which this checkpoint cuts the tensor, and its pieces in order, mapped."""

    def read(self, name: str) -> torch.Tensor:
        """The complete tensor on the CPU, in the shape of `tensor_shape`.

        It is memory-mapped (do not write to it) where the checkpoint stores it in one piece.
        """
        dim, pieces = self.pieces(name)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Entries start..stop of axis `dim`; only the pieces that hold them are read."""
        cut_dim, pieces = self.pieces(name)
        return slice_of_pieces(cut_dim, pieces, dim, start, stop)


def is_plain(value: object) -> bool:
    """Whether an object of a `.pt` file is a tensor whose elements are in memory, one by one."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all: fp32 for bf16 and fp16."""
    return reduce(torch.promote_types, dtypes)


def slice_of_pieces(cut_dim: int, pieces: list[torch.Tensor], dim: int, start: int, stop: int) -> torch.Tensor:
    """Entries start..stop of axis `dim` of the tensor that was cut along `cut_dim` into `pieces`.

    A view where one piece holds them all.
    """
    if cut_dim != dim:
        pieces = [piece.narrow(dim, start, stop - start) for piece in pieces]
    else:
        found, offset = [], 0
        for piece in pieces:
            first, last = max(start, offset), min(stop, offset + piece.shape[dim])
            if first < last:
                found.append(piece.narrow(dim, first - offset, last - first))
            offset += piece.shape[dim]
        pieces = found or [pieces[0].narrow(dim, 0, 0)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, cut_dim)


def arguments_of(found: object, where: Path) -> dict[str, Any]:
    """The arguments that a Megatron run saved in `where`: a Namespace or a dictionary."""
    args = vars(found) if isinstance(found, argparse.Namespace) else found
    if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
        raise UserError(f"{where}: its 'args' are {type(found).__name__}, expected the arguments of a Megatron run")
    return dict(args)


def check_shape(name: str, found: Sequence[int], expected: Sequence[int], where: Path | str) -> None:
    """Raise UserError when a tensor's shape is not what the model's configuration requires."""
    if tuple(found) != tuple(expected):
        raise UserError(
            f"{where}: {name} has shape {list(found)}, expected {list(expected)} from the checkpoint's own configuration; "
            "the files do not belong together"
        )
