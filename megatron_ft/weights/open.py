"""Open the weights of any checkpoint: `open_weights(path)` recognizes the format by its files.

    config.json + *.safetensors | *.bin              Hugging Face           hf_reader.py
    iter_XXXXXXX/mp_rank_TT[_PPP]/model*_rng.pt      Megatron before Core   legacy_reader.py
    iter_XXXXXXX/.metadata + *.distcp                torch_dist             torch_dist_reader.py

Of a Megatron directory's iterations, `find_iteration` selects one.
"""

from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.weights.directory import BEST, TRACKER, iteration_directory, list_iterations, read_tracker
from megatron_ft.weights.hf_reader import HFSource
from megatron_ft.weights.legacy_reader import LegacySource
from megatron_ft.weights.manifest import NAME, Damaged, check_files, read_manifest
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.torch_dist_metadata import METADATA
from megatron_ft.weights.torch_dist_reader import TorchDistSource


def open_weights(path: Path | str, iteration: int | str = "latest") -> WeightSource:
    """Open a torch_dist, legacy Megatron or Hugging Face directory; see WeightSource.

    `iteration` selects one of a Megatron directory's checkpoints (`find_iteration`). Raises
    UserError when there is no checkpoint, or one that is incomplete, damaged or not a GPTBigCode.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a torch_dist, legacy Megatron or Hugging Face checkpoint")
    if (path / "config.json").is_file():
        return HFSource(path)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: a PEFT adapter, not a complete model; merge it with convert/megatron_to_hf.py --merge-lora"
        )
    directory, number, notice = find_iteration(path, iteration)
    source: WeightSource
    if any(directory.glob("mp_rank_*")):
        source = LegacySource(directory, number)
    elif (directory / METADATA).is_file() or (directory / "metadata.json").is_file():
        source = TorchDistSource(directory, number)
    else:
        raise UserError(
            f"{directory}: not a checkpoint; "
            "expected config.json (Hugging Face), mp_rank_* (legacy Megatron) or .metadata (torch_dist)"
        )
    source.notice = notice
    return source


def find_iteration(path: Path, iteration: int | str = "latest") -> tuple[Path, int | str | None, str | None]:
    """One iteration of a Megatron checkpoint: its directory, its number or "release", and a notice.

    `iteration` is a number, "release", "best" (lowest validation loss), or "latest": the one in the
    tracker file or, where that does not exist, the newest intact one, with a notice for the log.
    `path` may also be an iteration's own directory; the number is None if its name has none.
    Raises UserError when there is no such iteration.
    """
    if any(path.glob("mp_rank_*")) or (path / METADATA).is_file():  # an iteration's own directory
        name = path.name.removeprefix("iter_")
        return path, int(name) if name.isdigit() else "release" if name == "release" else None, None
    names = sorted(p.name for p in path.iterdir() if p.name == "release" or p.name.startswith("iter_"))
    listed = f"there are {', '.join(names)}" if names else "there are none"
    asked = str(iteration)
    if asked == "latest":
        tracked = read_tracker(path)
        if tracked is None or not _is_name(tracked) or not _directory_of(path, tracked).is_dir():
            return _newest_intact(path, tracked, listed)
        asked = tracked
    elif asked == "best":
        if not (path / BEST).is_file():
            raise UserError(
                f"{path}: no {BEST}, so the best checkpoint is unknown (validation writes it; {listed}); give a number"
            )
        asked = (path / BEST).read_text().strip()
    if not _is_name(asked):
        raise UserError(f"{path}: iteration {asked!r} is neither a number, 'release', 'best' nor 'latest' ({listed})")
    directory = _directory_of(path, asked)
    if not directory.is_dir():
        why = f"iteration {asked} was asked for" if str(iteration) == asked else f"{BEST} names iteration {asked}"
        raise UserError(f"{directory}: no such directory, though {why}; {listed}")
    return directory, "release" if asked == "release" else int(asked), None


def _is_name(iteration: str) -> bool:
    return iteration == "release" or iteration.isdigit()


def _directory_of(path: Path, iteration: str) -> Path:
    return path / "release" if iteration == "release" else iteration_directory(path, int(iteration))


def _newest_intact(path: Path, tracked: str | None, listed: str) -> tuple[Path, int, str]:
    """`find_iteration` where the tracker file names no existing checkpoint."""
    if tracked is None:
        problem = f"{TRACKER} is missing"
    else:
        problem = f"{TRACKER} names {tracked or 'nothing'}, which does not exist"
    for iteration in list_iterations(path):
        directory = iteration_directory(path, iteration)
        if _is_intact(directory):
            notice = f"{path}: {problem}; using the newest intact checkpoint, iteration {iteration}"
            return directory, iteration, notice
    raise UserError(
        f"{path}: neither config.json nor an intact checkpoint found ({problem}; {listed}); "
        "give the iteration, or its own directory"
    )


def _is_intact(directory: Path) -> bool:
    """By its manifest; another program's checkpoint has none and is assumed to be intact."""
    if not (directory / NAME).is_file():
        return any(directory.glob("mp_rank_*")) or (directory / METADATA).is_file()
    try:
        return not check_files(directory, read_manifest(directory), checksums=False)
    except Damaged:
        return False
