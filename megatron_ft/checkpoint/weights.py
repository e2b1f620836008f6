"""The weights of any checkpoint through one lazy reader: `open_weights(path)`.

A source gives tensors under their Hugging Face names, whole or in slices, memory-mapped: opening reads names and
shapes, and only what is asked for is read. `open_weights` tells the formats apart:

    config.json + *.safetensors | *.bin                    Hugging Face           (hf.py)
    iter_XXXXXXX/mp_rank_TT[_PPP]/model*_rng.pt            Megatron before Core   (legacy.py)
    iter_XXXXXXX/.metadata + *.distcp                      torch_dist             (torch_dist_weights.py)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property, reduce
from pathlib import Path

import torch

from megatron_ft.checkpoint.directory import BEST, TRACKER, iteration_directory, list_iterations, read_tracker
from megatron_ft.checkpoint.manifest import NAME, Damaged, Manifest, check_files, read_manifest
from megatron_ft.checkpoint.names import hf_names, hf_shape
from megatron_ft.errors import UserError
from megatron_ft.models import ModelShape


class WeightSource(ABC):
    """Weights of one checkpoint.

    `kind` names the format, `path` the directory read, `shape` the model (vocab_size = embedding rows stored),
    `vocab_size` how many of those rows are not padding, where the checkpoint says so, `iteration` a number, "release" or None,
    `args` the run's arguments or None, `manifest` that of a checkpoint of this package, `notice` one line on what was read where there
    was a choice, or None.
    """

    kind: str
    path: Path
    shape: ModelShape
    vocab_size: int | None = None
    iteration: int | str | None = None
    args: dict | None = None
    manifest: Manifest | None = None
    notice: str | None = None

    def names(self) -> list[str]:
        """HF GPTBigCode tensor names in file order, without the tied lm_head."""
        return hf_names(self.shape)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The widest of all tensors' dtypes: it holds every value of the checkpoint."""
        return widest(map(self.dtype_of, self.names()))

    def dtype_of(self, name: str) -> torch.dtype:
        """dtype of one tensor."""
        return widest(piece.dtype for piece in self.pieces(name)[1])

    @abstractmethod
    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        """The axis along which the tensor is cut in this checkpoint, and the cuts in order, memory-mapped."""

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU; memory-mapped (do not write to it) where the checkpoint has it in one piece."""
        dim, pieces = self.pieces(name)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of axis `dim`; only the pieces that hold them are read."""
        cut_dim, pieces = self.pieces(name)
        return slice_of_pieces(cut_dim, pieces, dim, start, stop)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all: fp32 for bf16 and fp16."""
    return reduce(torch.promote_types, dtypes)


def slice_of_pieces(cut_dim: int, pieces: list[torch.Tensor], dim: int, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop of axis `dim` of the tensor whose cuts along `cut_dim` are `pieces`; a view where one piece holds them all."""
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


def check_shape(shape: ModelShape, name: str, found: Sequence[int], where: Path | str) -> None:
    """Raise UserError when a tensor is not as the model's configuration says."""
    expected = hf_shape(shape, name)
    if tuple(found) != expected:
        raise UserError(
            f"{where}: {name} has shape {list(found)}, expected {list(expected)} from the checkpoint's own configuration; "
            "the files do not belong together, copy the checkpoint again"
        )


def check_vocabulary(source: WeightSource, rows: int, asked_by: str) -> str | None:
    """Whether the first `rows` of the stored embedding rows can be the vocabulary, as `asked_by` says; a warning where that is doubtful.

    Raises UserError when the source has fewer rows, or when rows would be cut that it knows to be tokens'.
    """
    stored, known = source.shape.vocab_size, source.vocab_size
    if rows > stored:
        raise UserError(
            f"{asked_by}: {rows} tokens, but {source.path} has {stored} embedding rows; "
            "give the tokenizer the model was trained with"
        )
    if known is not None and rows < known:
        raise UserError(
            f"{asked_by}: {rows} tokens, but {known} of the {stored} embedding rows of {source.path} are tokens', so "
            f"{known - rows} trained rows would be lost; give the tokenizer the model was trained with"
        )
    if known is not None and rows > known:
        return (
            f"warning: {asked_by}: {rows} tokens, but {source.path} was trained with {known}; "
            f"{rows - known} rows of padding, which nothing was learned for, become tokens'"
        )
    args = source.args or {}
    multiple = (args.get("make_vocab_size_divisible_by") or 128) * (args.get("tensor_model_parallel_size") or 1)
    if known is None and stored - rows >= multiple:
        return (
            f"warning: {asked_by}: {rows} tokens, but {source.path} has {stored} embedding rows; {stored - rows} are cut off, more than "
            f"the {multiple - 1} that padding to a multiple of {multiple} can add; is this the tokenizer the model was trained with?"
        )
    return None


