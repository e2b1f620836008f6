"""Layouts of a run on a cluster: the memory each needs, how fast it is expected to be, the best.

Layouts come from every divisor of model, cluster and batch; model/cost.py gives their memory and
model/speed.py the time of their steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.model import cost
from megatron_ft.model.cost import Layout, Memory
from megatron_ft.model.shape import ModelShape, padded_vocab_size
from megatron_ft.model.speed import Cluster, step_seconds

# Flags that a proposal decides. Where one was not given, its value in the Config is None.
DECIDED = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size", "global_batch_size")


@dataclass(frozen=True)
class Proposal:
    """A layout with the memory it needs and its expected speed."""

    layout: Layout
    memory: Memory
    step_seconds: float
    mfu: float  # with the layout's losses

    def flags(self) -> str:
        """Training flags for the layout, in addition to those that were given."""
        layout = self.layout
        words = [f"--{layout.precision}"] if layout.precision != "fp32" else []
        words += [f"--tensor-model-parallel-size {layout.tensor_parallel}"] if layout.tensor_parallel > 1 else []
        words += [f"--pipeline-model-parallel-size {layout.pipeline_parallel}"] if layout.pipeline_parallel > 1 else []
        words += ["--sequence-parallel"] if layout.sequence_parallel else []
        words += [f"--recompute-granularity {layout.recompute}"] if layout.recompute else []
        batch = layout.micro_batch * layout.num_microbatches * layout.data_parallel
        return " ".join([*words, f"--micro-batch-size {layout.micro_batch}", f"--global-batch-size {batch}"])


@dataclass(frozen=True)
class Judged:
    """Proposals that fit, fastest first, and those that do not, smallest first."""

    fitting: list[Proposal]
    too_large: list[Proposal]


@dataclass(frozen=True)
class Planner:
    """Proposes layouts for a model, a command line, a cluster and a global batch size.

    `document_tokens` is the typical length of a document, on which the work in attention depends.
    """

    shape: ModelShape
    config: Config
    cluster: Cluster
    batch: int
    document_tokens: float

    def judge_all(self, *, as_given: bool) -> Judged:
        """Every layout of `layouts`, judged."""
        judged = [self.judge(layout) for layout in self.layouts(as_given=as_given)]
        fitting = [p for p in judged if p.memory.fits(self.cluster.gpu)]
        too_large = [p for p in judged if not p.memory.fits(self.cluster.gpu)]
        return Judged(
            sorted(fitting, key=lambda p: (p.step_seconds, p.memory.total)),
            sorted(too_large, key=lambda p: p.memory.total),
        )

    def layouts(self, *, as_given: bool) -> list[Layout]:
        """The given layout, with all values of what it leaves open, or all possible layouts.

        Tensor parallelism stays inside a node, and sequence parallelism accompanies it. Raises
        UserError if the sizes do not divide model, cluster and batch.
        """
        shape, parallel, recompute = self.shape, self.config.parallel, self.config.memory.recompute_granularity
        nodes_divide = [n for n in (1, 2, 4, 8, 16) if self.cluster.gpus_per_node % n == 0]
        layers_divide = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
        recomputes = [recompute] if recompute or as_given else [None, "full"]
        base = decided(self.config).with_flags(global_batch_size=self.batch).layout()
        found: list[Layout] = []
        refusal: UserError | None = None
        for tensor in [parallel.tensor or 1] if as_given else nodes_divide:
            for pipeline in [parallel.pipeline or 1] if as_given else layers_divide:
                try:
                    data = self._data_parallel(tensor, pipeline)
                    micro_batches = self._micro_batches(data, as_given=as_given)
                except UserError as error:
                    refusal = error
                    continue
                found += [
                    replace(
                        base,
                        tensor_parallel=tensor,
                        pipeline_parallel=pipeline,
                        data_parallel=data,
                        sequence_parallel=tensor > 1 and (parallel.sequence or not as_given),
                        micro_batch=micro_batch,
                        num_microbatches=self.batch // (micro_batch * data),
                        recompute=recompute,
                    )
                    for micro_batch in micro_batches
                    for recompute in recomputes
                ]
        if found:
            return found
        if as_given and refusal:
            raise refusal
        near = " or ".join(map(str, multiples_near(self.batch, self.cluster.world_size)))
        raise UserError(
            f"no layout of {self.cluster.world_size} GPUs divides the model and --global-batch-size {self.batch}; "
            f"try {near}"
        )

    def _data_parallel(self, tensor: int, pipeline: int) -> int:
        """Data-parallel ranks of a layout. Raises UserError if the sizes do not divide."""
        self.shape.check_layout(tensor, pipeline)
        if self.cluster.world_size % (tensor * pipeline):
            raise UserError(
                f"{self.cluster.world_size} GPUs are not a multiple of TP {tensor} x PP {pipeline}; "
                "choose sizes that divide them"
            )
        return self.cluster.world_size // (tensor * pipeline)

    def _micro_batches(self, data: int, *, as_given: bool) -> list[int]:
        """Micro-batch sizes to try with `data` data-parallel ranks. Raises UserError for none."""
        given = self.config.training.micro_batch_size
        sizes = [given] if given else [1] if as_given else [1, 2, 4]
        dividing = [size for size in sizes if self.batch % (size * data) == 0]
        if not dividing:
            raise UserError(
                f"--global-batch-size {self.batch} is not a multiple of the micro-batch x {data} data-parallel ranks"
            )
        return dividing

    def judge(self, layout: Layout) -> Proposal:
        """Memory and expected speed of a layout."""
        shape, config, cluster = self.shape, self.config, self.cluster
        memory = cost.estimate(shape, padded_vocab(config, shape, layout), layout, config.data.seq_length)
        attended = cost.attended_length(shape, min(self.document_tokens, config.data.seq_length))
        seconds = step_seconds(shape, layout, cluster, config.data.seq_length, attended)
        flops = self.batch * config.data.seq_length * cost.flops_per_token(shape, attended, lora=bool(layout.lora_rank))
        peak = cluster.gpu.peak_flops(layout.precision) * cluster.world_size
        return Proposal(layout, memory, seconds, flops / (peak * seconds))


def decided(config: Config) -> Config:
    """`config` with 1 for every size that a proposal decides and that was not given."""
    sizes = {name: config.value(name) or 1 for name in DECIDED if name != "global_batch_size"}
    return config.with_flags(**sizes)


def padded_vocab(config: Config, shape: ModelShape, layout: Layout) -> int:
    """Vocabulary size with the padding of a layout."""
    return padded_vocab_size(shape.vocab_size, config.model.make_vocab_size_divisible_by, layout.tensor_parallel)


def best(fitting: Sequence[Proposal], count: int) -> list[Proposal]:
    """The fastest proposals; of those that differ only in the micro-batch, one."""
    chosen: dict[Layout, Proposal] = {}
    for proposal in fitting:
        kind = replace(proposal.layout, micro_batch=1, num_microbatches=1)
        chosen.setdefault(kind, proposal)
    return list(chosen.values())[:count]


def multiples_near(number: int, step: int) -> list[int]:
    """The positive multiples of `step` on both sides of `number`, the nearer one first.

    >>> multiples_near(125, 24)
    [120, 144]
    """
    below = number // step * step
    return sorted({max(below, step), below + step}, key=lambda n: abs(n - number))
