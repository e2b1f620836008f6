"""Start or resume, decided by looking: what `--save` holds, and which flags a resumed run may change.

A save directory that holds checkpoints is resumed; else `--load` gives weights for step 0; else `--from-scratch` allows random weights.
"""

import contextlib
from dataclasses import fields
from pathlib import Path

from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.flag import Resume
from megatron_ft.data.indexed import field_paths
from megatron_ft.data.splits import groups_of
from megatron_ft.errors import UserError
from megatron_ft.model.shape import ModelShape
from megatron_ft.tokenizer import files as tokenizer_files
from megatron_ft.weights.adapters import open_start
from megatron_ft.weights.directory import TRACKER, iteration_directory, list_iterations, read_tracker
from megatron_ft.weights.fingerprint import is_base
from megatron_ft.weights.manifest import NAME, Damaged, Manifest, read_manifest


def newest_manifest(config: Config) -> Manifest | None:
    """Manifest of the checkpoint that this command line resumes, None for a first start. Reads that file alone, so it is cheap;
    whether the checkpoint is whole is seen when it is loaded."""
    save = Path(config.checkpoint.save) if config.checkpoint.save else None
    for iteration in list_iterations(save) if save else []:
        with contextlib.suppress(Damaged):
            return read_manifest(iteration_directory(save, iteration))
    return None


def starting_shape(config: Config) -> ModelShape | None:
    """Architecture of the checkpoint that this command line starts from or resumes, None when the flags must tell.

    Asked before a model is built; reads one manifest or the names in a weights directory.
    """
    if manifest := newest_manifest(config):
        return ModelShape(**manifest.shape)
    if config.checkpoint.load:
        source, _ = open_start(config.checkpoint.load, config.checkpoint.load_iteration, config.values())
        return source.shape
    return None


def candidates(save: Path) -> tuple[list[int], list[str]]:
    """Iterations to try, newest first, and lines about what the tracker file says that is not so.

    Raises UserError for a directory that holds somebody else's checkpoints, or a tracker with nothing behind it.
    """
    iterations = list_iterations(save)
    directories = [iteration_directory(save, iteration) for iteration in iterations]
    if directories and not any((directory / NAME).exists() for directory in directories):
        foreign = next((d for d in directories if any(d.glob("mp_rank_*")) or (d / ".metadata").exists()), None)
        if foreign:
            raise UserError(
                f"--save {save} holds checkpoints of another program ({foreign.name} has no {NAME}); "
                f"give it as --load {save} to start from their weights, and an empty directory as --save"
            )
    tracker = read_tracker(save)
    if tracker == "release" and not iterations:
        raise UserError(
            f"--save {save} holds a converted checkpoint, weights without a run; give it as --load {save}, and an empty directory as --save"
        )
    if tracker is None and iterations:
        return iterations, [f"{save / TRACKER} is missing; found by looking: iteration {iterations[0]}"]
    if tracker is not None and not (tracker.isdigit() and int(tracker) in iterations):
        if not iterations:
            raise UserError(
                f"{save / TRACKER} names iteration {tracker}, but {save} holds no checkpoint; "
                "put the checkpoint back, or remove that file to start anew"
            )
        return iterations, [f"{save / TRACKER} names iteration {tracker}, which is not there; trying {iterations[0]}"]
    return iterations, []


def saved_best(save: Path, until: int) -> int | None:
    """The best of the checkpoints in `save` up to an iteration: the last whose manifest says that nothing before it was better."""
    for iteration in list_iterations(save):
        if iteration <= until:
            with contextlib.suppress(Damaged):
                best = read_manifest(iteration_directory(save, iteration)).state["best"]
                if best and best["iteration"] == iteration:
                    return iteration
    return None


def none_is_whole(save: Path, damage: list[str]) -> UserError:
    """The error for a directory whose every checkpoint is damaged."""
    return UserError(
        f"--save {save}: none of its {len(damage)} checkpoints is whole ({'; '.join(damage)}); "
        "restore one, or give another --save: a fresh start is never made over damaged checkpoints"
    )


