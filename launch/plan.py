"""Does a run fit, and how long does it take? Memory per GPU, steps and hours, without a GPU.

    python launch/plan.py --preset starcoderbase --nodes 8 --gpus-per-node 8 --gpu h100-80gb \\
        --data-prefix data/commits

Takes the flags of the training program, so a training command becomes a plan with these flags in
front. With --tensor-model-parallel-size or --pipeline-model-parallel-size it judges that layout
(exit status 1 if it does not fit); without them it proposes the best three. Weights, gradients and
optimizer state are exact, activations within a few percent. Hours follow from --mfu, which is an
assumption: measure a few steps and pass what the log prints.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Not this folder: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_ft.checkpoint.retention import Retention, most_at_once
from megatron_ft.config.arguments import normalize, print_settings, settle, with_shape
from megatron_ft.config.command_line import build_parser, check_bounds, with_config, words_of
from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.config_file import PRINT_CONFIG
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import EXIT_DONE, UserError, run_program
from megatron_ft.launcher.proposals import (
    DECIDED,
    Planner,
    Proposal,
    best,
    decided,
    multiples_near,
    padded_vocab,
)
from megatron_ft.model.cost import GIB, GPUS, Layout, checkpoint_bytes
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.speed import Cluster
from megatron_ft.weights.hf_config import shape_in_config

DOES_NOT_FIT = 1
USUAL_BATCH = 128  # sequences per step, if --global-batch-size is not given
ASSUMED_FILL = 0.98  # of sequences, if only the number of tokens is known


def plan_parser() -> Parser:
    """The planner's own flags."""
    parser = Parser(
        prog="launch/plan.py",
        description=__doc__,
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


def main() -> int:
    """Parse, plan, print; 1 if the given layout, or every layout, does not fit."""
    options, config = parse(sys.argv[1:])
    cluster = Cluster(
        gpu=GPUS[options.gpu],
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        mfu=options.mfu,
    )
    given_flags = given_words(config)  # before the model's defaults are filled in
    config = with_model(config)
    assert config.shape is not None
    batch = config.training.global_batch_size or multiples_near(USUAL_BATCH, cluster.world_size)[0]
    planner = Planner(config.shape, config, cluster, batch, options.document_tokens)
    given = bool(config.parallel.tensor or config.parallel.pipeline)
    judged = planner.judge_all(as_given=given)
    run = RunLength.of(config, batch, options.dataset_tokens)
    print_run(planner, run, (judged.fitting + judged.too_large)[0].layout)
    if given:
        print(f"\nthis layout {'fits' if judged.fitting else 'does not fit'}:")
        print_proposal((judged.fitting or judged.too_large)[0], planner, run, given_flags)
        if judged.fitting:
            return EXIT_DONE
        judged = planner.judge_all(as_given=False)
    if not judged.fitting:
        remedies = ["more nodes", "a shorter --seq-length"]
        remedies += [] if config.optimizer.cpu_offload else ["--optimizer-cpu-offload"]
        remedies += [] if config.lora.rank else ["--lora-rank 16"]
        print(f"\nno layout fits {cluster.world_size} x {cluster.gpu.name}; options: {', '.join(remedies)}")
        return DOES_NOT_FIT
    for number, proposal in enumerate(best(judged.fitting, 3), 1):
        print(f"\nproposal {number}:")
        print_proposal(proposal, planner, run, given_flags)
    return DOES_NOT_FIT if given else EXIT_DONE


# ---- input ---------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The planner's flags, and the training program's with None for an open layout."""
    own, training = plan_parser(), build_parser(reads_config=False)
    training.set_defaults(**dict.fromkeys(DECIDED))
    argv = with_config(argv, own)
    if PRINT_CONFIG in argv:
        print_settings(own, argv)
        sys.exit()
    words, _ = normalize(argv, {**own.actions, **training.actions})
    options, rest = own.parse_known_args(words)
    config = Config.from_namespace(training.parse_args(rest))
    for name in ("nodes", "gpus_per_node", "mfu"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be above 0")
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
    return with_shape(config.with_flags(**{name: settled.value(name) for name in implied}), shape)


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
            from megatron_ft.data.packed_dataset import sequences_per_epoch  # imports torch

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


# ---- output --------------------------------------------------------------------------------------


def print_run(planner: Planner, run: RunLength, layout: Layout) -> None:
    """Print what all layouts have in common; `layout` is any of them."""
    config, cluster, batch = planner.config, planner.cluster, planner.batch
    print(
        f"{config.model.preset or 'model'}: {planner.shape.num_parameters():,} parameters; "
        f"sequences of {config.data.seq_length:,} tokens, {batch} per step"
    )
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    print(f"{cluster.world_size} x {cluster.gpu.name}, {cluster.gpu.memory / GIB:.1f} GiB each, {nodes}")
    if run.sequences_per_epoch:
        steps = math.ceil(run.sequences_per_epoch / batch)
        print(f"one epoch: {run.sequences_per_epoch:,} sequences ({run.source}), {steps:,} steps")
    size = checkpoint_bytes(planner.shape, padded_vocab(config, planner.shape, layout), layout)
    most = most_at_once([], run.steps, Retention.of(config))
    at_once = f"at most {most} at once" if run.steps or config.checkpoint.keep_last else "all are kept"
    print(f"checkpoint {size / 1e9:,.1f} GB, {at_once}")


def print_proposal(proposal: Proposal, planner: Planner, run: RunLength, given_flags: Sequence[str]) -> None:
    """Print a proposal's layout, flags (with the given ones), memory, speed and hours."""
    memory, layout, step = proposal.memory, proposal.layout, proposal.step_seconds
    cluster, batch = planner.cluster, planner.batch
    parts = " + ".join(
        f"{name} {getattr(memory, name) / GIB:.1f}" for name in ("weights", "gradients", "optimizer", "activations")
    )
    fits = "fits" if memory.fits(cluster.gpu) else "does not fit"
    tokens = batch * planner.config.data.seq_length
    print(f"  layout   {layout}, micro-batch {layout.micro_batch} x {layout.num_microbatches}")
    print(f"  flags    {' '.join([proposal.flags(), *given_flags])}")
    print(f"  memory   {parts} = {memory.total / GIB:.1f} GiB of {cluster.gpu.memory / GIB:.1f}: {fits}")
    if memory.host:
        per_node = cluster.gpus_per_node * memory.host
        print(f"  host     {memory.host / GIB:.1f} GiB per rank, {per_node / GIB:.1f} GiB per node, for the optimizer")
    print(f"  speed    {tokens / step:,.0f} tokens/s, {step:.2f} s per step at {100 * proposal.mfu:.0f}% MFU")
    if run.sequences_per_epoch:
        steps = run.sequences_per_epoch / batch
        print(f"  epoch    {math.ceil(steps):,} steps, {steps * step / 3600:.1f} h")
    if run.steps:
        hours = run.steps * step / 3600
        print(f"  run      {run.steps:,} steps, {hours:.1f} h, {hours * cluster.world_size:,.0f} GPU hours")


def given_words(config: Config) -> list[str]:
    """Flags that the estimate depends on and a proposal does not decide, if not their defaults.

    The run must be given them too.
    """
    return [
        " ".join(words_of(entry, config.value(dest)))
        for dest, entry in ENTRIES.items()
        if entry.flag.planned and config.value(dest) != entry.default
    ]


if __name__ == "__main__":
    run_program(main)
