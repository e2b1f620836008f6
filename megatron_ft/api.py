"""The programs as functions: tokenize, open_dataset, plan, finetune, convert, load_model.

    from megatron_ft import finetune

    result = finetune(preset="tiny", from_scratch=True, data_prefix="data/rows", ...)

Arguments are the flags of the program in question, with underscores (config/keywords.py); its
--help and docs/ explain them. Functions print what the programs print, raise UserError
where these end with one line, and leave the process as it was: signal handlers, environment, and
torch's threads, devices and process groups.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from megatron_ft.config.config import Config
    from megatron_ft.conversion.converted import Converted
    from megatron_ft.conversion.load_model import LoadedModel
    from megatron_ft.data.packed_dataset import PackedDataset
    from megatron_ft.launcher.planning import Plan
    from megatron_ft.launcher.training import Training
    from megatron_ft.tokenizing.tokenize_rows import Tokenized

AnyPath = str | os.PathLike[str]


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Undo changes of environment variables, by which transformers and torch are configured."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@_same_environment()
def tokenize(
    rows: AnyPath | Sequence[AnyPath],
    *,
    tokenizer_file: AnyPath,
    output_prefix: AnyPath,
    **flags: Any,
) -> "Tokenized":
    """Tokenize JSONL files into PREFIX_inputs_document.bin and so on, as preprocess/tokenize.py.

    Args:
        rows: a JSONL file (also .gz, .zst), a directory of them, or several.
        tokenizer_file: tokenizer.json, SentencePiece .model, or Hugging Face directory.
        output_prefix: start of the output file names.
        flags: others of preprocess/tokenize.py, such as messages_key="messages".

    Returns the numbers of rows and tokens that were written, and of rows that were skipped.
    """
    from megatron_ft.config.keywords import command_line
    from megatron_ft.tokenizing.flags import parse_tokenize, tokenize_parser
    from megatron_ft.tokenizing.tokenize_rows import tokenize_rows

    several = [str(path) for path in ([rows] if isinstance(rows, (str, os.PathLike)) else rows)]
    given = {"input": several, "tokenizer_file": tokenizer_file, "output_prefix": output_prefix, **flags}
    args = parse_tokenize(command_line(given, tokenize_parser().settable, {}, "tokenize"))
    if args.missing_shards:
        raise UserError("tokenize(): 'missing_shards' is for the program, which lists them; leave it out")
    if args.messages_key:
        import torch  # noqa: F401  # chat_template.py would hide it from transformers, for load_model too
    return tokenize_rows(args)


@_same_environment()
def open_dataset(*, split: str = "train", group: str | None = None, **flags: Any) -> "PackedDataset":
    """The packed sequences that training reads with these flags.

    Args:
        split: "train" (one epoch of it), "valid" or "test".
        group: which validation or test group; the first by default.
        flags: of training; at least data_prefix (or train_weighted_split_paths), tokenizer_file,
            and seq_length, preset or load.

    Returns a sequence of samples with `tokens`, `segment_ids` and `is_inputs`, arrays of seq_length
    + 1. Packing indices are kept next to the data, as in training.
    """
    from megatron_ft.data.packed_dataset import build_datasets, sequences_per_epoch
    from megatron_ft.tokenizer.tokenizer import load_tokenizer

    if split not in ("train", "valid", "test"):
        raise UserError(f"open_dataset(): split {split!r}: expected 'train', 'valid' or 'test'")
    config = _config_of_data(flags)
    tokenizer = load_tokenizer(config.data.tokenizer_file)
    datasets = build_datasets(
        config,
        train_samples=sequences_per_epoch(config) if split == "train" else None,
        pad=tokenizer.eod if tokenizer.pad is None else tokenizer.pad,
        vocab_size=tokenizer.vocab_size,
    )
    for notice in datasets.notices:
        print(notice)
    if split == "train":
        if datasets.train is None:
            raise UserError("open_dataset(): no training data; give data_prefix or train_weighted_split_paths")
        return datasets.train
    groups = datasets.valid if split == "valid" else datasets.test
    name = group or next(iter(groups), None)
    if name not in groups:
        raise UserError(
            f"open_dataset(): no {split} group{f' {group!r}' if group else ''}; there are: {', '.join(groups) or 'none'}"
        )
    return groups[name]


def _config_of_data(flags: dict[str, Any]) -> "Config":
    """The settled flags of training, of which those about its length may be missing.

    Raises UserError.
    """
    from megatron_ft.config.arguments import normalize, settle, with_shape
    from megatron_ft.config.command_line import build_parser, check_bounds, former_spellings, with_config
    from megatron_ft.config.config import Config
    from megatron_ft.config.keywords import command_line
    from megatron_ft.weights.stored_shape import stored_shape

    parser = build_parser()
    words = command_line(flags, parser.settable, former_spellings(), "open_dataset")
    words, _ = normalize(with_config(words), parser.actions)
    config = Config.from_namespace(parser.parse_args(words))
    check_bounds(config.values())
    config = settle(config)
    if config.shape is None and (load := config.checkpoint.load):
        shape = stored_shape(load, config.checkpoint.load_iteration)
        config = with_shape(config, shape) if shape else config
    if not config.data.tokenizer_file or not config.data.seq_length:
        missing = "seq_length, preset or load" if config.data.tokenizer_file else "tokenizer_file"
        raise UserError(f"open_dataset(): give {missing}")
    return config


@_same_environment()
def plan(*, gpu: str, nodes: int = 1, gpus_per_node: int = 8, **flags: Any) -> "Plan":
    """Whether a run fits and how long it takes, as launch/plan.py finds it; nothing is started.

    Args:
        gpu: kind of GPU, such as "h100-80gb".
        nodes: nodes of the job.
        gpus_per_node: GPUs per node.
        flags: others of launch/plan.py, and those of training.

    Returns the given layout if one was given, else or if it does not fit the best three, each with
    `flags()`, `memory` in bytes per GPU, and `step_seconds`.
    """
    from megatron_ft.config.command_line import build_parser, former_spellings
    from megatron_ft.config.keywords import command_line
    from megatron_ft.launcher.planning import make_plan, parse_plan, plan_parser

    given = {"gpu": gpu, "nodes": nodes, "gpus_per_node": gpus_per_node, **flags}
    known = plan_parser().settable | build_parser(reads_config=False).settable
    return make_plan(*parse_plan(command_line(given, known, former_spellings(), "plan")))


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended.

    save: directory of its checkpoints and logs; without it (None) nothing else is known.
    finished: False if a signal or a limit stopped it after saving; the same call resumes it.
    iterations: optimizer steps done, those of earlier starts included.
    losses: training loss of each step; None where a step had no token with loss.
    validation: last loss of each validation group.
    """

    save: Path | None
    finished: bool
    iterations: int
    losses: list[float | None]
    validation: dict[str, float | None]


