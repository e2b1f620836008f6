"""Expected time of a training step: computation at an assumed MFU, and what a layout adds to it.

Pure arithmetic, as in cost.py. Computation is that of the slowest pipeline stage. Tensor
parallelism adds its collectives, most of which nothing hides; pipelining adds its bubble and the
activations that stages send; data parallelism adds what is left of its communication once it
overlaps with a micro-batch's computation. Bandwidths are the makers' numbers times EFFICIENCY.
"""

from dataclasses import dataclass

from megatron_ft.model import cost
from megatron_ft.model.cost import Gpu, Layout
from megatron_ft.model.shape import ModelShape

EFFICIENCY = 0.75  # of a link's bandwidth in large collectives, about what nccl-tests reports


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs of a run, and the MFU that one of them is assumed to reach without recomputation."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    mfu: float

    @property
    def world_size(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def link(self) -> float:
        """Bytes/s from one GPU to the others of its node."""
        return self.gpu.link * 1e9 * EFFICIENCY

    @property
    def network(self) -> float:
        """Bytes/s from one GPU to another node."""
        return self.gpu.network * 1e9 * EFFICIENCY


def step_seconds(shape: ModelShape, layout: Layout, cluster: Cluster, seq_length: int, attended: float) -> float:
    """Seconds of an optimizer step; `attended` is that of `cost.flops_per_token`."""
    tokens = layout.micro_batch * seq_length
    stages, micro_batches = layout.pipeline_parallel, layout.num_microbatches
    computed = compute_seconds(shape, layout, cluster, tokens, attended)
    micro_batch = computed + tensor_seconds(shape, layout, cluster, tokens)
    micro_batch += pipeline_seconds(shape, layout, cluster, tokens)
    return (micro_batches + stages - 1) * micro_batch + data_seconds(shape, layout, cluster, computed)


def compute_seconds(shape: ModelShape, layout: Layout, cluster: Cluster, tokens: int, attended: float) -> float:
    """Seconds of a micro-batch's computation, forward and backward, on the slowest stage: the last,
    which also has the logits."""
    lora = bool(layout.lora_rank)
    total = cost.flops_per_token(shape, attended, lora=lora)
    logits = (4 if lora else 6) * shape.vocab_size * shape.hidden_size
    layers = (total - logits) / layout.pipeline_parallel
    if layout.recompute == "full":  # one more forward pass: 8 for 6, or 6 for 4 with frozen weights
        layers *= 6 / 4 if lora else 8 / 6
    peak = cluster.gpu.peak_flops(layout.precision) * cluster.mfu * layout.tensor_parallel
    return tokens * (layers + logits) / peak


def tensor_seconds(shape: ModelShape, layout: Layout, cluster: Cluster, tokens: int) -> float:
    """Seconds of a micro-batch's tensor-parallel collectives on one stage.

    Per layer and token, with sequence parallelism: [h] is gathered or scattered four times forward
    and six times backward, of which two overlap with the gradients of weights; without it, two
    all-reduces of twice the volume forward, while those of backward overlap. Where TP exceeds the
    key/value heads, as in multi-query attention, Megatron-Core also gathers queries, keys and
    values forward and scatters their gradients.
    """
    tp = layout.tensor_parallel
    if tp == 1:
        return 0.0
    forward, backward = (4, 4) if layout.sequence_parallel else (4, 0)
    qkv = shape.qkv_rows if shape.num_query_groups < tp else 0
    elements = (forward + backward) * shape.hidden_size + 2 * qkv
    if layout.recompute == "full":
        elements += forward * shape.hidden_size + qkv
    layers = shape.num_layers // layout.pipeline_parallel
    return tokens * layers * elements * layout.element_bytes * (tp - 1) / tp / cluster.link


def pipeline_seconds(shape: ModelShape, layout: Layout, cluster: Cluster, tokens: int) -> float:
    """Seconds to send a micro-batch's activations to the next stage and their gradients back."""
    if layout.pipeline_parallel == 1:
        return 0.0
    split = layout.tensor_parallel if layout.sequence_parallel else 1
    ranks_of_stage = cluster.world_size // layout.pipeline_parallel
    bandwidth = cluster.link if ranks_of_stage < cluster.gpus_per_node else cluster.network
    return 2 * tokens * shape.hidden_size * layout.element_bytes / split / bandwidth


def data_seconds(shape: ModelShape, layout: Layout, cluster: Cluster, computed: float) -> float:
    """Seconds of a step that data-parallel communication adds.

    Gradients are reduced during the backward pass of the last micro-batch, two thirds of its
    `computed` seconds; the distributed optimizer's weights are gathered during the forward pass of
    the first one, or after the step with --optimizer-cpu-offload.
    """
    dp = layout.data_parallel
    if dp == 1:
        return 0.0
    # A ring leaves a node once, through the network cards of all its ranks there.
    in_node = min(dp, max(1, cluster.gpus_per_node // layout.tensor_parallel))
    bandwidth = min(cluster.link, cluster.network * in_node) if dp > in_node else cluster.link
    trained = sum(cost.trained_sizes(shape, shape.vocab_size, layout, 0))
    share = trained * (dp - 1) / dp / bandwidth
    gradients = share * (4 if layout.fp32_gradients else layout.element_bytes)
    if not layout.distributed_optimizer:  # an all-reduce: scattered and gathered
        return max(0.0, 2 * gradients - computed * 2 / 3)
    weights = share * layout.element_bytes
    forward = 0.0 if layout.optimizer_cpu_offload else computed / 3
    return max(0.0, gradients - computed * 2 / 3) + max(0.0, weights - forward)
