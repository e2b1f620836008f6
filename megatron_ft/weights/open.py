"""The weights of any checkpoint through one lazy reader: `open_weights(path)`.

A source gives tensors under their Hugging Face names, whole or in slices, memory-mapped: opening reads names and
shapes, and only what is asked for is read. `open_weights` tells the formats apart:

    config.json + *.safetensors | *.bin                    Hugging Face           (hf.py)
    iter_XXXXXXX/mp_rank_TT[_PPP]/model*_rng.pt            Megatron before Core   (legacy.py)
    iter_XXXXXXX/.metadata + *.distcp                      torch_dist             (torch_dist_weights.py)
"""

from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.weights.directory import BEST, TRACKER, iteration_directory, list_iterations, read_tracker
from megatron_ft.weights.hf_reader import HFSource
from megatron_ft.weights.legacy_reader import LegacySource
from megatron_ft.weights.manifest import NAME, Damaged, check_files, read_manifest
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.torch_dist_reader import TorchDistSource


def open_weights(path: Path | str, iteration: int | str = "latest") -> WeightSource:
    """Open a torch_dist, legacy Megatron or Hugging Face directory; see WeightSource.

    `iteration` picks among a Megatron directory's checkpoints, as `find_iteration` says.
    Raises UserError when there is none, or when what is there is incomplete, damaged or another architecture's.
    """
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
