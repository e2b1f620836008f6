"""The directory that a run of `--engine transformers` starts from: a model, or adapters of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.data.fingerprint import sampled_digest
from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import download_hint, resolve_hub_cache
from megatron_ft.files.json_file import read_json, require
from megatron_ft.weights.locate import ADAPTER, find_iteration

CONFIG = "config.json"


@dataclass(frozen=True)
class StartingPoint:
    """`model`: a Hugging Face directory. `adapters`: a PEFT directory of it, or None."""

    model: Path
    adapters: Path | None = None

    def model_config(self) -> dict[str, Any]:
        """The model's config.json."""
        return read_json(self.model / CONFIG)

    def describe_base(self) -> dict[str, Any]:
        """The `base` of a manifest: where the model is, and a digest that recognizes it."""
        return {"path": str(self.model), "iteration": None, "fingerprint": model_digest(self.model)}


def find_start(load: str, iteration: int | str, *, adapters: bool) -> StartingPoint:
    """What --load names: a Hugging Face directory, a run of this engine, or with `adapters` a PEFT
    directory, whose base its adapter_config.json names.

    Raises UserError if it is none of these, or if its model is of a kind that cannot be trained.
    """
    path, _ = resolve_hub_cache(Path(load))
    if not path.is_dir():
        problem = "a file" if path.exists() else "no such directory"
        raise UserError(f"--load {load}: {problem}; give a Hugging Face directory{download_hint(path)}")
    directory = path if _kind(path) else find_iteration(path, iteration)[0]
    kind = _kind(directory)
    if kind is None:
        raise UserError(
            f"--load {load}: {directory.name} has no {CONFIG}; --engine transformers starts from a Hugging Face directory, "
            "which convert/megatron_to_hf.py makes of a Megatron checkpoint"
        )
    if kind == CONFIG:
        check_kind(read_json(directory / CONFIG), directory / CONFIG)
        return StartingPoint(directory.absolute())
    if not adapters:
        raise UserError(
            f"--load {load}: adapters, not a complete model; give their flags (--lora-rank ...) to train them, "
            "or merge them with PEFT's merge_and_unload()"
        )
    where = directory / ADAPTER
    base = require(read_json(where), "base_model_name_or_path", str, str(where), low=1, high=4096)
    found = find_start(base, "latest", adapters=False)
    return StartingPoint(found.model, directory.absolute())


def _kind(directory: Path) -> str | None:
    """The file that tells what a directory is: a model's config.json, or adapters'."""
    return next((name for name in (CONFIG, ADAPTER) if (directory / name).is_file()), None)


def check_kind(config: Mapping[str, Any], where: Path) -> None:
    """Raise UserError for a config.json without a kind, or of one whose code comes with the model.

    Whether transformers knows the kind is checked once it is imported (model.py).
    """
    require(config, "model_type", str, str(where), low=1, high=200)
    if config.get("auto_map"):
        raise UserError(
            f"{where}: the model's code comes with it (auto_map), and is not run; "
            "give a model of a kind that transformers has itself"
        )


def model_digest(directory: Path) -> str:
    """Digest of samples of a model's configuration and weights."""
    files = sorted(file for file in directory.iterdir() if file.suffix in (".safetensors", ".bin"))
    return f"sampled {sampled_digest([directory / CONFIG, *files])}"
