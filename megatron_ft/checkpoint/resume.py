"""Whether to start or to resume a run, and what may differ when it is resumed.

If the save directory contains checkpoints, the run is resumed; else --load gives the weights for
step 0; else --from-scratch allows random weights.
"""

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.flag import MEGATRON, Resume
from megatron_ft.data.fingerprint import modified, sampled_digest, token_files
from megatron_ft.data.splits import groups_of
from megatron_ft.errors import UserError
from megatron_ft.model.activation import activation_flag
from megatron_ft.model.families import shape_of_manifest
from megatron_ft.model.shape import ModelShape
from megatron_ft.tokenizer import files as tokenizer_files
from megatron_ft.weights.adapters import open_start
from megatron_ft.weights.directory import TRACKER, iteration_directory, list_iterations, parse_iteration, read_tracker
from megatron_ft.weights.fingerprint import is_base
from megatron_ft.weights.hf_config import shape_in_config
from megatron_ft.weights.manifest import NAME, Damaged, Manifest, read_manifest

BLEND = "training data"
CONTENT = "content of the training data"
MODIFIED = "last modification of the training data"  # copies of the same data differ in it


@dataclass
class Start:
    """How a run began, and why: the first lines of the log."""

    kind: Literal["resume", "weights", "scratch"]
    iteration: int = 0
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Candidates:
    """Checkpoints of --save to resume from, newest first, and notes for the log."""

    iterations: list[int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class WeightsLocation:
    """A directory of weights and one of its iterations, as `open_start` accepts them."""

    path: str
    iteration: int | str


@dataclass(frozen=True)
class Differences:
    """What differs between a saved run and a command line, one line each.

    `refused` would make it a different run, `allowed` would not.
    """

    refused: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)


def newest_manifest(config: Config) -> Manifest | None:
    """Manifest of the newest checkpoint in --save, None if there is none.

    Cheap: reads only manifests. Whether the checkpoint is complete is checked when it is loaded.
    Raises UserError for a run of another engine.
    """
    if not config.checkpoint.save:
        return None
    save = Path(config.checkpoint.save)
    for iteration in list_iterations(save):
        with contextlib.suppress(Damaged):
            manifest = read_manifest(iteration_directory(save, iteration))
            engine = manifest.args.get("engine", MEGATRON)
            if engine != config.engine:
                raise UserError(
                    f"--save {save} was saved by --engine {engine}; give that engine, or --load {save} to start from its "
                    "weights and another --save"
                )
            return manifest
    return None


def starting_shape(config: Config) -> ModelShape | None:
    """Architecture of the checkpoint to resume or to start from, None if flags must give it.

    Called before a model is built; reads one manifest, or the names in a weights directory.
    """
    if manifest := newest_manifest(config):
        return shape_of_manifest(manifest.shape, f"the newest manifest in {config.checkpoint.save}: shape")
    if config.checkpoint.load:
        source, _ = open_start(config.checkpoint.load, config.checkpoint.load_iteration, config.values())
        return source.shape
    return None


def described_shape(config: Config) -> ModelShape | None:
    """`starting_shape` without opening the weights of a Hugging Face model."""
    load = config.checkpoint.load
    if load and not newest_manifest(config) and (shape := shape_in_config(load)):
        return shape
    return starting_shape(config)


def candidates(save: Path) -> Candidates:
    """The checkpoints in `save`, with a note if the tracker file names something else.

    Raises UserError if they were written by another program, or if there is only a tracker file.
    """
    iterations = list_iterations(save)
    directories = [iteration_directory(save, iteration) for iteration in iterations]
    if directories and not any((directory / NAME).exists() for directory in directories):
        foreign = next((d for d in directories if any(d.glob("mp_rank_*")) or (d / ".metadata").exists()), None)
        if foreign:
            raise UserError(
                f"--save {save} contains checkpoints written by another program ({foreign.name} has no {NAME}); "
                f"give --load {save} to start from their weights, and an empty directory as --save"
            )
    tracker = read_tracker(save)
    if tracker == "release" and not iterations:
        raise UserError(
            f"--save {save} contains a converted checkpoint, weights without a run; "
            f"give --load {save}, and an empty directory as --save"
        )
    if tracker is None and iterations:
        return Candidates(iterations, [f"{save / TRACKER} is missing; the newest checkpoint is {iterations[0]}"])
    if tracker is not None and parse_iteration(tracker) not in iterations:
        if not iterations:
            raise UserError(
                f"{save / TRACKER} names iteration {tracker}, but {save} contains no checkpoint; "
                "restore the checkpoint, or remove that file to start from the beginning"
            )
        note = f"{save / TRACKER} names iteration {tracker}, which does not exist; trying {iterations[0]}"
        return Candidates(iterations, [note])
    return Candidates(iterations)


def saved_best(save: Path, until: int) -> int | None:
    """Iteration of the best checkpoint in `save` up to `until`; None if there is none.

    It is the last one whose manifest records no better one before it.
    """
    for iteration in list_iterations(save):
        if iteration <= until:
            with contextlib.suppress(Damaged):
                best = read_manifest(iteration_directory(save, iteration)).state["best"]
                if best and best["iteration"] == iteration:
                    return iteration
    return None


def all_damaged(save: Path, damage: list[str]) -> UserError:
    """The error for a directory in which every checkpoint is damaged."""
    return UserError(
        f"--save {save}: none of its {len(damage)} checkpoints is complete ({'; '.join(damage)}); "
        "restore one, or give another --save: a run never starts over damaged checkpoints"
    )


