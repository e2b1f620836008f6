"""Command-line flags of the training program: Megatron's names, grouped as people think of them.

`parse_args(argv, world_size)` gives a validated Namespace or raises UserError with one line, before any process group exists.
Hyphens and underscores are the same. What the user leaves out comes from the preset, the checkpoint to start from, or the default shown by --help.
"""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_ft.branch_flags import ACCEPTED, REFUSED, RENAMED
from megatron_ft.engine.schedule import check_rampup
from megatron_ft.errors import UserError
from megatron_ft.models import PRESETS, ModelShape


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors: the flag named, the nearest right one suggested."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag's default is shown, unless there is none to show."""

    def _get_help_string(self, action):
        hide = action.default in (None, False, argparse.SUPPRESS) or action.required
        return action.help if hide else super()._get_help_string(action)


def build_parser() -> Parser:
    """The parser with all groups; every flag's help says what it does in one line."""
    parser = Parser(
        prog="megatron_ft.finetune", description=__doc__.split("\n\n")[0], formatter_class=Help, allow_abbrev=False
    )
    _add_model(
        parser.add_argument_group(
            "model", "architecture; a preset or the checkpoint to start from fills it in"
        ).add_argument
    )
    _add_data(parser.add_argument_group("data").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)
    _add_learning_rate(parser.add_argument_group("learning rate").add_argument)
    _add_precision(parser.add_argument_group("precision").add_argument)
    _add_parallel(parser.add_argument_group("parallel layout").add_argument)
    _add_memory(parser.add_argument_group("memory and speed").add_argument)
    _add_lora(parser.add_argument_group("LoRA").add_argument)
    _add_validation(parser.add_argument_group("validation").add_argument)
    _add_checkpoint(parser.add_argument_group("checkpoints").add_argument)
    _add_logging(parser.add_argument_group("logging and stopping").add_argument)
    return parser


def _add_model(add) -> None:
    add("--preset", choices=sorted(PRESETS), help="published model whose numbers fill in what is not given")
    add("--num-layers", type=int, help="transformer layers")
    add("--hidden-size", type=int, help="width of the model")
    add("--num-attention-heads", type=int, help="query heads")
    add("--ffn-hidden-size", type=int, help="width of the feed-forward layers; 4 x hidden size when not given")
    add("--max-position-embeddings", type=int, help="learned positions; the longest sequence the model can see")
    add(
        "--attention-head-type",
        choices=["multiquery", "multihead"],
        help="one key/value head for all, or one a query head",
    )
    add(
        "--position-embedding-type",
        choices=["absolute", "learned_absolute"],
        default="absolute",
        help="learned positions, the only ones GPTBigCode has",
    )
    add("--layernorm-epsilon", type=float, help="epsilon of the layer norms")
    add("--init-method-std", type=float, help="standard deviation of a random start")
    add("--hidden-dropout", type=float, help="dropout on embeddings and residuals")
    add("--attention-dropout", type=float, help="dropout on attention probabilities")
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="the vocabulary is padded to a multiple of this times TP",
    )


def _add_data(add) -> None:
    add(
        "--data-prefix",
        metavar="PREFIX",
        help="one tokenized data set (PREFIX_inputs_document.bin ...); its last part validates",
    )
    add(
        "--validation-share", type=float, default=0.05, help="share of --data-prefix, from its end, kept for validation"
    )
    for split in ("train", "valid", "test"):
        add(
            f"--{split}-weighted-split-paths",
            nargs="+",
            metavar="SPLIT",
            help=f"{split} groups as 'NAME: WEIGHT START:END PREFIX, ...'",
        )
        add(f"--{split}-weighted-split-paths-path", metavar="FILE", help=f"file with one such line a {split} group")
    add(
        "--tokenizer-file",
        metavar="FILE",
        help="tokenizer.json, SentencePiece model or Hugging Face directory the data were made with",
    )
    add("--seq-length", type=int, help="tokens of a packed row; the preset's positions when not given")
    add(
        "--packing",
        choices=["best-fit", "greedy"],
        default="best-fit",
        help="order of documents in rows; greedy is the mtf branch's",
    )
    add("--packing-lookahead", type=int, default=4096, help="documents best-fit packing chooses among")
    add(
        "--overlong",
        choices=["drop", "truncate"],
        default="drop",
        help="documents longer than a row: leave out, or cut inputs from the left",
    )
    add("--data-cache-path", metavar="DIR", help="where packing indices are kept; beside the data when not given")
    add(
        "--loss-on-targets-only", action=argparse.BooleanOptionalAction, default=True, help="loss on output tokens only"
    )
    add("--norm-target-loss", action="store_true", help="every output span weighs the same, however long")
    add(
        "--loss-average",
        choices=["token", "microbatch"],
        default="token",
        help="weigh micro-batches by their tokens, or alike as the branch does",
    )
    add(
        "--softmax-over-padding",
        action="store_true",
        help="let the vocabulary's padding take probability, as the branch does",
    )
    add("--eod-mask-loss", action="store_true", help="no loss on what follows an end-of-text token")
    add(
        "--reset-position-ids",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="positions restart at each document of a row",
    )
    add(
        "--reset-attention-mask",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="documents of a row do not see each other",
    )


