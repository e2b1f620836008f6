"""Every flag of the training program, once: Megatron's names, grouped as people think of them.

To add a flag, add one field here. Its annotation and default, and the facts given to `flag`
(see flag.py), are all that the parser, the bounds check, resuming, `--engine mtf`, the planner, the
model card and docs/training.md need.

A few fields are None on the command line and settled by arguments.py before anything else reads
them; they are annotated with the type that they have from then on.
"""

from dataclasses import dataclass

from megatron_ft.config.bounds import FRACTION, NOT_NEGATIVE, ONE_OR_MORE, POSITIVE, ZERO_DISABLES, Bound
from megatron_ft.config.flag import MEGATRON, TRANSFORMERS, Mtf, Resume, flag
from megatron_ft.model.activation import ACTIVATIONS
from megatron_ft.model.families import PRESETS
from megatron_ft.model.tensor_names import LORA_TARGETS

FIXED, SILENT = Resume.FIXED, Resume.SILENT
SAME, TRANSLATED = Mtf.SAME, Mtf.TRANSLATED

# A table: the formatter would give every fact a line of its own.
# fmt: off


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model: architecture; a preset or the checkpoint to start from fills in what is not given."""

    preset: str | None = flag(
        "--preset", None, "published model whose numbers fill in the architecture flags", choices=sorted(PRESETS),
        resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    num_layers: int | None = flag(
        "--num-layers", None, "transformer layers", bounds=ONE_OR_MORE, resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    hidden_size: int | None = flag(
        "--hidden-size", None, "width of the model", bounds=ONE_OR_MORE, resume=SILENT, mtf=TRANSLATED,
        only=MEGATRON
    )
    num_attention_heads: int | None = flag(
        "--num-attention-heads", None, "query heads", bounds=ONE_OR_MORE, resume=SILENT, mtf=TRANSLATED,
        only=MEGATRON
    )
    ffn_hidden_size: int | None = flag(
        "--ffn-hidden-size", None, "width of the feed-forward layers (default: 4 x hidden size)",
        bounds=ONE_OR_MORE, resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    max_position_embeddings: int | None = flag(
        "--max-position-embeddings", None, "positions; the longest sequence the model can see",
        bounds=ONE_OR_MORE, resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    attention_head_type: str | None = flag(
        "--attention-head-type", None, "one key/value head for all query heads, or one per query head",
        choices=("multiquery", "multihead"), resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    num_query_groups: int | None = flag(
        "--num-query-groups", None, "key/value heads, each for as many query heads", bounds=ONE_OR_MORE, resume=SILENT,
        only=MEGATRON
    )
    position_embedding_type: str | None = flag(
        "--position-embedding-type", None, "learned positions, as GPTBigCode has, or rotary ones (rope), as StarCoder2",
        choices=("absolute", "learned_absolute", "rope"), resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    rotary_base: float | None = flag(
        "--rotary-base", None, "base of rotary positions (default: 10000)", bounds=ONE_OR_MORE, resume=SILENT,
        only=MEGATRON
    )
    window_size: int | None = flag(
        "--window-size", None, "tokens that a token sees, itself included; 0: all before it", bounds=NOT_NEGATIVE,
        resume=SILENT, only=MEGATRON
    )
    untie_embeddings_and_output_weights: bool | None = flag(
        "--untie-embeddings-and-output-weights", None, "an output layer of its own instead of the word embeddings",
        negatable=True, resume=SILENT, only=MEGATRON
    )
    activation: str | None = flag(
        "--activation", None,
        "GELU in its tanh approximation, which StarCoder was pre-trained with, or exact (default: the checkpoint's)",
        choices=tuple(ACTIVATIONS), resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    layernorm_epsilon: float | None = flag(
        "--layernorm-epsilon", None, "epsilon of the layer norms", bounds=POSITIVE, resume=SILENT, mtf=TRANSLATED,
        only=MEGATRON
    )
    init_method_std: float | None = flag(
        "--init-method-std", None, "standard deviation of randomly initialized weights", bounds=NOT_NEGATIVE,
        resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    hidden_dropout: float | None = flag(
        "--hidden-dropout", None, "dropout on embeddings and residuals", bounds=FRACTION, resume=SILENT,
        mtf=TRANSLATED, planned=True
    )
    attention_dropout: float | None = flag(
        "--attention-dropout", None, "dropout on attention probabilities", bounds=FRACTION, resume=SILENT,
        mtf=TRANSLATED, planned=True
    )
    make_vocab_size_divisible_by: int = flag(
        "--make-vocab-size-divisible-by", 128, "the vocabulary is padded to a multiple of this times TP",
        bounds=ONE_OR_MORE, mtf=SAME, planned=True, only=MEGATRON
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data."""

    prefix: str | None = flag(
        "--data-prefix", None,
        "one tokenized dataset (PREFIX_inputs_document.bin ...); its last documents are held out for validation", metavar="PREFIX",
        mtf=TRANSLATED
    )
    validation_fraction: float | None = flag(
        "--validation-fraction", None,
        "fraction of --data-prefix, from its end, held out for validation (default: 0.05, or 0 with validation groups)",
        bounds=FRACTION, mtf=TRANSLATED, aliases=("--validation-share",)
    )
    train_weighted_split_paths: list[str] | None = flag(
        "--train-weighted-split-paths", None, "train groups as 'NAME: WEIGHT START:END PREFIX, ...'", nargs="+",
        metavar="SPLIT", mtf=TRANSLATED
    )
    train_weighted_split_paths_path: str | None = flag(
        "--train-weighted-split-paths-path", None, "file with one such line per train group", metavar="FILE",
        mtf=TRANSLATED
    )
    valid_weighted_split_paths: list[str] | None = flag(
        "--valid-weighted-split-paths", None, "valid groups as 'NAME: WEIGHT START:END PREFIX, ...'", nargs="+",
        metavar="SPLIT", mtf=TRANSLATED
    )
    valid_weighted_split_paths_path: str | None = flag(
        "--valid-weighted-split-paths-path", None, "file with one such line per valid group", metavar="FILE",
        mtf=TRANSLATED
    )
    test_weighted_split_paths: list[str] | None = flag(
        "--test-weighted-split-paths", None, "test groups as 'NAME: WEIGHT START:END PREFIX, ...'", nargs="+",
        metavar="SPLIT", mtf=TRANSLATED
    )
    test_weighted_split_paths_path: str | None = flag(
        "--test-weighted-split-paths-path", None, "file with one such line per test group", metavar="FILE",
        mtf=TRANSLATED
    )
    tokenizer_file: str = flag(
        "--tokenizer-file", None,
        "tokenizer.json, SentencePiece model or Hugging Face directory that the data were tokenized with",
        metavar="FILE", resume=SILENT, mtf=TRANSLATED
    )
    seq_length: int = flag(
        "--seq-length", None, "tokens per packed sequence (default: the model's positions)", bounds=ONE_OR_MORE,
        resume=FIXED, mtf=SAME, planned=True, aliases=("--sequence-length",)
    )
    packing: str = flag(
        "--packing", "best-fit", "order of documents in sequences; greedy is the mtf branch's",
        choices=("best-fit", "greedy"), resume=FIXED, mtf=TRANSLATED
    )
    packing_lookahead: int = flag(
        "--packing-lookahead", 4096, "documents best-fit packing chooses among", bounds=ONE_OR_MORE, resume=FIXED
    )
    overlong: str = flag(
        "--overlong", "drop",
        "documents longer than a sequence: drop them, or truncate their inputs from the left",
        choices=("drop", "truncate"), resume=FIXED, mtf=TRANSLATED
    )
    cache_path: str | None = flag(
        "--data-cache-path", None, "directory of the packing indices (default: next to the data)", metavar="DIR",
        resume=SILENT, local=True
    )
    reset_position_ids: bool = flag(
        "--reset-position-ids", True, "positions restart at each document of a sequence", negatable=True,
        resume=FIXED, mtf=SAME
    )
    reset_attention_mask: bool = flag(
        "--reset-attention-mask", True, "no attention across the documents of a sequence", negatable=True,
        resume=FIXED, mtf=SAME
    )

    def split_source(self, split: str) -> tuple[str | None, list[str] | None]:
        """(split file, group lines) that were given for `split` ("train", "valid", "test")."""
        return getattr(self, f"{split}_weighted_split_paths_path"), getattr(self, f"{split}_weighted_split_paths")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Loss."""

    on_targets_only: bool = flag(
        "--loss-on-targets-only", True, "loss on output tokens only", negatable=True, resume=FIXED, mtf=SAME
    )
    norm_target: bool = flag(
        "--norm-target-loss", False, "every output has the same weight, however long", resume=FIXED, mtf=SAME
    )
    average: str = flag(
        "--loss-average", "token", "weigh micro-batches by their tokens, or equally as the mtf branch does",
        choices=("token", "microbatch"), resume=FIXED, mtf=TRANSLATED
    )
    softmax_over_padding: bool = flag(
        "--softmax-over-padding", False, "the vocabulary's padding takes probability, as in the mtf branch",
        resume=FIXED, mtf=TRANSLATED
    )
    eod_mask: bool = flag(
        "--eod-mask-loss", False, "no loss on what follows an end-of-text token", resume=FIXED, mtf=SAME
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training."""

    micro_batch_size: int = flag(
        "--micro-batch-size", 1, "sequences per data-parallel rank and forward pass", bounds=ONE_OR_MORE, mtf=SAME,
        aliases=("--batch-size",)
    )
    global_batch_size: int = flag(
        "--global-batch-size", None, "sequences per optimizer step (default: micro-batch x data parallel)",
        bounds=ONE_OR_MORE, resume=FIXED, mtf=SAME
    )
    rampup_batch_size: list[int] | None = flag(
        "--rampup-batch-size", None, "grow the global batch from START by INCREMENT over SAMPLES", nargs=3,
        metavar=("START", "INCREMENT", "SAMPLES"), resume=FIXED, mtf=SAME
    )
    train_iters: int | None = flag(
        "--train-iters", None, "length of training in optimizer steps", bounds=ONE_OR_MORE, alternatives="length",
        mtf=SAME
    )
    train_samples: int | None = flag(
        "--train-samples", None, "length in packed sequences", bounds=ONE_OR_MORE, alternatives="length", mtf=SAME
    )
    train_tokens: int | None = flag(
        "--train-tokens", None, "length in tokens of documents, without the padding of sequences",
        bounds=ONE_OR_MORE, alternatives="length", mtf=TRANSLATED
    )
    train_epochs: float | None = flag(
        "--train-epochs", None, "length in passes over the training groups", bounds=POSITIVE,
        alternatives="length", mtf=TRANSLATED
    )
    seed: int = flag(
        "--seed", 1234, "seed of data order, dropout and random initialization", bounds=Bound(0, 2**32),
        resume=FIXED, mtf=SAME
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer."""

    name: str = flag(
        "--optimizer", "adam", "optimizer; adam decouples weight decay (AdamW)", choices=("adam", "sgd"),
        resume=FIXED, mtf=SAME, planned=True
    )
    weight_decay: float = flag(
        "--weight-decay", 0.01, "weight decay; none on biases and norms", bounds=NOT_NEGATIVE, mtf=SAME
    )
    adam_beta1: float = flag("--adam-beta1", 0.9, "decay of the first moment", bounds=FRACTION, mtf=SAME)
    adam_beta2: float = flag("--adam-beta2", 0.95, "decay of the second moment", bounds=FRACTION, mtf=SAME)
    adam_eps: float = flag("--adam-eps", 1e-8, "Adam's epsilon", bounds=POSITIVE, mtf=SAME)
    sgd_momentum: float = flag("--sgd-momentum", 0.9, "momentum of --optimizer sgd", bounds=FRACTION, mtf=SAME)
    clip_grad: float = flag("--clip-grad", 1.0, "maximum gradient norm; 0 disables", bounds=ZERO_DISABLES, mtf=SAME)
    cpu_offload: bool = flag(
        "--optimizer-cpu-offload", False, "keep optimizer state in host memory", planned=True, only=MEGATRON
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate."""

    lr: float = flag("--lr", 5e-5, "peak learning rate", bounds=NOT_NEGATIVE, mtf=SAME)
    min_lr: float = flag("--min-lr", 0.0, "learning rate at the end of decay", bounds=NOT_NEGATIVE, mtf=SAME)
    decay_style: str = flag(
        "--lr-decay-style", "cosine", "schedule after warm-up",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"), mtf=SAME
    )
    decay_iters: int | None = flag(
        "--lr-decay-iters", None, "steps of decay (default: all)", bounds=ONE_OR_MORE, alternatives="decay",
        mtf=SAME
    )
    decay_samples: int | None = flag(
        "--lr-decay-samples", None, "the same in sequences", bounds=ONE_OR_MORE, alternatives="decay", mtf=SAME
    )
    warmup_iters: int = flag(
        "--lr-warmup-iters", 0, "steps of linear warm-up", bounds=NOT_NEGATIVE, alternatives="warm-up", mtf=SAME
    )
    warmup_samples: int = flag(
        "--lr-warmup-samples", 0, "the same in sequences", bounds=NOT_NEGATIVE, alternatives="warm-up", mtf=SAME
    )
    warmup_fraction: float | None = flag(
        "--lr-warmup-fraction", None, "the same as a fraction of the decay", bounds=FRACTION,
        alternatives="warm-up", mtf=SAME
    )
    warmup_init: float = flag("--lr-warmup-init", 0.0, "learning rate that warm-up starts from", bounds=NOT_NEGATIVE)
    wsd_decay_iters: int | None = flag(
        "--lr-wsd-decay-iters", None, "steps of decay at the end of WSD", bounds=ONE_OR_MORE,
        alternatives="WSD decay"
    )
    wsd_decay_samples: int | None = flag(
        "--lr-wsd-decay-samples", None, "the same in sequences", bounds=ONE_OR_MORE, alternatives="WSD decay"
    )
    wsd_decay_style: str = flag(
        "--lr-wsd-decay-style", "linear", "form of WSD's decay",
        choices=("exponential", "linear", "cosine", "minus_sqrt")
    )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Precision."""

    bf16: bool = flag(
        "--bf16", False, "bfloat16 weights and activations, fp32 master weights", alternatives="precision",
        negatable=True, resume=FIXED, mtf=SAME
    )
    fp16: bool = flag(
        "--fp16", False, "float16 with loss scaling, fp32 master weights", alternatives="precision", resume=FIXED,
        mtf=SAME
    )
    loss_scale: float | None = flag(
        "--loss-scale", None, "fixed fp16 loss scale (default: dynamic)", bounds=POSITIVE, mtf=SAME, only=MEGATRON
    )
    initial_loss_scale: float = flag(
        "--initial-loss-scale", 2.0**16, "first dynamic loss scale", bounds=POSITIVE, mtf=SAME
    )
    min_loss_scale: float = flag(
        "--min-loss-scale", 1.0, "smallest dynamic loss scale", bounds=POSITIVE, mtf=SAME, only=MEGATRON
    )
    loss_scale_window: int = flag(
        "--loss-scale-window", 1000, "steps without overflow before the scale doubles", bounds=ONE_OR_MORE,
        mtf=SAME
    )
    hysteresis: int = flag(
        "--hysteresis", 2, "overflows before the scale halves", bounds=ONE_OR_MORE, mtf=SAME, only=MEGATRON
    )
    fp32_gradients: bool = flag(
        "--accumulate-allreduce-grads-in-fp32", True, "gradients accumulate in fp32", negatable=True, mtf=SAME,
        planned=True, only=MEGATRON
    )

    @property
    def name(self) -> str:
        """ "bf16", "fp16" or "fp32"."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Parallel layout."""

    tensor: int = flag(
        "--tensor-model-parallel-size", 1, "tensor-parallel ranks (TP)", bounds=ONE_OR_MORE, mtf=SAME,
        aliases=("--model-parallel-size",), only=MEGATRON
    )
    pipeline: int = flag(
        "--pipeline-model-parallel-size", 1, "pipeline stages (PP)", bounds=ONE_OR_MORE, mtf=SAME, only=MEGATRON
    )
    context: int = flag(
        "--context-parallel-size", 1, "context-parallel ranks; only 1 is supported", bounds=ONE_OR_MORE,
        only=MEGATRON
    )
    sequence: bool = flag(
        "--sequence-parallel", False, "shard norms and dropout across tensor-parallel ranks", mtf=SAME,
        only=MEGATRON
    )
    distributed_optimizer: bool = flag(
        "--use-distributed-optimizer", True, "shard optimizer state across data-parallel ranks", negatable=True,
        mtf=SAME, planned=True
    )
    overlap_grad_reduce: bool | None = flag(
        "--overlap-grad-reduce", None, "reduce gradients during backward (default: with data parallelism)",
        negatable=True, resume=SILENT, mtf=TRANSLATED, only=MEGATRON
    )
    overlap_param_gather: bool | None = flag(
        "--overlap-param-gather", None, "gather weights during forward (default: with --overlap-grad-reduce, the "
        "distributed optimizer and no --optimizer-cpu-offload)", negatable=True, resume=SILENT, mtf=TRANSLATED,
        only=MEGATRON
    )
    timeout_minutes: float = flag(
        "--distributed-timeout-minutes", 10, "minutes before a collective operation fails", bounds=POSITIVE,
        mtf=TRANSLATED
    )
    world_size: int = 1  # processes of the run, of which the flags leave the rest to data parallelism

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // self.model


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory and speed."""

    recompute_granularity: str | None = flag(
        "--recompute-granularity", None, "recompute entire layers, or only attention, in backward",
        choices=("full", "selective"), mtf=SAME
    )
    recompute_method: str | None = flag(
        "--recompute-method", None, "layers that full recompute applies to (default: uniform)",
        choices=("uniform", "block"), mtf=SAME, planned=True, only=MEGATRON
    )
    recompute_num_layers: int | None = flag(
        "--recompute-num-layers", None, "layers per full recompute unit (default: 1)", bounds=ONE_OR_MORE,
        mtf=SAME, planned=True, only=MEGATRON
    )
    recompute_activations: bool = flag(
        "--recompute-activations", False, "the same as --recompute-granularity selective", mtf=TRANSLATED,
        aliases=("--checkpoint-activations",), only=MEGATRON
    )
    transformer_impl: str = flag(
        "--transformer-impl", "auto", "Transformer Engine's layers, where they have attention for packed rows",
        choices=("auto", "local", "transformer_engine")
    )
    num_workers: int = flag(
        "--num-workers", 2, "threads that read sequences ahead", bounds=Bound(0, note="0 reads on demand"),
        mtf=SAME
    )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA."""

    rank: int = flag(
        "--lora-rank", 0, "train low-rank adapters of this rank instead of the weights; 0 disables",
        bounds=ZERO_DISABLES, resume=FIXED, planned=True
    )
    alpha: float = flag(
        "--lora-alpha", 32, "adapters are scaled by alpha / rank", bounds=POSITIVE, resume=FIXED, planned=True
    )
    dropout: float = flag("--lora-dropout", 0.05, "dropout before the adapters", bounds=FRACTION, planned=True)
    targets: str = flag(
        "--lora-targets", ",".join(LORA_TARGETS), "comma-separated layers that get adapters", resume=FIXED,
        planned=True
    )
    dora: bool = flag(
        "--lora-dora", False, "DoRA: adapters of the weights' direction, and their lengths", resume=FIXED,
        only=TRANSFORMERS
    )
    quantize_base: str | None = flag(
        "--quantize-base", None, "QLoRA: frozen weights in 4 bits (nf4, fp4) or 8 (int8), by bitsandbytes",
        choices=("nf4", "fp4", "int8"), resume=FIXED, only=TRANSFORMERS
    )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation."""

    interval: int = flag(
        "--eval-interval", 1000, "steps between validations; 0 disables", bounds=ZERO_DISABLES, mtf=SAME
    )
    at_start: bool = flag("--eval-at-start", False, "also validate before the first step, as iteration 0")
    iters: str = flag("--eval-iters", "10", "global batches per group, or 'full' for its entire range once", mtf=SAME)
    skip_train: bool = flag(
        "--skip-train", False, "validate and test every group once, without training data; train and save nothing"
    )
    best_group: str | None = flag(
        "--best-group", None, "validation group whose loss marks the best checkpoint (default: the first)"
    )
    early_stop_patience: int | None = flag(
        "--early-stop-patience", None, "stop after this many validations without a lower loss",
        bounds=Bound(1, note="leave it out to disable early stopping")
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoints."""

    save: str | None = flag(
        "--save", None, "checkpoint directory; when it holds a checkpoint, training resumes from it",
        metavar="DIR", resume=SILENT, mtf=TRANSLATED, local=True
    )
    load: str | None = flag(
        "--load", None,
        "weights to start from: torch_dist, legacy Megatron or Hugging Face directory; with --lora-rank also adapters",
        metavar="DIR", resume=SILENT, mtf=TRANSLATED
    )
    finetune_from: str | None = flag(
        "--finetune-from", None, "another name of --load", metavar="DIR", resume=SILENT, mtf=TRANSLATED
    )
    load_iteration: str = flag(
        "--load-iteration", "latest", "of --load: a number, 'best', 'release' or 'latest'", resume=SILENT
    )
    from_scratch: bool = flag(
        "--from-scratch", False, "random weights; without it a missing checkpoint is an error", resume=SILENT,
        mtf=TRANSLATED, only=MEGATRON
    )
    finetune: bool = flag(
        "--finetune", False, "of the mtf branch; a first start always loads only weights", resume=SILENT,
        mtf=TRANSLATED
    )
    no_load_optim: bool = flag(
        "--no-load-optim", False, "of the mtf branch; a first start always loads only weights", resume=SILENT,
        mtf=TRANSLATED
    )
    no_load_rng: bool = flag(
        "--no-load-rng", False, "of the mtf branch; a first start always loads only weights", resume=SILENT,
        mtf=TRANSLATED
    )
    reset_progress: bool = flag(
        "--reset-progress", False, "of the mtf branch; a first start always loads only weights", resume=SILENT,
        mtf=TRANSLATED
    )
    save_interval: int = flag(
        "--save-interval", 250, "steps between checkpoints; 0 saves only at the end",
        bounds=Bound(0, note="0 saves only at the end"), mtf=SAME
    )
    save_interval_mins: float | None = flag(
        "--save-interval-mins", None, "minutes between checkpoints, in addition to --save-interval",
        bounds=ZERO_DISABLES
    )
    save_epochs: float | None = flag(
        "--save-epochs", None, "also a checkpoint every X epochs (0.5, 1, ...), kept permanently", metavar="X",
        bounds=POSITIVE
    )
    keep_last: int = flag(
        "--keep-last", 2, "newest checkpoints to keep; 0 keeps all", bounds=Bound(0, note="0 keeps all")
    )
    keep_every: int | None = flag(
        "--keep-every", None, "iterations divisible by this are kept permanently", bounds=ZERO_DISABLES
    )
    async_save: bool = flag("--async-save", False, "write checkpoints in the background", only=MEGATRON)
    verify: bool = flag(
        "--verify-checkpoint", False, "verify the checksums of what is loaded, not only the sizes", resume=SILENT
    )
    override_args: bool = flag(
        "--override-checkpoint-args", False, "resume although flags that change the run differ", resume=SILENT
    )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Logging and stopping."""

    interval: int = flag("--log-interval", 10, "steps between log lines", bounds=ONE_OR_MORE, mtf=SAME)
    tensorboard_dir: str | None = flag(
        "--tensorboard-dir", None, "write TensorBoard events", metavar="DIR", mtf=SAME, local=True
    )
    wandb_project: str | None = flag(
        "--wandb-project", None, "log to Weights & Biases, where it is installed",
        aliases=("--wandb-project-name",)
    )
    wandb_run_name: str | None = flag("--wandb-run-name", None, "name of that run")
    mlflow_experiment: str | None = flag(
        "--mlflow-experiment", None, "log to this experiment of MLflow, where it is installed"
    )
    mlflow_tracking_uri: str | None = flag(
        "--mlflow-tracking-uri", None, "server or folder of MLflow (default: MLFLOW_TRACKING_URI)", metavar="URI",
        local=True
    )
    comet_project: str | None = flag("--comet-project", None, "log to this project of Comet, where it is installed")
    exit_interval: int | None = flag(
        "--exit-interval", None, "save and stop when the iteration is divisible by this; 0 disables",
        bounds=ZERO_DISABLES, mtf=SAME
    )
    exit_duration_in_mins: float | None = flag(
        "--exit-duration-in-mins", None, "save and stop after this many minutes, to be resumed", bounds=POSITIVE,
        mtf=TRANSLATED
    )
    watchdog_mins: float = flag(
        "--watchdog-mins", 30, "minutes without progress after which a run ends with stack traces; 0 disables",
        bounds=ZERO_DISABLES
    )


# fmt: on
