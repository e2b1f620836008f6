"""Will it fit, and how long will it take? Memory a GPU, steps and hours of a training run, before a job is queued. Needs no GPU.

    python launch/plan.py --preset starcoderbase --nodes 8 --gpus-per-node 8 --gpu h100-80gb --data-prefix data/commits

Training flags are the training program's own, so a plan is made by putting these in front of a command line that exists. With
--tensor-model-parallel-size or --pipeline-model-parallel-size it judges that layout (exit status 1 when it does not fit); without
them it proposes the best three. Bytes are exact for weights, gradients and optimizer, and within some per cent for activations;
hours follow from --mfu, which is an assumption: measure a few steps and put in what the log says.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others' of the same name

from megatron_ft.checkpoint.retention import most_at_once
from megatron_ft.config.arguments import normalize, settle, with_shape
from megatron_ft.config.command_line import build_parser, check_bounds, words_of
from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import EXIT_DONE, UserError, run_program
from megatron_ft.model import cost
from megatron_ft.model.cost import GIB, GPUS, Layout, Memory
from megatron_ft.model.shape import ModelShape, padded_vocab_size

DOES_NOT_FIT = 1
# How the assumed MFU, which is that of one GPU alone with nothing recomputed, shrinks in a layout.
TENSOR_PARALLEL_LOSS = 0.06  # a doubling of TP inside a node: a layer's collectives, 10 numbers a token and hidden unit
PIPELINE_LOSS = 0.02  # the first and last stage carry embedding and logits besides
ASSUMED_FILL = 0.98  # of rows, when only the number of tokens is known


def plan_parser() -> Parser:
    """The flags that are the planner's own."""
    parser = Parser(
        prog="launch/plan.py",
        description=__doc__,
        formatter_class=Help,
        allow_abbrev=False,
        epilog="training flags that matter here: --preset or --load or the model's numbers, --seq-length, "
        "--micro-batch-size, --global-batch-size, --tensor-model-parallel-size, --pipeline-model-parallel-size, "
        "--sequence-parallel, --recompute-granularity, --[no-]use-distributed-optimizer, --optimizer-cpu-offload, "
        "--lora-rank, --data-prefix or --train-weighted-split-paths-path, --train-epochs and the other lengths",
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="nodes of the job")
    add("--gpus-per-node", type=int, default=8, help="GPUs a node")
    add("--gpu", required=True, choices=sorted(GPUS), help="kind of GPU")
    add("--precision", choices=["bf16", "fp16", "fp32"], default="bf16", help="--bf16 and --fp16 say it too")
    add("--mfu", type=float, default=0.45, help="assumed model FLOP/s utilisation of one GPU, nothing recomputed")
    add("--dataset-tokens", type=float, help="tokens of the training data, like 2.5e8, when there are no files yet")
    add("--document-tokens", type=float, default=500, help="typical document, for attention's share of the work")
    return parser


@dataclass(frozen=True)
class Proposal:
    """A layout with what it needs and how fast it is expected to be."""

    layout: Layout
    memory: Memory
    step_seconds: float
    mfu: float  # expected, with the layout's losses

    def flags(self) -> str:
        """Training flags that ask for it, beside those that were given."""
        layout = self.layout
        words = [f"--{self.layout.precision}"] if layout.precision != "fp32" else []
        words += [f"--tensor-model-parallel-size {layout.tensor_parallel}"] if layout.tensor_parallel > 1 else []
        words += [f"--pipeline-model-parallel-size {layout.pipeline_parallel}"] if layout.pipeline_parallel > 1 else []
        words += ["--sequence-parallel"] if layout.sequence_parallel else []
        words += [f"--recompute-granularity {layout.recompute}"] if layout.recompute else []
        overlaps = layout.distributed_optimizer and layout.data_parallel > 1 and not layout.optimizer_cpu_offload
        words += ["--overlap-grad-reduce --overlap-param-gather"] if overlaps else []
        rows = layout.micro_batch * layout.num_microbatches * layout.data_parallel
        return " ".join([*words, f"--micro-batch-size {layout.micro_batch}", f"--global-batch-size {rows}"])