@_same_environment()
def finetune(*, num_processes: int | None = None, engine: str = "megatron-core", **flags: Any) -> FinetuneResult:
    """Train on this machine as launch/finetune.py does: ranks are processes of their own.

    The same call resumes a run in `save`. Ctrl-C saves after the current step and returns. On a
    cluster, submit a job with launch/submit.py instead.

    Args:
        num_processes: ranks (default: the number of GPUs; on the CPU as few as the layout takes).
        engine: "megatron-core" or "transformers".
        flags: of training.

    Raises UserError, also for what only the ranks find, and RuntimeError if one fails otherwise.
    """
    from megatron_ft.config.command_line import build_parser, former_spellings, with_config
    from megatron_ft.config.config_file import LAUNCHED_WITH
    from megatron_ft.config.flag import MEGATRON, TRANSFORMERS
    from megatron_ft.config.keywords import command_line
    from megatron_ft.launcher.command import local_gpus
    from megatron_ft.launcher.local_ranks import local_environment
    from megatron_ft.launcher.start_check import check_start
    from megatron_ft.launcher.training import check_gpus, check_training, local_processes

    known = build_parser(reads_config=False).settable
    words = with_config(command_line(flags, known, former_spellings(), "finetune"))
    if engine not in (MEGATRON, TRANSFORMERS):
        raise UserError(f"finetune(): engine {engine!r}: expected {MEGATRON!r} or {TRANSFORMERS!r}")
    gpus = local_gpus()
    number = local_processes(num_processes, gpus, words)
    training = check_training(engine, words, number)
    check_gpus(number, gpus)
    for warning in check_start(training.config, engine).warnings:
        print(warning)
    own = ({"num-processes": num_processes} if num_processes else {}) | (
        {"engine": engine} if engine != MEGATRON else {}
    )
    status, error = _run_ranks(training, number, {**local_environment(number, gpus), LAUNCHED_WITH: json.dumps(own)})
    if status == EXIT_USER_ERROR:
        raise UserError(error or "training ended with a user error; its output above gives the reason")
    if status not in (EXIT_DONE, EXIT_RESUME):
        raise RuntimeError(f"training ended with status {status}; its output above gives the reason")
    return _result(training.config.checkpoint.save, finished=status == EXIT_DONE)