def _add_training(add) -> None:
    add("--micro-batch-size", type=int, default=1, help="rows a data-parallel rank takes at once")
    add("--global-batch-size", type=int, help="rows of an optimizer step; micro batch x data parallel when not given")
    add(
        "--rampup-batch-size",
        nargs=3,
        type=int,
        metavar=("START", "INCREMENT", "SAMPLES"),
        help="grow the global batch from START by INCREMENT over SAMPLES",
    )
    add("--train-iters", type=int, help="length of training in optimizer steps")
    add("--train-samples", type=int, help="length in packed rows")
    add("--train-tokens", type=int, help="length in tokens")
    add("--train-epochs", type=float, help="length in passes over the training groups")
    add("--optimizer", choices=["adam", "sgd"], default="adam", help="optimizer; adam decouples weight decay (AdamW)")
    add("--weight-decay", type=float, default=0.01, help="weight decay; none on biases and norms")
    add("--adam-beta1", type=float, default=0.9, help="first moment's decay")
    add("--adam-beta2", type=float, default=0.95, help="second moment's decay")
    add("--adam-eps", type=float, default=1e-8, help="Adam's epsilon")
    add("--sgd-momentum", type=float, default=0.9, help="momentum of --optimizer sgd")
    add("--clip-grad", type=float, default=1.0, help="largest gradient norm; 0 switches clipping off")
    add("--seed", type=int, default=1234, help="seed of data order, dropout and a random start")


def _add_learning_rate(add) -> None:
    add("--lr", type=float, default=5e-5, help="peak learning rate")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end of decay")
    add(
        "--lr-decay-style",
        choices=["constant", "linear", "cosine", "inverse-square-root", "WSD"],
        default="cosine",
        help="schedule after warm-up",
    )
    add("--lr-decay-iters", type=int, help="steps over which to decay; all when not given")
    add("--lr-decay-samples", type=int, help="the same in rows")
    add("--lr-warmup-iters", type=int, default=0, help="steps of linear warm-up")
    add("--lr-warmup-samples", type=int, default=0, help="the same in rows")
    add("--lr-warmup-fraction", type=float, help="the same as a fraction of the decay")
    add("--lr-warmup-init", type=float, default=0.0, help="learning rate warm-up starts from")
    add("--lr-wsd-decay-iters", type=int, help="last steps of WSD that decay")
    add("--lr-wsd-decay-samples", type=int, help="the same in rows")
    add(
        "--lr-wsd-decay-style",
        choices=["exponential", "linear", "cosine", "minus_sqrt"],
        default="linear",
        help="how WSD decays",
    )


def _add_precision(add) -> None:
    add("--bf16", action="store_true", help="bfloat16 weights and activations, fp32 master weights")
    add("--fp16", action="store_true", help="float16 with loss scaling, fp32 master weights")
    add("--loss-scale", type=float, help="fixed fp16 loss scale; dynamic when not given")
    add("--initial-loss-scale", type=float, default=2.0**16, help="first dynamic loss scale")
    add("--min-loss-scale", type=float, default=1.0, help="smallest dynamic loss scale")
    add("--loss-scale-window", type=int, default=1000, help="good steps before the scale doubles")
    add("--hysteresis", type=int, default=2, help="overflows before the scale halves")
    add(
        "--accumulate-allreduce-grads-in-fp32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gradients accumulate in fp32",
    )


