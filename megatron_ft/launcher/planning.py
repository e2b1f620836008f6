"""What the planner works with and what it finds: the work of launch/plan.py."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ft.config.arguments import check_positions, normalize, settle, with_shape
from megatron_ft.config.command_line import build_parser, check_bounds, with_config
from megatron_ft.config.config import Config
from megatron_ft.config.parser import Help, Parser
from megatron_ft.data.packed_dataset import sequences_per_epoch
from megatron_ft.errors import UserError
from megatron_ft.launcher.proposals import DECIDED, Planner, Proposal, best, decided, multiples_near
from megatron_ft.model.cost import GPUS
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.speed import Cluster
from megatron_ft.weights.hf_config import shape_in_config

USUAL_BATCH = 128  # sequences per step, if --global-batch-size is not given
ASSUMED_FILL = 0.98  # of sequences, if only the number of tokens is known
SHOWN = 3  # proposals
MOST = 10**14  # of any number; 15 trillion tokens are the largest datasets of today


def plan_parser(description: str | None = None) -> Parser:
    """The planner's own flags; `description` is the program's."""
    parser = Parser(
        prog="launch/plan.py",
        description=description,
        formatter_class=Help,
        allow_abbrev=False,
        epilog="training flags that matter here: --preset or --load or the model's sizes, --seq-length, "
        "--micro-batch-size, --global-batch-size, --tensor-model-parallel-size, --pipeline-model-parallel-size, "
        "--sequence-parallel, --recompute-granularity, --[no-]use-distributed-optimizer, --optimizer-cpu-offload, "
        "--lora-rank, --data-prefix or --train-weighted-split-paths-path, --train-epochs and the other lengths",
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="nodes of the job")
    add("--gpus-per-node", type=int, default=8, help="GPUs per node")
    add("--gpu", required=True, choices=sorted(GPUS), help="kind of GPU")
    add("--precision", choices=["bf16", "fp16", "fp32"], default="bf16", help="the same as --bf16 or --fp16")
    add("--mfu", type=float, default=0.45, help="assumed model FLOP/s utilization of one GPU without recompute")
    add("--dataset-tokens", type=float, help="tokens of the training data, like 2.5e8, if there are no files yet")
    add("--document-tokens", type=float, default=500, help="typical length of a document, for the work in attention")
    return parser


def parse_plan(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The planner's flags, and the training program's with None for an open layout.

    Raises UserError.
    """
    own, training = plan_parser(), build_parser(reads_config=False)
    training.set_defaults(**dict.fromkeys(DECIDED))
    argv = with_config(argv, own)
    words, _ = normalize(argv, {**own.actions, **training.actions})
    options, rest = own.parse_known_args(words)
    config = Config.from_namespace(training.parse_args(rest))
    for name in ("nodes", "gpus_per_node", "mfu", "dataset_tokens", "document_tokens"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= MOST:  # also NaN
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be above 0 and at most {MOST:g}")
    if options.mfu >= 1:
        raise UserError(f"--mfu {options.mfu:g} is a fraction of the peak, below 1; 45% is 0.45")
    check_bounds(config.values())
    if config.precision.name == "fp32":
        config = config.with_flags(bf16=options.precision == "bf16", fp16=options.precision == "fp16")
    return options, config


def with_model(config: Config) -> Config:
    """`config` with the shape that flags or the checkpoint of --load describe. Raises UserError."""
    settled = settle(decided(config))
    shape = settled.shape
    if shape is None and (load := settled.checkpoint.load):
        shape = shape_in_config(load) or shape_of_weights(load, settled)
    if shape is None:
        raise UserError("no model: give --preset, --load DIR, or --num-layers, --hidden-size and --num-attention-heads")
    implied = ("load", "recompute_granularity", "recompute_method", "recompute_num_layers")
    config = with_shape(config.with_flags(**{name: settled.value(name) for name in implied}), shape)
    check_positions(config)
    return config


def shape_of_weights(load: str, config: Config) -> ModelShape:
    """Shape of the checkpoint `load`, or of the base of the adapters there. Raises UserError."""
    from megatron_ft.weights.adapters import open_start  # imports torch

    return open_start(load, config.checkpoint.load_iteration, config.values())[0].shape


@dataclass(frozen=True)
class RunLength:
    """Length of a run: sequences per epoch and steps; None where the flags do not tell."""

    sequences_per_epoch: int | None
    source: str  # of that number: "packed" or "estimated"
    steps: int | None

    @classmethod
    def of(cls, config: Config, batch: int, dataset_tokens: float | None) -> "RunLength":
        """From the data, or else from its number of tokens."""
        data, training = config.data, config.training
        epoch, source = None, ""
        if data.prefix or data.train_weighted_split_paths or data.train_weighted_split_paths_path:
            epoch, source = sequences_per_epoch(config), "packed"
        elif dataset_tokens:
            epoch, source = math.ceil(dataset_tokens / ASSUMED_FILL / (data.seq_length + 1)), "estimated"
        if training.train_iters:
            return cls(epoch, source, training.train_iters)
        samples: float | None = training.train_samples
        if not samples and training.train_tokens:
            samples = training.train_tokens / (ASSUMED_FILL * data.seq_length)
        if not samples and training.train_epochs and epoch:
            samples = training.train_epochs * epoch
        return cls(epoch, source, math.ceil(samples / batch) if samples else None)


@dataclass(frozen=True)
class Plan:
    """What the planner found.

    `given`: the layout of the flags, None if they leave it open. `proposals`: the best layouts,
    none if the given one fits or no layout does. `run`: the length of the run. `any_proposal`: for
    what all layouts have in common.
    """

    planner: Planner
    run: RunLength
    given: Proposal | None
    proposals: list[Proposal]
    any_proposal: Proposal

    @property
    def fits(self) -> bool:
        """Whether the given layout fits, or else any."""
        return self.given.memory.fits(self.planner.cluster.gpu) if self.given else bool(self.proposals)


def make_plan(options: argparse.Namespace, config: Config) -> Plan:
    """Judge the given layout; propose others if none is given or it does not fit.

    Takes what `parse_plan` returns. Raises UserError.
    """
    cluster = Cluster(
        gpu=GPUS[options.gpu],
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        mfu=options.mfu,
    )
    config = with_model(config)
    assert config.shape is not None
    batch = config.training.global_batch_size or multiples_near(USUAL_BATCH, cluster.world_size)[0]
    planner = Planner(config.shape, config, cluster, batch, options.document_tokens)
    as_given = bool(config.parallel.tensor or config.parallel.pipeline)
    judged = planner.judge_all(as_given=as_given)
    run = RunLength.of(config, batch, options.dataset_tokens)
    first = (judged.fitting + judged.too_large)[0]
    if as_given and judged.fitting:
        return Plan(planner, run, first, [], first)
    fitting = (planner.judge_all(as_given=False) if as_given else judged).fitting
    return Plan(planner, run, first if as_given else None, best(fitting, SHOWN), first)