def open_weights(path: Path | str, iteration: int | str = "latest") -> WeightSource:
    """Open a torch_dist, legacy Megatron or Hugging Face directory; see WeightSource.

    `iteration` picks among a Megatron directory's checkpoints, as `find_iteration` says.
    Raises UserError when there is none, or when what is there is incomplete, damaged or another architecture's.
    """
    from megatron_ft.checkpoint.hf import HFSource
    from megatron_ft.checkpoint.legacy import LegacySource
    from megatron_ft.checkpoint.torch_dist_weights import TorchDistSource

    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a torch_dist, legacy Megatron or Hugging Face checkpoint")
    if (path / "config.json").is_file():
        return HFSource(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: a PEFT adapter, not a whole model; merge it with convert/megatron_to_hf.py --merge-lora"
        )
    directory, iteration, notice = find_iteration(path, iteration)
    if any(directory.glob("mp_rank_*")):
        source = LegacySource(directory, iteration)
    elif (directory / ".metadata").is_file() or (directory / "metadata.json").is_file():
        source = TorchDistSource(directory, iteration)
    else:
        raise UserError(
            f"{directory}: no checkpoint here; expected config.json (Hugging Face), mp_rank_* (legacy Megatron) or .metadata (torch_dist)"
        )
    source.notice = notice
    return source


def find_iteration(path: Path, iteration: int | str = "latest") -> tuple[Path, int | str | None, str | None]:
    """Directory of one iteration of a Megatron checkpoint, its number or "release" (None if its name tells neither), and a notice.

    `iteration` is a number, "release", "best" (lowest validation loss), or "latest": what the tracker file says, or, where that names nothing
    that is there, the newest whole one, which the notice says then.
    """
    if any(path.glob("mp_rank_*")) or (path / ".metadata").is_file():  # an iteration's own directory was given
        name = path.name.removeprefix("iter_")
        return path, int(name) if name.isdigit() else "release" if name == "release" else None, None
    there = sorted(p.name for p in path.iterdir() if p.name == "release" or p.name.startswith("iter_"))
    listed = f"there are {', '.join(there)}" if there else "there is none"
    wanted = str(iteration)
    if wanted == "latest":
        tracked = read_tracker(path)
        if not (tracked == "release" or (tracked or "").isdigit()) or not _directory_of(path, tracked).is_dir():
            return _newest_whole(path, tracked, listed)
        wanted = tracked
    if wanted == "best":
        if not (path / BEST).is_file():
            raise UserError(
                f"{path}: no {BEST}, so no best checkpoint is known here (validation marks it; {listed}); give a number"
            )
        wanted = (path / BEST).read_text().strip()
    if wanted != "release" and not wanted.isdigit():
        raise UserError(f"{path}: iteration {wanted!r} is neither a number, 'release', 'best' nor 'latest' ({listed})")
    directory = _directory_of(path, wanted)
    if not directory.is_dir():
        asked = f"iteration {wanted} was asked for" if str(iteration) == wanted else f"{BEST} names iteration {wanted}"
        raise UserError(f"{directory}: no such directory, though {asked}; {listed}")
    return directory, "release" if wanted == "release" else int(wanted), None


def _directory_of(path: Path, wanted: str) -> Path:
    return path / "release" if wanted == "release" else iteration_directory(path, int(wanted))


def _newest_whole(path: Path, tracked: str | None, listed: str) -> tuple[Path, int, str]:
    """What `find_iteration` takes where the tracker file names nothing that is there."""
    says = f"{TRACKER} is missing" if tracked is None else f"{TRACKER} names {tracked or 'nothing'}, which is not there"
    for iteration in list_iterations(path):
        directory = iteration_directory(path, iteration)
        if _is_whole(directory):
            return directory, iteration, f"{path}: {says}; the newest whole checkpoint is taken, iteration {iteration}"
    raise UserError(
        f"{path}: neither config.json nor a whole checkpoint, so none is known here ({says}; {listed}); "
        "give the iteration, or its own directory"
    )


def _is_whole(directory: Path) -> bool:
    """By the manifest where there is one; another program's checkpoint, which has none, is taken at its word."""
    if not (directory / NAME).is_file():
        return any(directory.glob("mp_rank_*")) or (directory / ".metadata").is_file()
    try:
        return not check_files(directory, read_manifest(directory), checksums=False)
    except Damaged:
        return False