def _add_parallel(add) -> None:
    add("--tensor-model-parallel-size", type=int, default=1, help="tensor parallel ranks (TP)")
    add("--pipeline-model-parallel-size", type=int, default=1, help="pipeline stages (PP)")
    add("--context-parallel-size", type=int, default=1, help="context parallel ranks; only 1 is supported")
    add("--sequence-parallel", action="store_true", help="shard norms and dropout over tensor parallel ranks")
    add(
        "--use-distributed-optimizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="shard optimizer state over data parallel ranks",
    )
    add("--overlap-grad-reduce", action="store_true", help="reduce gradients during backward")
    add(
        "--overlap-param-gather",
        action="store_true",
        help="gather weights during forward (with the distributed optimizer)",
    )
    add("--distributed-timeout-minutes", type=float, default=10, help="a collective that waits longer fails")


def _add_memory(add) -> None:
    add(
        "--recompute-granularity",
        choices=["full", "selective"],
        help="recompute whole layers, or attention alone, in backward",
    )
    add(
        "--recompute-method",
        choices=["uniform", "block"],
        help="which layers full recompute takes; uniform when not given",
    )
    add("--recompute-num-layers", type=int, help="layers a full recompute unit; 1 when not given")
    add("--recompute-activations", action="store_true", help="the same as --recompute-granularity selective")
    add("--optimizer-cpu-offload", action="store_true", help="keep optimizer state in host memory")
    add(
        "--transformer-impl",
        choices=["auto", "local", "transformer_engine"],
        default="auto",
        help="layers by Transformer Engine where it is installed",
    )
    add("--num-workers", type=int, default=2, help="threads that read rows ahead")


def _add_lora(add) -> None:
    add(
        "--lora-rank", type=int, default=0, help="train low-rank adapters of this rank instead of the weights; 0 is off"
    )
    add("--lora-alpha", type=float, default=32, help="adapters are scaled by alpha / rank")
    add("--lora-dropout", type=float, default=0.05, help="dropout before the adapters")
    add(
        "--lora-targets",
        default=",".join(LORA_TARGETS),
        help="comma-separated layers that get adapters",
    )


def _add_validation(add) -> None:
    add("--eval-interval", type=int, default=1000, help="steps between validations; 0 is never")
    add("--eval-iters", default="10", help="global batches a group, or 'full' for its whole range once")
    add("--best-group", help="validation group whose loss marks the best checkpoint; the first when not given")
    add("--early-stop-patience", type=int, help="stop after this many validations without a better loss")


def _add_checkpoint(add) -> None:
    add("--save", metavar="DIR", help="checkpoints go here; when it holds one, training resumes from it")
    add("--load", metavar="DIR", help="weights to start from: torch_dist, legacy Megatron or Hugging Face directory")
    add("--finetune-from", metavar="DIR", help="another name of --load")
    add("--load-iteration", default="latest", help="which iteration of --load: a number, 'release' or 'latest'")
    add("--from-scratch", action="store_true", help="random weights; without it a missing checkpoint is an error")
    for flag in ("--finetune", "--no-load-optim", "--no-load-rng", "--reset-progress"):
        add(
            flag,
            action="store_true",
            help="the branch's; concerns the first start only, which always loads weights alone",
        )
    add("--save-interval", type=int, default=250, help="steps between checkpoints")
    add("--save-interval-mins", type=float, help="minutes between checkpoints, besides --save-interval")
    add("--keep-last", type=int, default=2, help="newest checkpoints kept; 0 keeps all")
    add("--keep-every", type=int, help="iterations divisible by this are kept for ever")
    add("--async-save", action="store_true", help="write checkpoints in the background")
    add("--verify-checkpoint", action="store_true", help="check the checksums of what is loaded, not the sizes alone")
    add("--override-checkpoint-args", action="store_true", help="resume although flags that change the run differ")


