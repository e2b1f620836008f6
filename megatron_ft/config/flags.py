"""Every flag of the training program: Megatron's names, grouped as people think of them, and the parser that programs share."""

import argparse

from megatron_ft.errors import UserError
from megatron_ft.model.shape import PRESETS

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")  # layers that can have adapters
# Arguments that say one thing in several ways. Of each row the last flag on the command line counts.
ALTERNATIVES = (
    ("train_iters", "train_samples", "train_tokens", "train_epochs"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ("bf16", "fp16"),
)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors: the flag named, the nearest right one suggested."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


class LastOne(argparse.Action):
    """A flag of ALTERNATIVES: what another of its row has set goes back to the default, with a line in `notices`.

    So a flag after a script's own goes over it, though it has another name (--train-epochs over --train-iters).
    """

    def __call__(self, parser, namespace, values, option_string=None):
        for other in next(row for row in ALTERNATIVES if self.dest in row):
            if other != self.dest and getattr(namespace, other) != parser.get_default(other):
                setattr(namespace, other, parser.get_default(other))
                namespace.notices.append(
                    f"{option_string} comes later on the command line than {_flag(other)}, and counts"
                )
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag's default is shown, unless there is none to show."""

    def _get_help_string(self, action):
        hide = action.default in (None, False, argparse.SUPPRESS) or action.required
        return action.help if hide else super()._get_help_string(action)


def build_parser() -> Parser:
    """The parser with all groups; every flag's help says what it does in one line."""
    parser = Parser(
        prog="megatron_ft.finetune",
        description="Fine-tune a StarCoder-family model. Hyphens and underscores in flags are the same.",
        formatter_class=Help,
        allow_abbrev=False,
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
    parser.set_defaults(notices=[])  # lines for the log
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
        "--validation-share",
        type=float,
        help="share of --data-prefix, from its end, kept for validation; when not given 0.05, or 0 beside validation groups of your own",
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
    add("--train-iters", action=LastOne, type=int, help="length of training in optimizer steps")
    add("--train-samples", action=LastOne, type=int, help="length in packed rows")
    add("--train-tokens", action=LastOne, type=int, help="length in tokens of documents, without the padding of rows")
    add("--train-epochs", action=LastOne, type=float, help="length in passes over the training groups")
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
    add("--lr-decay-iters", action=LastOne, type=int, help="steps over which to decay; all when not given")
    add("--lr-decay-samples", action=LastOne, type=int, help="the same in rows")
    add("--lr-warmup-iters", action=LastOne, type=int, default=0, help="steps of linear warm-up")
    add("--lr-warmup-samples", action=LastOne, type=int, default=0, help="the same in rows")
    add("--lr-warmup-fraction", action=LastOne, type=float, help="the same as a fraction of the decay")
    add("--lr-warmup-init", type=float, default=0.0, help="learning rate warm-up starts from")
    add("--lr-wsd-decay-iters", action=LastOne, type=int, help="last steps of WSD that decay")
    add("--lr-wsd-decay-samples", action=LastOne, type=int, help="the same in rows")
    add(
        "--lr-wsd-decay-style",
        choices=["exponential", "linear", "cosine", "minus_sqrt"],
        default="linear",
        help="how WSD decays",
    )


def _add_precision(add) -> None:
    switch = {"action": LastOne, "nargs": 0, "const": True, "default": False}
    add("--bf16", **switch, help="bfloat16 weights and activations, fp32 master weights")
    add("--fp16", **switch, help="float16 with loss scaling, fp32 master weights")
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
    add(
        "--overlap-grad-reduce",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="reduce gradients during backward",
    )
    add(
        "--overlap-param-gather",
        action=argparse.BooleanOptionalAction,
        default=False,
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
    add("--eval-at-start", action="store_true", help="validate before the first step too, as iteration 0")
    add("--eval-iters", default="10", help="global batches a group, or 'full' for its whole range once")
    add(
        "--skip-train",
        action="store_true",
        help="validate and test every group once, without training data; train and save nothing",
    )
    add("--best-group", help="validation group whose loss marks the best checkpoint; the first when not given")
    add("--early-stop-patience", type=int, help="stop after this many validations without a better loss")


def _add_checkpoint(add) -> None:
    add("--save", metavar="DIR", help="checkpoints go here; when it holds one, training resumes from it")
    add(
        "--load",
        metavar="DIR",
        help="weights to start from: torch_dist, legacy Megatron or Hugging Face directory; with --lora-rank also adapters to train on",
    )
    add("--finetune-from", metavar="DIR", help="another name of --load")
    add("--load-iteration", default="latest", help="of --load: a number, 'best', 'release' or 'latest'")
    add("--from-scratch", action="store_true", help="random weights; without it a missing checkpoint is an error")
    for flag in ("--finetune", "--no-load-optim", "--no-load-rng", "--reset-progress"):
        add(
            flag,
            action="store_true",
            help="the branch's; concerns the first start only, which always loads weights alone",
        )
    add("--save-interval", type=int, default=250, help="steps between checkpoints; 0 is at the end alone")
    add("--save-interval-mins", type=float, help="minutes between checkpoints, besides --save-interval")
    add(
        "--save-epochs",
        type=float,
        metavar="X",
        help="a checkpoint every X epochs as well (0.5, 1, ...), kept for ever",
    )
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
    add("--exit-interval", type=int, help="save and stop when the iteration is divisible by this; 0 is never")
    add("--exit-duration-in-mins", type=float, help="save and stop after this long, to be resumed")
    add(
        "--watchdog-mins",
        type=float,
        default=30,
        help="end a run without a finished step for this long, with stack traces; 0 is never",
    )
