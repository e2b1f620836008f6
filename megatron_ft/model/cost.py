"""What a model costs: parameters, bytes per GPU, FLOPs per token; and what known GPUs offer.

Pure arithmetic on a `ModelShape` and a `Layout`, without torch. `launch/plan.py` proposes layouts
with it, the training banner prints the expected memory, and the log converts tokens/s to TFLOP/s
and MFU. Parameters and state are exact (tests compare them with Megatron-Core models); activations
are the sum of the tensors that are kept for backward.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from megatron_ft.model.shape import ModelShape

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One device. Peaks are dense; all numbers but `memory` are from the makers' data sheets."""

    name: str
    memory: int  # bytes a program can allocate
    peak_16bit: float  # TFLOP/s of the matrix units
    peak_fp32: float  # TFLOP/s
    link: float  # GB/s to the other GPUs of its node, in one direction
    network: float  # GB/s to other nodes: its part of the network cards of a usual server

    def peak_flops(self, precision: str) -> float:
        """Peak FLOP/s in `precision` (fp32, bf16 or fp16)."""
        return 1e12 * (self.peak_fp32 if precision == "fp32" else self.peak_16bit)


def _gpu(name: str, gib: float, peak_16bit: float, peak_fp32: float, link: float, network: float) -> tuple[str, Gpu]:
    return name, Gpu(name, int(gib * GIB), peak_16bit, peak_fp32, link, network)


# In GiB; a program can allocate slightly less than what the name promises.
GPUS = dict(
    [
        _gpu("v100-16gb", 15.7, 125, 15.7, 150, 6.25),
        _gpu("v100-32gb", 31.7, 125, 15.7, 150, 6.25),
        _gpu("a10-24gb", 22.0, 125, 31.2, 32, 6.25),
        _gpu("a40-48gb", 44.3, 149.7, 37.4, 32, 6.25),
        _gpu("a100-40gb", 39.4, 312, 19.5, 300, 25),
        _gpu("a100-80gb", 79.1, 312, 19.5, 300, 25),
        _gpu("l40s-48gb", 44.4, 362, 91.6, 32, 12.5),
        _gpu("h100-pcie-80gb", 79.1, 756, 51, 64, 25),
        _gpu("h100-nvl-94gb", 93.1, 835, 60, 64, 25),
        _gpu("h100-80gb", 79.1, 989.4, 67, 450, 50),
        _gpu("gh200-96gb", 94.5, 989.4, 67, 450, 50),
        _gpu("h200-141gb", 139.8, 989.4, 67, 450, 50),
        _gpu("b200-180gb", 178.0, 2250, 75, 900, 50),
        _gpu("mi250x-64gb", 64.0, 191.5, 47.9, 50, 12.5),  # one of its two dies, which is what a rank drives
        _gpu("mi300x-192gb", 191.5, 1307.4, 163.4, 448, 50),
    ]
)


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls `device_name` ("NVIDIA A100-SXM4-80GB"), None if it is unknown."""
    name = device_name.lower()
    known: list[tuple[str, str | None]] = [
        ("gh200", "gh200-96gb"),
        ("b200", "b200-180gb"),
        ("h200", "h200-141gb"),
        ("h100 pcie", "h100-pcie-80gb"),
        ("h100 nvl", "h100-nvl-94gb"),
        ("h100", "h100-80gb"),
        ("l40s", "l40s-48gb"),
        ("a100", "a100-40gb" if "40gb" in name else "a100-80gb"),
        ("a40", "a40-48gb"),
        ("a10g", None),
        ("nvidia a10", "a10-24gb"),
        ("v100", "v100-32gb" if "32gb" in name else "v100-16gb"),
        ("mi250x", "mi250x-64gb"),
        ("mi300x", "mi300x-192gb"),
    ]
    for mark, gpu in known:  # the first match counts: "gh200" contains "h200"
        if mark in name:
            return GPUS[gpu] if gpu else None
    return None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is distributed and what it stores: the flags that decide memory and speed."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    context_parallel: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    precision: str = "bf16"  # fp32, bf16, fp16
    fp32_gradients: bool = True  # --accumulate-allreduce-grads-in-fp32
    optimizer: str = "adam"
    optimizer_cpu_offload: bool = False
    micro_batch: int = 1
    num_microbatches: int = 1
    recompute: str | None = None  # None, selective, full
    recompute_num_layers: int = 1
    recompute_method: str = "uniform"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0

    def __str__(self) -> str:
        parts = [f"TP {self.tensor_parallel}", f"PP {self.pipeline_parallel}", f"DP {self.data_parallel}"]
        parts += [f"CP {self.context_parallel}"] if self.context_parallel > 1 else []
        parts += ["sequence parallel"] if self.sequence_parallel else []
        parts += ["distributed optimizer"] if self.distributed_optimizer and self.data_parallel > 1 else []
        parts += [f"{self.recompute} recompute"] if self.recompute else []
        return ", ".join(parts)

    @property
    def optimizer_shards(self) -> int:
        """Ranks across which the optimizer state is sharded."""
        return self.data_parallel * self.context_parallel if self.distributed_optimizer else 1

    @property
    def element_bytes(self) -> int:
        """Bytes per element of weights and activations."""
        return 4 if self.precision == "fp32" else 2


# ---- parameters ----


class Linear(NamedTuple):
    """A linear layer [outputs, inputs], and how TP shards it: "column" (outputs) or "row"."""

    outputs: int
    inputs: int
    parallel: Literal["column", "row"]


def linear_shapes(shape: ModelShape) -> dict[str, Linear]:
    """The four linear layers of a transformer layer, by Megatron's names."""
    h, f = shape.hidden_size, shape.ffn_hidden_size
    return {
        "linear_qkv": Linear(shape.qkv_rows, h, "column"),
        "linear_proj": Linear(h, h, "row"),
        "linear_fc1": Linear(f, h, "column"),
        "linear_fc2": Linear(h, f, "row"),
    }