def _add_logging(add) -> None:
    add("--log-interval", type=int, default=10, help="steps between log lines")
    add("--tensorboard-dir", metavar="DIR", help="write TensorBoard events")
    add("--wandb-project", help="log to Weights & Biases, where it is installed")
    add("--wandb-run-name", help="name of that run")
    add("--exit-interval", type=int, help="save and stop when the iteration is divisible by this")
    add("--exit-duration-in-mins", type=float, help="save and stop after this long, to be resumed")
    add(
        "--watchdog-mins",
        type=float,
        default=30,
        help="end a run without a finished step for this long, with stack traces; 0 is never",
    )


LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def parse_args(argv: Sequence[str], world_size: int = 1) -> argparse.Namespace:
    """Parse and validate. `args.shape` (ModelShape or None when a checkpoint must tell), `args.data_parallel_size` and
    `args.notices` (lines for the log) are added. Raises UserError."""
    parser = build_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    words, notices = normalise(argv, known)
    args = parser.parse_args(words)
    args.notices = notices
    args.world_size = world_size
    fill_in(args)
    validate(args)
    return args


def normalise(argv: Sequence[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Underscores to hyphens, accepted flags taken out, refused and unknown ones named."""
    words, notices, skip = [], [], 0
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
        flag = RENAMED.get(flag, flag)
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


def fill_in(args: argparse.Namespace) -> None:
    """Resolve what flags say of each other: preset to shape, other names to one, batch sizes."""
    args.load = args.load or args.finetune_from
    if args.lora_rank and args.transformer_impl == "auto":  # Transformer Engine's layers take no adapters
        args.transformer_impl = "local"
    if args.recompute_activations:
        args.recompute_granularity = args.recompute_granularity or "selective"
    if args.recompute_granularity == "full":
        args.recompute_method = args.recompute_method or "uniform"
        args.recompute_num_layers = args.recompute_num_layers or 1
    args.shape = shape_from_args(args, PRESETS[args.preset]) if args.preset else None
    if args.shape is None and args.num_layers and args.hidden_size and args.num_attention_heads:
        base = ModelShape(
            num_layers=1, hidden_size=1, num_attention_heads=1, max_position_embeddings=args.seq_length or 8192
        )
        args.shape = shape_from_args(args, base)
    if args.shape and args.seq_length is None:
        args.seq_length = args.shape.max_position_embeddings
    model_parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    args.data_parallel_size = args.world_size // model_parallel if model_parallel > 0 else 0
    if args.global_batch_size is None:
        args.global_batch_size = args.micro_batch_size * max(1, args.data_parallel_size)


def shape_from_args(args: argparse.Namespace, base: ModelShape) -> ModelShape:
    """`base` with every architecture flag that was given put over it."""
    given = {f.name: getattr(args, f.name) for f in fields(ModelShape) if getattr(args, f.name, None) is not None}
    if args.attention_head_type:
        given["multi_query"] = args.attention_head_type == "multiquery"
    if "hidden_size" in given and "ffn_hidden_size" not in given:
        given["ffn_hidden_size"] = 0
    return ModelShape(**{**base.as_dict(), **given})


def validate(args: argparse.Namespace) -> None:
    """Raise UserError for the first contradiction, naming the flags and the way out."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    for flag in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "micro_batch_size",
        "global_batch_size",
    ):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    if cp > 1:
        raise UserError(
            f"--context-parallel-size {cp}: Megatron-Core cuts packed rows over ranks only inside Transformer Engine's attention, "
            "which this program does not rely on; leave it at 1 and use --sequence-parallel or --recompute-granularity full for long rows"
        )
    if args.world_size % (tp * pp * cp):
        raise UserError(
            f"{args.world_size} processes cannot be split into --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp}; start a multiple of {tp * pp * cp}"
        )
    step = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % step:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size} x "
            f"{args.data_parallel_size} data-parallel ranks; try {max(1, round(args.global_batch_size / step)) * step}"
        )
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 exclude each other; keep one")
    if args.optimizer == "sgd" and args.use_distributed_optimizer:
        args.use_distributed_optimizer = False
        args.notices.append(
            "--optimizer sgd: only Adam's state is sharded over data-parallel ranks, each keeps its own"
        )
    if args.optimizer_cpu_offload and not ((args.bf16 or args.fp16) and args.use_distributed_optimizer):
        raise UserError("--optimizer-cpu-offload needs --bf16 or --fp16, and the distributed optimizer; add the first")
    if args.sequence_parallel and tp == 1:
        args.sequence_parallel = False
        args.notices.append("--sequence-parallel needs --tensor-model-parallel-size above 1 and is off")
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        raise UserError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; add them")
    if args.reset_attention_mask and not args.reset_position_ids:
        args.notices.append("--no-reset-position-ids: positions run on over the documents of a row")
    if args.eval_iters != "full" and not args.eval_iters.isdigit():
        raise UserError(f"--eval-iters {args.eval_iters}: give a number of batches or 'full'")
    if args.shape:
        args.shape.check_layout(tp, pp)
        if args.seq_length > args.shape.max_position_embeddings:
            raise UserError(
                f"--seq-length {args.seq_length} is over the model's {args.shape.max_position_embeddings} positions; "
                f"use at most that, or raise --max-position-embeddings when training from scratch"
            )
    elif not args.load and not args.save:
        raise UserError("no model: give --preset (one of " + ", ".join(sorted(PRESETS)) + ") or --load DIR")
    _validate_data(args)
    _validate_length(args)


