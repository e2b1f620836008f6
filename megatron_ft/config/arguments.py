"""From a command line of the training program to a settled `Config`, or to a one-line error.

`parse_args(argv, world_size)` validates before any process group exists. Hyphens and underscores
are interchangeable. What is not given comes from the preset, the checkpoint to start from, or the
default that --help shows.
"""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path

from megatron_ft.config.command_line import build_parser, check_bounds, former_spellings, with_config
from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.config_file import PRINT_CONFIG, as_yaml
from megatron_ft.config.flag import MEGATRON, TRANSFORMERS
from megatron_ft.config.mtf_flags import ACCEPTED, REFUSED
from megatron_ft.config.parser import Parser
from megatron_ft.errors import UserError
from megatron_ft.model.activation import ACTIVATIONS
from megatron_ft.model.families import PRESETS, family_of
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.starcoder2 import DEFAULT_ROTARY_BASE, STARCODER2
from megatron_ft.model.tensor_names import LORA_TARGETS

LENGTHS = ("iters", "samples", "tokens", "epochs")  # units of --train-...


def parse_args(argv: Sequence[str], world_size: int = 1, engine: str = MEGATRON) -> Config:
    """Parse, settle and validate a command line for `world_size` processes of an engine.

    Raises UserError.
    """
    parser = build_parser()
    words, notices = normalize(with_config(argv), parser.actions)
    parsed = parser.parse_args(words)
    config = Config.from_namespace(parsed, world_size, engine)
    config.notices.extend(notices)
    config.given.update(parser.settings_of(parsed, all_of_them=False))
    check_bounds(config.values())
    check_engine(config)
    config = settle(config)
    validate(config)
    return config


def print_settings(own: Parser, argv: Sequence[str]) -> None:
    """Print all settings of a program with flags of its `own` next to those of training, as a file
    for --config."""
    training = build_parser(reads_config=False)
    words, _ = normalize([word for word in argv if word != PRINT_CONFIG], {**own.actions, **training.actions})
    parsed, rest = own.parse_known_args(words)
    print(as_yaml(own.settings_of(parsed) | training.settings_of(training.parse_args(rest))), end="")