def main() -> int:
    """Parse, plan, print; 1 when a given layout, or every layout, does not fit."""
    cluster, config = parse(sys.argv[1:])
    config = with_model(config)
    shape = config.shape
    assert shape is not None
    gpu, world_size = GPUS[cluster.gpu], cluster.nodes * cluster.gpus_per_node
    batch = config.training.global_batch_size or multiples_near(128, world_size)[0]
    given = bool(config.parallel.tensor or config.parallel.pipeline)
    fitting, others = judge_all(shape, config, cluster, batch, as_given=given)
    rows, source = rows_an_epoch(cluster, config)
    print(
        f"{config.model.preset or 'model'}: {shape.num_parameters():,} parameters; rows of {config.data.seq_length:,} tokens, {batch} a step"
    )
    print(
        f"{world_size} x {gpu.name}, {gpu.memory / GIB:.1f} GiB each, {cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    )
    if rows:
        print(f"an epoch: {rows:,} rows ({source}), {math.ceil(rows / batch):,} steps")

    print(checkpoint_line(shape, config, (fitting + others)[0].layout, steps_of_run(config, rows, batch)))

    if given:
        print(f"\nthis layout {'fits' if fitting else 'DOES NOT FIT'}:")
        describe((fitting or others)[0], cluster, config, rows, batch)
        if fitting:
            return EXIT_DONE
        fitting, _ = judge_all(shape, config, cluster, batch, as_given=False)
    if not fitting:
        ways = ["more nodes", "a shorter --seq-length"]
        ways += [] if config.optimizer.cpu_offload else ["--optimizer-cpu-offload"]
        ways += [] if config.lora.rank else ["--lora-rank 16"]
        print(f"\nno layout fits {world_size} x {gpu.name}; ways out: {', '.join(ways)}")
        return DOES_NOT_FIT
    for number, proposal in enumerate(best(fitting, 3), 1):
        print(f"\nproposal {number}:")
        describe(proposal, cluster, config, rows, batch)
    return DOES_NOT_FIT if given else EXIT_DONE


# Left open by a plan that proposes a layout: None where they were not given.
UNDECIDED = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size", "global_batch_size")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The planner's flags, and the training program's with None for the layout that was not given."""
    own, training = plan_parser(), build_parser()
    training.set_defaults(**dict.fromkeys(UNDECIDED))
    words, _ = normalize(argv, {**own.actions, **training.actions})
    cluster, rest = own.parse_known_args(words)
    config = Config.from_namespace(training.parse_args(rest))
    for name in ("nodes", "gpus_per_node", "mfu"):
        if getattr(cluster, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cluster, name)}: must be above 0")
    if cluster.mfu >= 1:
        raise UserError(f"--mfu {cluster.mfu:g} is a fraction of the peak, below 1; 45% is 0.45")
    check_bounds(config.values())
    cluster.given = "".join(f" {words}" for words in given_words(config))
    if config.precision.name == "fp32":
        config = config.with_flags(bf16=cluster.precision == "bf16", fp16=cluster.precision == "fp16")
    return cluster, config


def given_words(config: Config) -> list[str]:
    """The flags that a proposal does not choose and that differ from their defaults, as they are typed.

    The estimate is made for them, so the run must have them too.
    """
    return [
        " ".join(words_of(entry, config.value(dest)))
        for dest, entry in ENTRIES.items()
        if entry.flag.planned and config.value(dest) != entry.default
    ]


def multiples_near(wanted: int, step: int) -> list[int]:
    """The multiples of `step` on both sides of `wanted`, the nearer first; above 0."""
    below = wanted // step * step
    return sorted({max(below, step), below + step}, key=lambda n: abs(n - wanted))


def with_model(config: Config) -> Config:
    """`config` with the shape that flags or the checkpoint to start from describe. Raises UserError."""
    decided = {name: config.value(name) or 1 for name in UNDECIDED if name != "global_batch_size"}
    settled = settle(config.with_flags(**decided))
    shape = settled.shape
    if shape is None and settled.checkpoint.load:
        from megatron_ft.weights.adapters import open_start

        start, iteration = settled.checkpoint.load, settled.checkpoint.load_iteration
        shape = open_start(start, iteration, settled.values())[0].shape
    if shape is None:
        raise UserError("no model: give --preset, --load DIR, or --num-layers, --hidden-size and --num-attention-heads")
    implied = ("load", "recompute_granularity", "recompute_method", "recompute_num_layers")
    return with_shape(config.with_flags(**{name: settled.value(name) for name in implied}), shape)


def rows_an_epoch(cluster: argparse.Namespace, config: Config) -> tuple[int | None, str]:
    """Packed rows of one pass over the data, and where the number comes from; None when nothing is said of data."""
    if config.data.prefix or config.data.train_weighted_split_paths or config.data.train_weighted_split_paths_path:
        from megatron_ft.data.packed_dataset import sequences_per_epoch

        return sequences_per_epoch(config), "packed"
    if cluster.dataset_tokens:
        return math.ceil(cluster.dataset_tokens / ASSUMED_FILL / (config.data.seq_length + 1)), "estimated"
    return None, ""