def sizes_on_rank(shape: ModelShape, padded_vocab_size: int, layout: Layout, stage: int) -> list[int]:
    """Elements of each parameter on one rank of pipeline stage `stage`, without adapters. Exact."""
    tp, pp, h = layout.tensor_parallel, layout.pipeline_parallel, shape.hidden_size
    layer = [h] * 4  # two layer norms, on every tensor-parallel rank
    for outputs, inputs, parallel in linear_shapes(shape).values():
        layer += [outputs * inputs // tp, outputs // tp if parallel == "column" else outputs]
    sizes = shape.num_layers // pp * layer
    if stage == 0:
        sizes += [padded_vocab_size // tp * h]
        sizes += [shape.max_position_embeddings * h] if shape.learned_positions else []
    if stage == pp - 1:
        sizes += [h, h]
        # The output layer, or the last stage's own copy of the tied embedding.
        if pp > 1 or shape.untie_embeddings_and_output_weights:
            sizes += [padded_vocab_size // tp * h]
    return sizes


def adapter_sizes_on_rank(shape: ModelShape, layout: Layout) -> list[int]:
    """Elements of each LoRA parameter on one rank.

    A is [rank, inputs], B is [outputs, rank]; they are sharded along the same side as the base.
    """
    rank, tp = layout.lora_rank, layout.tensor_parallel
    layer: list[int] = []
    for target, (outputs, inputs, parallel) in linear_shapes(shape).items():
        if target in layout.lora_targets:
            a, b = (inputs, outputs // tp) if parallel == "column" else (inputs // tp, outputs)
            layer += [rank * a, rank * b]
    return shape.num_layers // layout.pipeline_parallel * layer


def parameters_on_rank(shape: ModelShape, padded_vocab_size: int, layout: Layout, stage: int) -> int:
    """Parameters on one rank of pipeline stage `stage`, without adapters."""
    return sum(sizes_on_rank(shape, padded_vocab_size, layout, stage))


def adapter_parameters_on_rank(shape: ModelShape, layout: Layout) -> int:
    """LoRA parameters on one rank."""
    return sum(adapter_sizes_on_rank(shape, layout))


# ---- bytes ----


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank needs.

    `host`, used by --optimizer-cpu-offload, is in the node's memory, all others are on the GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int  # or what the optimizer's step needs, if that is more
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def fits(self, gpu: Gpu) -> bool:
        """Whether 2 GiB and 5% are left for CUDA's context, NCCL's buffers and fragmentation."""
        return 1.05 * self.total + 2 * GIB <= gpu.memory


def estimate(shape: ModelShape, padded_vocab_size: int, layout: Layout, seq_length: int) -> Memory:
    """Memory of the pipeline stage that needs the most."""
    stages = []
    for stage in range(layout.pipeline_parallel):
        state = state_bytes(shape, padded_vocab_size, layout, stage)
        activations = activation_bytes(shape, padded_vocab_size, layout, seq_length, stage)
        step = step_bytes(shape, padded_vocab_size, layout, stage)
        host = host_bytes(shape, padded_vocab_size, layout, stage)
        stages.append(Memory(*state, max(activations, step), host))
    return max(stages, key=lambda memory: memory.total)


def trained_sizes(shape: ModelShape, padded_vocab_size: int, layout: Layout, stage: int) -> list[int]:
    """Elements of each trained parameter on one rank: the adapters with LoRA, else all."""
    if layout.lora_rank:
        return adapter_sizes_on_rank(shape, layout)
    return sizes_on_rank(shape, padded_vocab_size, layout, stage)


def state_bytes(shape: ModelShape, padded_vocab_size: int, layout: Layout, stage: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state on one rank of a stage.

    Megatron keeps gradients in one buffer (fp32 with --accumulate-allreduce-grads-in-fp32). Adam
    has two fp32 moments, SGD one; 16-bit training adds fp32 master weights; the distributed
    optimizer shards both across data-parallel ranks. --optimizer-cpu-offload moves the moments to
    the host, where it works on copies of the master weights, which stay on the GPU.
    """
    parameters = parameters_on_rank(shape, padded_vocab_size, layout, stage) + adapter_parameters_on_rank(shape, layout)
    trained = sum(trained_sizes(shape, padded_vocab_size, layout, stage))
    weights = parameters * layout.element_bytes
    gradients = trained * (4 if layout.fp32_gradients else layout.element_bytes)
    moments = 0 if layout.optimizer_cpu_offload else 8 if layout.optimizer == "adam" else 4
    masters = 4 if layout.precision != "fp32" else 0
    return weights, gradients, -(-trained * (moments + masters) // layout.optimizer_shards)


def step_bytes(shape: ModelShape, padded_vocab_size: int, layout: Layout, stage: int) -> int:
    """Bytes that the optimizer's step needs, after activations are freed.

    fp32 copies of all 16-bit gradients at once.
    """
    if layout.precision == "fp32" or layout.fp32_gradients:
        return 0
    return 4 * sum(trained_sizes(shape, padded_vocab_size, layout, stage)) // layout.optimizer_shards


def host_bytes(shape: ModelShape, padded_vocab_size: int, layout: Layout, stage: int) -> int:
    """Bytes of host memory that --optimizer-cpu-offload takes for one rank of a stage.

    During training: Adam's two moments, and fp32 copies of master weights and gradients, whose
    sizes torch's pinned allocator rounds up to powers of two, each for this rank's shard. Before
    that, Megatron-Core builds the optimizer once for all weights and drops it again: an fp32 copy
    of them all, in addition to the first copy of the shard. The larger of both.
    """
    if not layout.optimizer_cpu_offload:
        return 0
    sizes = trained_sizes(shape, padded_vocab_size, layout, stage)
    pinned = sum(1 << (4 * size - 1).bit_length() for size in sizes) // layout.optimizer_shards
    training = 2 * pinned + 8 * sum(sizes) // layout.optimizer_shards
    building = 4 * sum(sizes) + pinned
    return max(training, building)


def checkpoint_bytes(shape: ModelShape, padded_vocab_size: int, layout: Layout) -> int:
    """Bytes of a checkpoint on disk, without a few thousand of metadata.

    Weights, fp32 weights and the optimizer's moments; with LoRA only those of the adapters.
    """
    whole = replace(layout, tensor_parallel=1, pipeline_parallel=1)
    state = 4 + (8 if layout.optimizer == "adam" else 4)
    return (layout.element_bytes + state) * sum(trained_sizes(shape, padded_vocab_size, whole, 0))


def activation_bytes(shape: ModelShape, padded_vocab_size: int, layout: Layout, seq_length: int, stage: int = 0) -> int:
    """Bytes of activations on one rank of a stage at the peak, between forward and backward.

    After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
    (2022), without the s x s terms, since attention without a mask does not store them. A stage
    holds the micro-batches that the 1F1B schedule has in flight there.
    """
    tokens = layout.micro_batch * seq_length // layout.context_parallel
    layers = shape.num_layers // layout.pipeline_parallel
    in_flight = min(layout.pipeline_parallel - stage, layout.num_microbatches)
    kept = in_flight * kept_by_layers(shape, layout, tokens, layers)
    if stage == 0 and shape.hidden_dropout and not layout.lora_rank:
        kept += in_flight * tokens * shape.hidden_size // _split(layout)  # the embedding's dropout mask
    working = layout.recompute_num_layers if layout.recompute_method == "uniform" else 1
    working = working * layer_activation_bytes(shape, layout, tokens) if layout.recompute == "full" else 0
    head = 0
    if stage == layout.pipeline_parallel - 1:
        head = kept_by_head(shape, padded_vocab_size, layout, tokens)
    return kept + max(working, head)


def kept_by_layers(shape: ModelShape, layout: Layout, tokens: int, layers: int) -> int:
    """Bytes that `layers` layers keep for backward, for one micro-batch of `tokens` tokens."""
    whole = layer_activation_bytes(shape, layout, tokens)
    if layout.recompute != "full":  # selective: attention without a mask keeps nothing that it drops
        return layers * whole
    unit_input = tokens * shape.hidden_size // _split(layout) * layout.element_bytes
    if layout.recompute_method == "uniform":
        return -(-layers // layout.recompute_num_layers) * unit_input
    # block: that many layers one by one, the rest keep everything
    recomputed = min(layout.recompute_num_layers, layers)
    return recomputed * unit_input + (layers - recomputed) * whole


def kept_by_head(shape: ModelShape, padded_vocab_size: int, layout: Layout, tokens: int) -> int:
    """Bytes that final norm, logits and loss keep.

    The norm's input and the logits, which become their gradient; if the embedding is trained, also
    the norm's output, and with sequence parallelism that output gathered, in a buffer that
    Megatron-Core keeps.
    """
    hidden = tokens * shape.hidden_size * layout.element_bytes
    trained = 0 if layout.lora_rank else hidden // _split(layout) + (hidden if layout.sequence_parallel else 0)
    logits = tokens * padded_vocab_size // layout.tensor_parallel * layout.element_bytes
    return hidden // _split(layout) + trained + logits


def _split(layout: Layout) -> int:
    """Ranks across which sequence parallelism shards norms, dropout and residuals."""
    return layout.tensor_parallel if layout.sequence_parallel else 1


def layer_activation_bytes(shape: ModelShape, layout: Layout, tokens: int) -> int:
    """Bytes that one layer keeps for backward if nothing is recomputed.

    The input of a linear layer is kept for the gradient of its weight: in full training for all
    four, with LoRA for those that have adapters, after their dropout. The input of linear_proj is
    the output of attention, which attention keeps anyway.
    """
    size, tp, h, split = layout.element_bytes, layout.tensor_parallel, shape.hidden_size, _split(layout)
    kv = 2 * shape.kv_channels * max(1, shape.num_query_groups // tp)
    elements = 2 * h // split  # input of both layer norms
    elements += h // tp + kv  # queries, keys and values
    elements += h // tp  # attention's output
    elements += shape.ffn_hidden_size // tp  # before GELU
    bytes_of_masks = 2 * h // split if shape.hidden_dropout else 0
    dropped = layout.lora_rank > 0 and layout.lora_dropout > 0
    for name, (_, inputs, parallel) in linear_shapes(shape).items():
        if layout.lora_rank and name not in layout.lora_targets:
            continue
        inputs //= split if parallel == "column" else tp
        if name != "linear_proj" or dropped:
            elements += inputs
        if dropped:
            bytes_of_masks += inputs
        elements += layout.lora_rank // (1 if parallel == "column" else split)  # between A and B
    # means and scales of the norms, log-sums of attention
    bytes_of_statistics = 4 * (4 // split + shape.num_attention_heads // tp)
    return tokens * (elements * size + bytes_of_masks + bytes_of_statistics)


# ---- operations ----


def attended_length(shape: ModelShape, length: float) -> float:
    """The `attended_length` of `flops_per_token` for documents of `length` tokens.

    With a window of W, (l^2 - (l - W)^2) / l: the tokens that precede the window are not seen.
    """
    beyond = max(0.0, length - shape.window_size) if shape.window_size else 0.0
    return (length**2 - beyond**2) / length if length else 0.0


def flops_per_token(
    shape: ModelShape, attended_length: float = 0.0, *, lora: bool = False, vocab_size: int | None = None
) -> float:
    """Model FLOPs per token of a training step, forward and backward, without recomputation.

    As in the definition of MFU (PaLM, appendix B). `attended_length` is the token-weighted mean
    length of the documents, sum(l^2) / sum(l), less what a window hides; attention is causal, so
    half of it is computed. With `lora`, gradients of the frozen weights are not computed: 4 FLOPs
    per weight instead of 6 (those of the adapters, below 1%, are left out).
    """
    linear = shape.num_layers * sum(outputs * inputs for outputs, inputs, _ in linear_shapes(shape).values())
    linear += (vocab_size or shape.vocab_size) * shape.hidden_size
    attention = shape.num_layers * shape.hidden_size * attended_length  # two products of length l / 2
    return (4 if lora else 6) * linear + 6 * attention