def normalize(argv: Sequence[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """The words of a command line in the spellings of `known`, and notices about those left out.

    Underscores become hyphens, other spellings the current one; flags without effect are left out.
    Raises UserError for flags that are refused or unknown.
    """
    words: list[str] = []
    notices: list[str] = []
    skip = 0
    spellings = former_spellings()
    for word in argv:
        if skip:
            skip -= 1
            continue
        if not word.startswith("--") or word == "--":
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in ACCEPTED:
            flag = flag.replace("_", "-")
        flag = spellings.get(flag, flag)
        if flag in known:
            words.append(flag + equals + value)
        elif flag in ACCEPTED:
            skip = 0 if equals else ACCEPTED[flag]
            notices.append(f"{flag} has no effect here and is ignored")
        elif flag in REFUSED:
            raise UserError(f"{flag}: {REFUSED[flag]}")
        else:
            near = difflib.get_close_matches(flag, known, n=1)
            raise UserError(f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    return words, notices


def check_engine(config: Config) -> None:
    """Raise UserError for the first flag, not at its default, that the engine does not have."""
    for dest, entry in ENTRIES.items():
        only = entry.flag.only
        if only not in (None, config.engine) and config.value(dest) != entry.default:
            raise UserError(f"{entry.flag.name}: only --engine {only} has it; leave it out, or use that engine")


def settle(config: Config) -> Config:
    """Fill in what flags imply about each other: the shape of a preset, batch sizes, other names.

    Flags without effect are turned off, with a notice.
    """
    config = _settle_training(config)
    shape = None
    if config.model.preset:
        shape = shape_from_flags(config, PRESETS[config.model.preset])
    elif config.model.num_layers and config.model.hidden_size and config.model.num_attention_heads:
        positions = config.data.seq_length or 8192
        base = ModelShape(num_layers=1, hidden_size=2, num_attention_heads=2, max_position_embeddings=positions)
        shape = shape_from_flags(config, base)
    if shape:
        config = with_shape(config, shape)
    data, parallel = config.data, config.parallel
    if data.prefix and not config.validation.skip_train and data.validation_fraction is None:
        if validation_fraction(config) == 0:
            config.notices.append(
                "validation groups are given, so training takes all of --data-prefix; "
                "--validation-fraction holds out part of it"
            )
    if config.training.global_batch_size is None:
        batch = config.training.micro_batch_size * max(1, parallel.data)
        config = config.with_flags(global_batch_size=batch)
    if config.engine == MEGATRON and config.optimizer.name == "sgd" and parallel.distributed_optimizer:
        config = config.with_flags(use_distributed_optimizer=False)
        config.notices.append(
            "--optimizer sgd: only Adam's state is sharded across data-parallel ranks, each keeps its own"
        )
    if parallel.sequence and parallel.tensor == 1:
        config = config.with_flags(sequence_parallel=False)
        config.notices.append("--sequence-parallel needs --tensor-model-parallel-size above 1 and is off")
    config = _settle_overlap(config)
    if not config.lora.rank:
        config.notices.extend(
            f"{ENTRIES[dest].flag.name} has no effect without --lora-rank: all weights are trained"
            for dest in ("lora_alpha", "lora_dropout", "lora_targets")
            if config.value(dest) != ENTRIES[dest].default
        )
    if data.reset_attention_mask and not data.reset_position_ids:
        config.notices.append("--no-reset-position-ids: positions continue across the documents of a sequence")
    return config


def _settle_overlap(config: Config) -> Config:
    """Overlap data-parallel communication with computation, where there is some and no flag decides
    it."""
    parallel = config.parallel
    if config.engine == TRANSFORMERS:  # which overlaps by itself
        return config.with_flags(overlap_grad_reduce=False, overlap_param_gather=False)
    if parallel.overlap_grad_reduce is None:
        config = config.with_flags(overlap_grad_reduce=parallel.data > 1)
    if parallel.overlap_param_gather is None:
        possible = config.parallel.overlap_grad_reduce and parallel.distributed_optimizer
        # With --optimizer-cpu-offload the weights come from the host, after its step.
        overlaps = possible and parallel.data > 1 and not config.optimizer.cpu_offload
        config = config.with_flags(overlap_param_gather=overlaps)
    return config


def _settle_training(config: Config) -> Config:
    """Other names of flags to one, and what flags about training imply."""
    config = config.with_flags(load=config.checkpoint.load or config.checkpoint.finetune_from)
    if config.engine == MEGATRON and config.lora.rank and config.memory.transformer_impl == "auto":
        config = config.with_flags(transformer_impl="local")  # Transformer Engine's layers take no adapters
    if config.memory.recompute_activations:
        config = config.with_flags(recompute_granularity=config.memory.recompute_granularity or "selective")
    if config.engine == MEGATRON and config.memory.recompute_granularity == "full":
        config = config.with_flags(
            recompute_method=config.memory.recompute_method or "uniform",
            recompute_num_layers=config.memory.recompute_num_layers or 1,
        )
    if config.validation.skip_train:  # no length, and no schedule over it
        config = config.with_flags(**{f"train_{unit}": None for unit in LENGTHS})
        config = config.with_flags(
            train_iters=1,
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_warmup_samples=0,
            lr_warmup_fraction=None,
        )
    return config


def with_shape(config: Config, shape: ModelShape) -> Config:
    """`config` for a model of `shape`; the sequence length is the model's where none was given."""
    config = replace(config, shape=shape)
    if config.data.seq_length is None:
        config = config.with_flags(seq_length=shape.max_position_embeddings)
    return config


def shape_from_flags(config: Config, base: ModelShape) -> ModelShape:
    """`base` with every architecture flag that was given put over it."""
    model = config.model
    given = {f.name: getattr(model, f.name) for f in fields(ModelShape) if getattr(model, f.name, None) is not None}
    heads = given.get("num_attention_heads", base.num_attention_heads)
    multi_head = base.num_query_groups == base.num_attention_heads > 1
    if model.attention_head_type or (multi_head and not model.num_query_groups):
        if model.num_query_groups:
            raise UserError("--attention-head-type and --num-query-groups exclude each other; keep one")
        given["num_query_groups"] = 1 if model.attention_head_type == "multiquery" else heads
    if model.activation:
        given["exact_gelu"] = ACTIVATIONS[model.activation]
    if "hidden_size" in given and "ffn_hidden_size" not in given:
        given["ffn_hidden_size"] = 0
    rotary = model.position_embedding_type == "rope" if model.position_embedding_type else not base.learned_positions
    if model.rotary_base and not rotary:
        raise UserError(f"--rotary-base {model.rotary_base:g} needs --position-embedding-type rope; add it")
    given["rotary_base"] = (model.rotary_base or base.rotary_base or DEFAULT_ROTARY_BASE) if rotary else 0.0
    if rotary and base.learned_positions:
        given["family"] = STARCODER2.model_type
    shape = replace(base, **given)
    family_of(shape).check(shape)
    return shape


def validation_fraction(config: Config) -> float:
    """Fraction of `--data-prefix` that is held out of training.

    0.05 by default, 0 when validation groups of their own are given.
    """
    data = config.data
    if data.validation_fraction is not None:
        return data.validation_fraction
    return 0.0 if any(data.split_source("valid")) else 0.05


def validate(config: Config) -> None:
    """Raise UserError for the first contradiction, naming the flags and the remedy."""
    _validate_layout(config)
    optimizer, parallel, precision = config.optimizer, config.parallel, config.precision
    if optimizer.cpu_offload and not (precision.name != "fp32" and parallel.distributed_optimizer):
        raise UserError("--optimizer-cpu-offload needs --bf16 or --fp16, and the distributed optimizer; add the first")
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        raise UserError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; "
            "add them, or --no-overlap-param-gather"
        )
    iters = config.validation.iters
    if iters != "full" and not (iters.isdecimal() and int(iters) > 0):
        raise UserError(f"--eval-iters {iters}: give a number of batches, at least 1, or 'full'")
    tensorboard = config.logging.tensorboard_dir
    if tensorboard and Path(tensorboard).exists() and not Path(tensorboard).is_dir():
        raise UserError(f"--tensorboard-dir {tensorboard}: is a file; give a directory")
    _validate_shape(config)
    _validate_data(config)
    _validate_length(config)


def _validate_layout(config: Config) -> None:
    parallel, training = config.parallel, config.training
    tp, pp, cp = parallel.tensor, parallel.pipeline, parallel.context
    if cp > 1:
        raise UserError(
            f"--context-parallel-size {cp}: Megatron-Core splits packed sequences across ranks only inside "
            "Transformer Engine's attention, which this program does not rely on; leave it at 1 and use "
            "--sequence-parallel or --recompute-granularity full for long sequences"
        )
    if parallel.world_size % parallel.model:
        raise UserError(
            f"{parallel.world_size} processes cannot be split into --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp}; start a multiple of {parallel.model}"
        )
    step = training.micro_batch_size * parallel.data
    if training.global_batch_size % step:
        raise UserError(
            f"--global-batch-size {training.global_batch_size} is not a multiple of --micro-batch-size "
            f"{training.micro_batch_size} x {parallel.data} data-parallel ranks; "
            f"try {max(1, round(training.global_batch_size / step)) * step}"
        )


def _validate_shape(config: Config) -> None:
    shape, recompute = config.shape, config.memory.recompute_num_layers
    if shape is None:
        if not config.checkpoint.load and not config.checkpoint.save:
            preset = "" if config.engine == TRANSFORMERS else f"--preset (one of {', '.join(sorted(PRESETS))}) or "
            raise UserError(f"no model: give {preset}--load DIR")
        return
    shape.check_layout(config.parallel.tensor, config.parallel.pipeline)
    check_positions(config)
    layers = shape.num_layers // config.parallel.pipeline
    if recompute and recompute > layers:
        raise UserError(f"--recompute-num-layers {recompute}: a pipeline stage has {layers} layers; give at most that")


def check_positions(config: Config) -> None:
    """Raise UserError if sequences are longer than the model's positions."""
    if config.shape and config.data.seq_length > config.shape.max_position_embeddings:
        raise UserError(
            f"--seq-length {config.data.seq_length} exceeds the model's {config.shape.max_position_embeddings} "
            "positions; use at most that, or raise --max-position-embeddings when training from scratch"
        )


def _validate_data(config: Config) -> None:
    data = config.data
    if data.prefix and any(data.split_source("train")):
        raise UserError("--data-prefix and --train-weighted-split-paths(-path) exclude each other; keep one")
    for split in ("train", "valid", "test"):
        path, lines = data.split_source(split)
        if path and lines:
            raise UserError(
                f"--{split}-weighted-split-paths and --{split}-weighted-split-paths-path exclude each other; keep one"
            )
        if path and not Path(path).is_file():
            raise UserError(f"--{split}-weighted-split-paths-path {path}: no such file")
    if not data.prefix and not any(data.split_source("train")) and not config.validation.skip_train:
        raise UserError("no training data: give --data-prefix PREFIX or --train-weighted-split-paths-path FILE")
    if not data.tokenizer_file:
        raise UserError("--tokenizer-file is missing: give the tokenizer that the data were tokenized with")
    if not Path(data.tokenizer_file).exists():
        raise UserError(f"--tokenizer-file {data.tokenizer_file}: no such file")


def _validate_length(config: Config) -> None:
    if all(config.value(f"train_{unit}") is None for unit in LENGTHS):
        raise UserError(
            f"the length of training is missing; give one of {', '.join(f'--train-{unit}' for unit in LENGTHS)}"
        )
    _validate_rampup(config)
    schedule = config.schedule
    for flag, value in (("--min-lr", schedule.min_lr), ("--lr-warmup-init", schedule.warmup_init)):
        if value > schedule.lr:
            raise UserError(f"{flag} {value:g} is above --lr {schedule.lr:g}; lower it, or raise --lr")
    unknown = [name for name in config.lora.targets.split(",") if name not in LORA_TARGETS]
    if unknown and config.engine == MEGATRON:  # transformers' modules have other names
        raise UserError(f"--lora-targets: {unknown[0]!r} is not one of {', '.join(LORA_TARGETS)}")


def _validate_rampup(config: Config) -> None:
    """Raise UserError when --rampup-batch-size does not divide into complete steps."""
    training = config.training
    if not training.rampup_batch_size:
        return
    start, increment, samples = training.rampup_batch_size
    unit = training.micro_batch_size * config.parallel.data
    for name, value in (("START", start), ("INCREMENT", increment)):
        if value <= 0 or value % unit:
            raise UserError(
                f"--rampup-batch-size {name} {value} is not a positive multiple of "
                f"--micro-batch-size x data-parallel ranks = {unit}"
            )
    if samples < 0 or start > training.global_batch_size or (training.global_batch_size - start) % increment:
        raise UserError(
            f"--rampup-batch-size {start} {increment} {samples} does not reach "
            f"--global-batch-size {training.global_batch_size} in complete increments"
        )