def layouts(
    shape: ModelShape, config: Config, cluster: argparse.Namespace, batch: int, *, as_given: bool
) -> list[Layout]:
    """Layouts to judge: the given one (with every choice left open tried), or all that divide model, cluster and batch.

    Tensor parallelism stays inside a node, and sequence parallelism goes with it. Raises UserError when the given sizes divide nothing.
    """
    world_size = cluster.nodes * cluster.gpus_per_node
    given_tp, given_pp = config.parallel.tensor, config.parallel.pipeline
    tps = [given_tp or 1] if as_given else [n for n in (1, 2, 4, 8, 16) if cluster.gpus_per_node % n == 0]
    pps = [given_pp or 1] if as_given else [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
    recomputes = (
        [config.memory.recompute_granularity] if config.memory.recompute_granularity or as_given else [None, "full"]
    )
    found, refusal = [], None
    for tp in tps:
        for pp in pps:
            try:
                shape.check_layout(tp, pp)
                if world_size % (tp * pp):
                    raise UserError(
                        f"{world_size} GPUs are not a multiple of TP {tp} x PP {pp}; choose sizes that divide them"
                    )
                dp = world_size // (tp * pp)
                micros = (
                    [config.training.micro_batch_size]
                    if config.training.micro_batch_size
                    else [1]
                    if as_given
                    else [1, 2, 4]
                )
                micros = [m for m in micros if batch % (m * dp) == 0]
                if not micros:
                    raise UserError(
                        f"--global-batch-size {batch} is not a multiple of the micro batch x {dp} data-parallel ranks"
                    )
            except UserError as error:
                refusal = error
                continue
            found += [
                Layout(
                    tensor_parallel=tp,
                    pipeline_parallel=pp,
                    data_parallel=dp,
                    sequence_parallel=tp > 1 and (config.parallel.sequence or not as_given),
                    distributed_optimizer=config.parallel.distributed_optimizer,
                    precision="bf16" if config.precision.bf16 else "fp16" if config.precision.fp16 else "fp32",
                    fp32_gradients=config.precision.fp32_gradients,
                    optimizer=config.optimizer.name,
                    optimizer_cpu_offload=config.optimizer.cpu_offload,
                    micro_batch=micro,
                    num_microbatches=batch // (micro * dp),
                    recompute=recompute,
                    recompute_method=config.memory.recompute_method or "uniform",
                    recompute_num_layers=config.memory.recompute_num_layers or 1,
                    lora_rank=config.lora.rank,
                    lora_targets=tuple(config.lora.targets.split(",")) if config.lora.rank else (),
                    lora_dropout=config.lora.dropout,
                )
                for micro in micros
                for recompute in recomputes
            ]
    if not found and not as_given:
        ways = " or ".join(map(str, multiples_near(batch, world_size)))
        raise UserError(f"no layout of {world_size} GPUs divides the model and --global-batch-size {batch}; try {ways}")
    if not found:
        raise refusal
    return found


def judge_all(
    shape: ModelShape, config: Config, cluster: argparse.Namespace, batch: int, *, as_given: bool
) -> tuple[list[Proposal], list[Proposal]]:
    """Proposals that fit, fastest first, and those that do not, smallest first."""
    judged = [
        judge(shape, config, cluster, layout, batch)
        for layout in layouts(shape, config, cluster, batch, as_given=as_given)
    ]
    fitting = [p for p in judged if p.memory.fits(GPUS[cluster.gpu])]
    others = [p for p in judged if not p.memory.fits(GPUS[cluster.gpu])]
    by_speed = sorted(fitting, key=lambda p: (p.step_seconds, p.memory.total))
    return by_speed, sorted(others, key=lambda p: p.memory.total)


def judge(shape: ModelShape, config: Config, cluster: argparse.Namespace, layout: Layout, batch: int) -> Proposal:
    """Memory and expected speed of a layout."""
    padded = padded_vocab_size(shape.vocab_size, config.model.make_vocab_size_divisible_by, layout.tensor_parallel)
    need = cost.estimate(shape, padded, layout, config.data.seq_length)
    mfu = cluster.mfu * (1 - tensor_parallel_loss(shape)) ** math.log2(layout.tensor_parallel)
    pp, micros = layout.pipeline_parallel, layout.num_microbatches
    mfu *= micros / (micros + pp - 1) * (1 - PIPELINE_LOSS if pp > 1 else 1)  # the pipeline's bubble
    lora = bool(layout.lora_rank)
    if layout.recompute == "full":  # one more forward pass: 8 for 6, or 6 for 4 with frozen weights
        mfu *= 4 / 6 if lora else 6 / 8
    attended = min(cluster.document_tokens, config.data.seq_length)
    flops = batch * config.data.seq_length * cost.flops_per_token(shape, attended, lora=lora)
    peak = GPUS[cluster.gpu].peak_flops(layout.precision) * cluster.nodes * cluster.gpus_per_node
    return Proposal(layout, need, flops / (peak * mfu), mfu)


def tensor_parallel_loss(shape: ModelShape) -> float:
    """Share of the MFU that a doubling of TP costs.

    A layer gathers or scatters h numbers a token four times forward, and in backward four times and two more for the gradients of
    weights. Multi-query attention adds queries, keys and values, which Megatron-Core gathers forward and scatters backward.
    """
    more = 2 * shape.qkv_rows if shape.multi_query else 0
    return TENSOR_PARALLEL_LOSS * (1 + more / (10 * shape.hidden_size))


def best(fitting: list[Proposal], count: int) -> list[Proposal]:
    """The fastest of each TP, PP and recompute, so that proposals differ in kind and not in the micro batch alone."""
    chosen: dict[Layout, Proposal] = {}
    for proposal in fitting:
        kind = replace(proposal.layout, micro_batch=1, num_microbatches=1)
        chosen.setdefault(kind, proposal)
    return list(chosen.values())[:count]


def describe(proposal: Proposal, cluster: argparse.Namespace, config: Config, rows: int | None, batch: int) -> None:
    """Print a proposal."""
    need, layout, step, gpu = proposal.memory, proposal.layout, proposal.step_seconds, GPUS[cluster.gpu]
    parts = " + ".join(
        f"{name} {getattr(need, name) / GIB:.1f}" for name in ("weights", "gradients", "optimizer", "activations")
    )
    room = "fits" if need.fits(gpu) else "does not fit"
    tokens = batch * config.data.seq_length
    print(f"  layout   {layout}, micro batch {layout.micro_batch} x {layout.num_microbatches}")
    print(f"  flags    {proposal.flags()}{cluster.given}")
    print(f"  memory   {parts} = {need.total / GIB:.1f} GiB of {gpu.memory / GIB:.1f}: {room}")
    if need.host:
        node = cluster.gpus_per_node * need.host
        print(
            f"  host     {need.host / GIB:.1f} GiB a rank, {node / GIB:.1f} GiB a node, for the optimizer's part there"
        )
    print(f"  speed    {tokens / step:,.0f} tokens/s, {step:.2f} s a step at {100 * proposal.mfu:.0f} % MFU")
    if rows:
        print(f"  epoch    {math.ceil(rows / batch):,} steps, {rows / batch * step / 3600:.1f} h")
    if steps := steps_of_run(config, rows, batch):
        print(
            f"  run      {steps:,} steps, {steps * step / 3600:.1f} h, {steps * step / 3600 * layout_gpus(layout):,.0f} GPU hours"
        )


def checkpoint_line(shape: ModelShape, config: Config, layout: Layout, steps: int | None) -> str:
    """Size of a checkpoint, and how many of them --save must have room for."""
    padded = padded_vocab_size(shape.vocab_size, config.model.make_vocab_size_divisible_by, layout.tensor_parallel)
    most = most_at_once(
        [],
        steps,
        save_interval=config.checkpoint.save_interval,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        best=bool(config.validation.interval),
    )
    size = cost.checkpoint_bytes(shape, padded, layout)
    at_once = f"at most {most} at once" if steps or config.checkpoint.keep_last else "all are kept"
    return f"checkpoint {size / 1e9:,.1f} GB, {at_once}"


def layout_gpus(layout: Layout) -> int:
    """GPUs of a layout."""
    return layout.tensor_parallel * layout.pipeline_parallel * layout.data_parallel


def steps_of_run(config: Config, rows: int | None, batch: int) -> int | None:
    """Steps of the whole run, by whichever length was given."""
    if config.training.train_iters:
        return config.training.train_iters
    samples = config.training.train_samples or (
        config.training.train_tokens and config.training.train_tokens / (ASSUMED_FILL * config.data.seq_length)
    )
    samples = samples or (config.training.train_epochs and rows and config.training.train_epochs * rows)
    return math.ceil(samples / batch) if samples else None


if __name__ == "__main__":
    run_program(main)