def _validate_data(args: argparse.Namespace) -> None:
    if args.data_prefix and (args.train_weighted_split_paths or args.train_weighted_split_paths_path):
        raise UserError("--data-prefix and --train-weighted-split-paths(-path) exclude each other; keep one")
    for split in ("train", "valid", "test"):
        path = getattr(args, f"{split}_weighted_split_paths_path")
        if path and getattr(args, f"{split}_weighted_split_paths"):
            raise UserError(
                f"--{split}-weighted-split-paths and --{split}-weighted-split-paths-path exclude each other; keep one"
            )
        if path and not Path(path).is_file():
            raise UserError(f"--{split}-weighted-split-paths-path {path}: no such file")
    if not (args.data_prefix or args.train_weighted_split_paths or args.train_weighted_split_paths_path):
        raise UserError("no training data: give --data-prefix PREFIX or --train-weighted-split-paths-path FILE")
    if not 0 <= args.validation_share < 1:
        raise UserError(f"--validation-share {args.validation_share}: must be at least 0 and below 1, like 0.05")
    if args.packing_lookahead < 1:
        raise UserError(f"--packing-lookahead {args.packing_lookahead}: must be at least 1, like 4096")
    if args.seq_length is not None and args.seq_length < 1:
        raise UserError(f"--seq-length {args.seq_length}: must be at least 1, like 2048")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: must be at least 0 and below 2^32")
    if not args.tokenizer_file:
        raise UserError("--tokenizer-file is missing: give the tokenizer the data were made with")
    if not Path(args.tokenizer_file).exists():
        raise UserError(f"--tokenizer-file {args.tokenizer_file}: no such file")


def _validate_length(args: argparse.Namespace) -> None:
    given = [
        f"--train-{unit}"
        for unit in ("iters", "samples", "tokens", "epochs")
        if getattr(args, f"train_{unit}") is not None
    ]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given) + ' exclude each other' if given else 'length of training is missing'}; "
            "give one of --train-iters, --train-samples, --train-tokens, --train-epochs"
        )
    check_rampup(args)
    warmups = [f"--lr-warmup-{unit}" for unit in ("iters", "samples", "fraction") if getattr(args, f"lr_warmup_{unit}")]
    if len(warmups) > 1:
        raise UserError(f"{' and '.join(warmups)} exclude each other; keep one")
    if args.lora_rank < 0:
        raise UserError(f"--lora-rank {args.lora_rank}: must be 0 (off) or a positive rank, like 16")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora-dropout {args.lora_dropout:g}: must be at least 0 and below 1, like 0.05")
    if unknown := [name for name in args.lora_targets.split(",") if name not in LORA_TARGETS]:
        raise UserError(f"--lora-targets: {unknown[0]!r} is not one of {', '.join(LORA_TARGETS)}")