def choose_first_start(config: Config) -> Start:
    """How a run without a checkpoint in --save starts. Raises UserError if it cannot."""
    empty = f"--save {config.checkpoint.save} contains no checkpoint" if config.checkpoint.save else "no --save"
    if config.checkpoint.load:
        ignored = [
            ENTRIES[flag].flag.name
            for flag in ("finetune", "no_load_optim", "no_load_rng", "reset_progress")
            if config.value(flag)
        ]
        note = f" ({', '.join(ignored)}: implied by a first start)" if ignored else ""
        return Start("weights", reasons=[f"{empty}: weights only, from {config.checkpoint.load}, step 0{note}"])
    if config.checkpoint.from_scratch:
        return Start("scratch", reasons=[f"{empty} and no --load: random weights (--from-scratch)"])
    raise UserError(
        f"{empty}, and --load is missing; give --load DIR to fine-tune from, or --from-scratch for random weights"
    )


def find_base(base: dict, config: Config, where: Path) -> WeightsLocation:
    """The weights that the adapters in `where` were trained on: the original ones, or --load.

    `base` is the manifest's. Raises UserError if neither is right.
    """
    load = config.checkpoint.load
    iteration = "latest" if base["iteration"] is None else base["iteration"]
    locations = [WeightsLocation(base["path"], iteration)]
    if load:
        locations += [WeightsLocation(load, iteration), WeightsLocation(load, config.checkpoint.load_iteration)]
    reasons: list[str] = []
    others_found = False
    for location in dict.fromkeys(locations):
        try:
            source, _ = open_start(location.path, location.iteration, config.values())
        except UserError as error:
            reasons.append(str(error))
            continue
        if is_base(source, base):
            return location
        reasons.append(f"{source.path} contains others")
        others_found = True
    problem = (
        "the base weights are not those the adapters were trained on"
        if others_found
        else "the base weights of its adapters do not exist"
    )
    raise UserError(
        f"{where}: {problem}: {'; '.join(dict.fromkeys(reasons))}; restore them at {base['path']}, "
        "or give their location with --load DIR (and --load-iteration N)"
    )


def compare(manifest: Manifest, config: Config, shape: ModelShape | None, data: dict[str, str]) -> Differences:
    """Differences between a saved run and a command line, whose `describe_data` is `data`."""
    found = Differences()
    shape_now = shape.as_dict() if shape else {}  # --engine transformers has none
    for name in dict.fromkeys([*shape_now, *manifest.shape]):
        saved, now = manifest.shape.get(name), shape_now.get(name)
        if saved != now and name == "exact_gelu":
            found.refused.append(f"--activation was {activation_flag(saved)}, is {activation_flag(now)}")
        elif saved != now:
            found.refused.append(f"{name.replace('_', '-')} was {saved}, is {now}")
    for name, entry in sorted(ENTRIES.items()):
        now, rule = config.value(name), entry.flag.resume
        if rule is Resume.SILENT or name not in manifest.args or manifest.args[name] == now:
            continue
        line = f"{entry.flag.name} was {manifest.args[name]}, is {now}"
        (found.refused if rule is Resume.FIXED else found.allowed).append(line)
    other_files = manifest.data.get(BLEND) != data.get(BLEND)
    for name, now in data.items():
        saved = manifest.data.get(name, now)  # older checkpoints lack some
        if saved != now and not (name == CONTENT and other_files):
            (found.allowed if name == MODIFIED else found.refused).append(f"{name} was {saved}, is {now}")
    return found


def refuse_changes(manifest: Manifest, config: Config, changed: list[str], where: Path) -> UserError:
    """The error for a resume that would silently become a different run."""
    hint = ""
    if any(line.startswith("--global-batch-size") for line in changed):
        saved, micro = manifest.args["global_batch_size"], config.training.micro_batch_size
        model_parallel = config.parallel.model
        if saved % (micro * config.parallel.data) == 0:
            hint = f"give --global-batch-size {saved}, "
        elif saved % micro:
            hint = f"give --global-batch-size {saved} and a --micro-batch-size that divides it, "
        elif micro * model_parallel == 1:
            hint = f"start a number of processes that divides {saved}, "
        else:
            hint = (
                f"start {model_parallel} x D processes, D such that --micro-batch-size {micro} x D divides {saved}, "
                f"and give --global-batch-size {saved}, "
            )
    return UserError(
        f"{where} was saved by a run with different settings: {'; '.join(changed)}; {hint}use the saved flags, "
        "another --save, or --override-checkpoint-args to continue with the new ones"
    )


def describe_data(config: Config) -> dict[str, str]:
    """What a run reads: the blend of its training data with file sizes, a digest of samples of its
    content and when it was modified, and the tokenizer's digest.

    File names without directories, so that a copy elsewhere is the same data.
    """
    blend = []
    files: dict[Path, None] = {}  # in order, each once
    for group in groups_of(config, "train"):
        for part in group.parts:
            found = [file for file in token_files(part.prefix) if file.is_file()]
            size = sum(file.stat().st_size for file in found)
            blend.append(f"{part.weight:g} {part.start:g}:{part.end:g} {Path(part.prefix).name} ({size} bytes)")
            files.update(dict.fromkeys(found))
    data = {BLEND: ", ".join(blend)} if blend else {}  # --skip-train may have none
    if files:
        data[CONTENT] = f"sampled digest {sampled_digest(files)}"
        data[MODIFIED] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(modified(files)))
    if tokenizer := tokenizer_files.fingerprint(Path(config.data.tokenizer_file)):
        data["tokenizer"] = tokenizer
    return data