def _run_ranks(training: "Training", number: int, environment: dict[str, str]) -> tuple[int, str]:
    """Run the ranks with rank 0's output copied to sys.stdout; the exit status, and the last line
    of an error without its "error: ".

    sys.stdout may be a notebook's, which a child process does not write to.
    """
    from megatron_ft.launcher.local_ranks import run_local_ranks

    errors = [""]
    read, write = os.pipe()

    def copy() -> None:
        with open(read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                print(line, end="", flush=True)
                if line.startswith("error: "):
                    errors.append(line.removeprefix("error: ").rstrip())

    copying = threading.Thread(target=copy)
    copying.start()
    try:
        status = run_local_ranks(
            training.command, number, environment, training.logs, training.stop_signal, output=write
        )
    finally:
        os.close(write)
        copying.join()
    return status, errors[-1]


def _result(save: str | None, *, finished: bool) -> FinetuneResult:
    from megatron_ft.metrics.lines import METRICS, VALIDATION, read_log

    if save is None:
        return FinetuneResult(None, finished, 0, [], {})
    steps = read_log(Path(save), METRICS)
    validation = {line["group"]: line["loss"] for line in read_log(Path(save), VALIDATION)}
    iterations = steps[-1]["iteration"] if steps else 0
    return FinetuneResult(Path(save), finished, iterations, [step["loss"] for step in steps], validation)


@_same_environment()
def convert(load: AnyPath, output: AnyPath, *, format: str = "huggingface", **flags: Any) -> "Converted":
    """Convert a checkpoint, as convert/megatron_to_hf.py and convert/hf_to_megatron.py do.

    Args:
        load: directory of a run, or of a Hugging Face model.
        output: new directory; it appears only when it is complete.
        format: "huggingface" of a Megatron checkpoint, else "torch_dist" or "legacy".
        flags: others of the two programs, such as merge_lora=True or dtype="bf16".
    """
    from megatron_ft.config.keywords import command_line
    from megatron_ft.conversion import flags as parsers

    if format not in ("huggingface", "torch_dist", "legacy"):
        raise UserError(f"convert(): format {format!r}: expected 'huggingface', 'torch_dist' or 'legacy'")
    if format == "huggingface":
        given = {"load": load, "output": output, **flags}
        args = parsers.parse_to_hf(command_line(given, parsers.to_hf_parser().settable, {}, "convert"))

        from megatron_ft.conversion.to_hf import to_hf  # imports torch

        return to_hf(args)
    given = {"load": load, "save": output, "format": format, **flags}
    args = parsers.parse_to_megatron(command_line(given, parsers.to_megatron_parser().settable, {}, "convert"))

    from megatron_ft.conversion.to_megatron import to_megatron  # imports torch

    return to_megatron(args)


@_same_environment()
def load_model(checkpoint: AnyPath, *, iteration: int | str = "latest") -> "LoadedModel":
    """A model in transformers with its tokenizer, to complete prompts or for code of your own.

    Args:
        checkpoint: Hugging Face directory, or a run, which is converted to a temporary directory;
            adapters are added to their base.
        iteration: of a run: a number, "best" or "latest".
    """
    from megatron_ft.conversion.load_model import load_any

    return load_any(Path(checkpoint), str(iteration))
