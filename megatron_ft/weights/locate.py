"""Which format a checkpoint has, and which of its iterations to read: by its files, without torch.

    config.json + *.safetensors | *.bin              Hugging Face           hf_reader.py
    iter_XXXXXXX/mp_rank_TT[_PPP]/model*_rng.pt      Megatron before Core   legacy_reader.py
    iter_XXXXXXX/.metadata + *.distcp                torch_dist             torch_dist_reader.py

Of a Megatron directory's iterations, `find_iteration` selects one.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import download_hint, resolve_hub_cache
from megatron_ft.printable import printable
from megatron_ft.weights.directory import (
    BEST,
    METADATA,
    TRACKER,
    iteration_directory,
    list_iterations,
    parse_iteration,
    read_best,
    read_tracker,
)
from megatron_ft.weights.hf_config import read_hf_config
from megatron_ft.weights.manifest import NAME, Damaged, check_files, read_manifest

HUGGING_FACE, LEGACY, TORCH_DIST = "Hugging Face", "legacy Megatron", "torch_dist"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Location:
    """A checkpoint's format, and the directory of it that is read."""

    kind: str
    directory: Path
    iteration: int | str | None = None  # a number or "release"; None where there are none
    notice: str | None = None  # one line for the log where there was a choice


def locate(path: Path | str, iteration: int | str = "latest") -> Location:
    """Find the checkpoint in a torch_dist, legacy Megatron or Hugging Face directory.

    `iteration` selects one of a Megatron directory's checkpoints (`find_iteration`). Raises
    UserError where there is none.
    """
    path, snapshot = resolve_hub_cache(Path(path))
    if not path.is_dir():
        problem = "a file" if path.exists() else "no such directory"
        raise UserError(
            f"{path}: {problem}; give a torch_dist, legacy Megatron or Hugging Face checkpoint{download_hint(path)}"
        )
    if (path / "config.json").is_file():
        return Location(HUGGING_FACE, path, notice=snapshot)
    if (path / ADAPTER).is_file():
        raise adapter_only(path)
    directory, number, notice = find_iteration(path, iteration)
    if (directory / ADAPTER).is_file():
        raise adapter_only(directory)
    if (directory / "config.json").is_file():  # of a run of --engine transformers
        return Location(HUGGING_FACE, directory, number, joined(snapshot, notice))
    if any(directory.glob("mp_rank_*")):
        kind = LEGACY
    elif (directory / METADATA).is_file() or (directory / "metadata.json").is_file():
        kind = TORCH_DIST
    else:
        raise UserError(
            f"{directory}: not a checkpoint; "
            "expected config.json (Hugging Face), mp_rank_* (legacy Megatron) or .metadata (torch_dist)"
        )
    return Location(kind, directory, number, joined(snapshot, notice))


def adapter_only(directory: Path) -> UserError:
    """The error for a PEFT directory where a complete model is needed."""
    return UserError(
        f"{directory}: a PEFT adapter, not a complete model; merge it (convert/megatron_to_hf.py --load {directory} "
        f"--merge-lora), or train it further (--load {directory} with its --lora-... flags)"
    )


def check_readable(path: Path | str, iteration: int | str = "latest") -> str:
    """The format of a checkpoint, after the errors that its names and config.json tell, in
    milliseconds; what its tensors tell is left to `open_weights`. A PEFT adapter has no format."""
    path, _ = resolve_hub_cache(Path(path))
    if not (path / "config.json").is_file() and (path / ADAPTER).is_file():
        return ""
    found = locate(path, iteration)
    if found.kind == HUGGING_FACE:
        read_hf_config(found.directory)
    return found.kind


def joined(*notices: str | None) -> str | None:
    """Notices as one line, None where there are none."""
    return printable("; ".join(filter(None, notices))) or None


def find_iteration(path: Path, iteration: int | str = "latest") -> tuple[Path, int | str | None, str | None]:
    """One iteration of a Megatron checkpoint: its directory, its number or "release", and a notice.

    `iteration` is a number, "release", "best" (lowest validation loss), or "latest": the one in the
    tracker file or, where that does not exist, the newest intact one, with a notice for the log.
    `path` may also be an iteration's own directory; the number is None if its name has none.
    Raises UserError when there is no such iteration.
    """
    if any(path.glob("mp_rank_*")) or (path / METADATA).is_file():  # an iteration's own directory
        number = parse_iteration(path.name.removeprefix("iter_"))
        return path, "release" if path.name == "release" else number, None
    names = sorted(p.name for p in path.iterdir() if p.name == "release" or p.name.startswith("iter_"))
    listed = f"there are {_some(names)}" if names else "there are none"
    asked = str(iteration)
    if asked == "latest":
        tracked = read_tracker(path)
        directory = tracked and _directory_of(path, tracked)
        if not directory or not directory.is_dir():
            return _newest_intact(path, tracked, listed)
        return directory, parse_iteration(tracked or "") if tracked != "release" else "release", None
    if asked == "best":
        best = read_best(path)
        if best is None:
            problem = f"{BEST} names no iteration" if (path / BEST).exists() else f"no {BEST}"
            raise UserError(
                f"{path}: {problem}, so the best checkpoint is unknown (validation writes it; {listed}); give a number"
            )
        asked = str(best)
    directory = _directory_of(path, asked)
    if directory is None:
        raise UserError(f"{path}: iteration {asked!r} is neither a number, 'release', 'best' nor 'latest' ({listed})")
    if not directory.is_dir():
        why = f"iteration {asked} was asked for" if str(iteration) == asked else f"{BEST} names iteration {asked}"
        raise UserError(f"{directory}: no such directory, though {why}; {listed}")
    return directory, "release" if asked == "release" else parse_iteration(asked), None


def _directory_of(path: Path, iteration: str) -> Path | None:
    """The directory of a number or "release", None for any other text."""
    if iteration == "release":
        return path / iteration
    number = parse_iteration(iteration)
    return None if number is None else iteration_directory(path, number)


def _some(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 20 else [*names[:10], "...", *names[-10:]])


def _newest_intact(path: Path, tracked: str | None, listed: str) -> tuple[Path, int, str]:
    """`find_iteration` where the tracker file names no existing checkpoint."""
    if tracked is None:
        problem = f"{TRACKER} is missing"
    else:
        problem = f"{TRACKER} names {tracked}, which does not exist"
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
