"""Does a run fit, and how long does it take? Memory per GPU, steps and hours, without a GPU.

    python launch/plan.py --preset starcoderbase --nodes 8 --gpus-per-node 8 --gpu h100-80gb \\
        --data-prefix data/commits

Takes the flags of the training program, so a training command becomes a plan with these flags in
front. With --tensor-model-parallel-size or --pipeline-model-parallel-size it judges that layout
(exit status 1 if it does not fit); without them it proposes the best three. Weights, gradients and
optimizer state are exact, activations within a few percent. Hours follow from --mfu, which is an
assumption: measure a few steps and pass what the log prints.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

# Not this folder: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_ft.checkpoint.retention import Retention, most_at_once
from megatron_ft.config.arguments import LENGTHS, print_settings
from megatron_ft.config.command_line import with_config, words_of
from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.config_file import PRINT_CONFIG
from megatron_ft.errors import EXIT_DONE, run_program
from megatron_ft.launcher.planning import Plan, RunLength, make_plan, parse_plan, plan_parser
from megatron_ft.launcher.proposals import Planner, Proposal, padded_vocab
from megatron_ft.metrics.model_facts import model_name
from megatron_ft.model.cost import GIB, Layout, checkpoint_bytes
from megatron_ft.printable import counted
from megatron_ft.training.schedule import few_steps

DOES_NOT_FIT = 1


def main() -> int:
    """Parse, plan, print; 1 if the given layout, or every layout, does not fit."""
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        print(plan_parser(__doc__).format_help(), end="")
        return EXIT_DONE
    if PRINT_CONFIG in words:
        own = plan_parser()
        print_settings(own, with_config(words, own))
        return EXIT_DONE
    options, config = parse_plan(words)
    given_flags = given_words(config)  # before the model's defaults are filled in
    plan = make_plan(options, config)
    print_plan(plan, given_flags)
    return EXIT_DONE if plan.fits else DOES_NOT_FIT


def print_plan(plan: Plan, given_flags: Sequence[str]) -> None:
    """Print what all layouts have in common, the given one, and the proposals."""
    planner, run = plan.planner, plan.run
    print_run(planner, run, plan.any_proposal.layout)
    if plan.given:
        print(f"\nthis layout {'fits' if plan.fits else 'does not fit'}:")
        print_proposal(plan.given, planner, run, given_flags)
    if not plan.fits and not plan.proposals:
        remedies = ["more nodes", "a shorter --seq-length"]
        remedies += [] if planner.config.optimizer.cpu_offload else ["--optimizer-cpu-offload"]
        remedies += [] if planner.config.lora.rank else ["--lora-rank 16"]
        cluster = planner.cluster
        print(f"\nno layout fits {cluster.world_size} x {cluster.gpu.name}; options: {', '.join(remedies)}")
    for number, proposal in enumerate(plan.proposals, 1):
        print(f"\nproposal {number}:")
        print_proposal(proposal, planner, run, given_flags)


def print_run(planner: Planner, run: RunLength, layout: Layout) -> None:
    """Print what all layouts have in common; `layout` is any of them."""
    config, cluster, batch = planner.config, planner.cluster, planner.batch
    print(
        f"{model_name(planner.shape, config.model.preset)}: {planner.shape.num_parameters():,} parameters; "
        f"sequences of {config.data.seq_length:,} tokens, {batch} per step"
    )
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    print(f"{cluster.world_size} x {cluster.gpu.name}, {cluster.gpu.memory / GIB:.1f} GiB each, {nodes}")
    if run.sequences_per_epoch:
        steps = math.ceil(run.sequences_per_epoch / batch)
        print(f"one epoch: {counted(run.sequences_per_epoch, 'sequence')} ({run.source}), {counted(steps, 'step')}")
    size = checkpoint_bytes(planner.shape, padded_vocab(config, planner.shape, layout), layout)
    most = most_at_once([], run.steps, Retention.of(config))
    at_once = f"at most {most} at once" if run.steps or config.checkpoint.keep_last else "all are kept"
    print(f"checkpoint {size / 1e9:,.1f} GB, {at_once}")
    lengths = {unit: config.value(f"train_{unit}") for unit in LENGTHS}
    epochs = lengths.pop("epochs") or 1
    if run.sequences_per_epoch and not any(lengths.values()):
        unit = layout.micro_batch * layout.data_parallel
        for warning in few_steps(run.sequences_per_epoch, epochs, batch, unit):
            print(warning)


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
        print(f"  epoch    {counted(math.ceil(steps), 'step')}, {steps * step / 3600:.1f} h")
    if run.steps:
        hours = run.steps * step / 3600
        print(f"  run      {counted(run.steps, 'step')}, {hours:.1f} h, {hours * cluster.world_size:,.0f} GPU hours")


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