def choose_first_start(config: Config) -> tuple[str, str]:
    """("weights" or "scratch", why) for a run whose --save holds no checkpoint. Raises UserError when neither is allowed."""
    empty = f"--save {config.checkpoint.save} holds no checkpoint" if config.checkpoint.save else "no --save"
    if config.checkpoint.load:
        ignored = [
            ENTRIES[flag].flag.name
            for flag in ("finetune", "no_load_optim", "no_load_rng", "reset_progress")
            if config.value(flag)
        ]
        note = f" ({', '.join(ignored)}: always so on a first start)" if ignored else ""
        return "weights", f"{empty}: weights alone from {config.checkpoint.load}, step 0{note}"
    if config.checkpoint.from_scratch:
        return "scratch", f"{empty} and no --load: random weights (--from-scratch)"
    raise UserError(
        f"{empty}, and no --load DIR is given; give one to fine-tune from, or --from-scratch for random weights"
    )


def find_base(base: dict, config: Config, where: Path) -> tuple[str, int | str]:
    """(directory, iteration) of the weights that the adapters in `where` were trained on: where they were, or else --load.

    Raises UserError when neither holds them.
    """
    iteration = "latest" if base["iteration"] is None else base["iteration"]
    places = [(base["path"], iteration)]
    if config.checkpoint.load:
        places += [(config.checkpoint.load, iteration), (config.checkpoint.load, config.checkpoint.load_iteration)]
    looked, others = [], False
    for place in dict.fromkeys(places):
        try:
            source, _ = open_start(*place, config.values())
        except UserError as error:
            looked.append(str(error))
            continue
        if is_base(source, base):
            return place
        looked.append(f"{source.path} holds others")
        others = True
    what = (
        "the base weights are not those the adapters were trained on"
        if others
        else "the base weights of its adapters are gone"
    )
    raise UserError(
        f"{where}: {what}: {'; '.join(dict.fromkeys(looked))}; put them back at {base['path']}, or give --load DIR (and --load-iteration N) "
        "of where they are now"
    )


def compare(manifest: Manifest, config: Config, shape: ModelShape, now_data: dict) -> tuple[list[str], list[str]]:
    """Differences between a checkpoint's run and this command line: those that make it another run, and the others."""
    changed, others = [], []
    for f in fields(ModelShape):
        saved, now = manifest.shape.get(f.name), getattr(shape, f.name)
        if saved != now:
            changed.append(f"{f.name.replace('_', '-')} was {saved}, is {now}")
    for name, entry in sorted(ENTRIES.items()):
        now, rule = config.value(name), entry.flag.resume
        if rule is Resume.SILENT or name not in manifest.args or manifest.args[name] == now:
            continue
        line = f"{entry.flag.name} was {manifest.args[name]}, is {now}"
        (changed if rule is Resume.FIXED else others).append(line)
    for what, is_now in now_data.items():
        was = manifest.data.get(what, is_now)
        if was != is_now:
            changed.append(f"{what} was {was}, is {is_now}")
    return changed, others


def refuse_changes(manifest: Manifest, config: Config, changed: list[str], where: Path) -> UserError:
    """The error for a resume that would silently be another run."""
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
        f"{where} is another run's: {'; '.join(changed)}; {hint}use the saved flags, another --save, "
        "or --override-checkpoint-args to go on with the new ones"
    )


def describe_data(config: Config) -> dict[str, str]:
    """What a run reads, without where it lies: the blend of its training groups with the files' sizes, and the tokenizer's digest."""
    blend = []
    for group in groups_of(config, "train"):
        for part in group.parts:
            files = [Path(field + suffix) for field in field_paths(part.prefix) for suffix in (".bin", ".idx")]
            size = sum(file.stat().st_size for file in files if file.is_file())
            blend.append(f"{part.weight:g} {part.start:g}:{part.end:g} {Path(part.prefix).name} ({size} bytes)")
    found = {"training data": ", ".join(blend)} if blend else {}  # --skip-train may have none
    if tokenizer := tokenizer_files.fingerprint(Path(config.data.tokenizer_file)):
        found["tokenizer"] = tokenizer
    return found
