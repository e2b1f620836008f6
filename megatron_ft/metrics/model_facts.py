"""What a run's log has about the model that is trained: its size, its memory, its FLOPs."""

from typing import Any, Protocol

from megatron_ft.config.config import Config
from megatron_ft.model import cost
from megatron_ft.model.families import PRESETS, family_of
from megatron_ft.model.shape import ModelShape, padded_vocab_size


class ModelFacts(Protocol):
    """A model as the log sees it; each engine describes its own."""

    def summary(self) -> str:
        """The banner's line: name, parameters, layers."""

    def memory(self, gpu: cost.Gpu | None) -> str:
        """The banner's line on memory per rank; `gpu` is None on a CPU or an unknown device."""

    def flops_per_token(self, attended_length: float) -> float:
        """Model FLOPs per token of a training step, as `cost.flops_per_token` counts them."""

    def settings(self) -> dict[str, Any]:
        """Numbers of the architecture, for sinks."""


# The numbers that make a model one of the presets: not its vocabulary, dropout or activation.
ARCHITECTURE = (
    "family", "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
    "max_position_embeddings",
)  # fmt: skip


def model_name(shape: ModelShape, preset: str | None = None) -> str:
    """The preset that a shape is, `preset` if several are it; of another shape the family's name.

    >>> model_name(PRESETS["santacoder"]), model_name(PRESETS["tiny"].with_vocab(300))
    ('santacoder', 'tiny')
    """
    same = [
        name
        for name, other in PRESETS.items()
        if all(getattr(other, field) == getattr(shape, field) for field in ARCHITECTURE)
    ]
    return preset if preset in same else same[0] if same else family_of(shape).title


class ShapeFacts:
    """A model of the Megatron-Core engine, from its shape and the flags."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        self._config, self._shape, self._layout = config, shape, config.layout()

    def summary(self) -> str:
        """Parameters, layers, heads and vocabulary; with LoRA, how much of it is trained."""
        shape = self._shape
        parameters = shape.num_parameters(self._padded_vocab())
        line = f"{model_name(shape, self._config.model.preset)}: {parameters:,} parameters, {shape.num_layers} layers x {shape.hidden_size}, "
        line += f"{shape.num_attention_heads} heads ({shape.attention}), vocabulary {shape.vocab_size:,}"
        line += f" (padded {self._padded_vocab():,})" if self._padded_vocab() != shape.vocab_size else ""
        if self._layout.lora_rank:
            unsharded = cost.Layout(lora_rank=self._layout.lora_rank, lora_targets=self._layout.lora_targets)
            adapters = cost.adapter_parameters_on_rank(shape, unsharded)
            line += f"; LoRA rank {self._layout.lora_rank} trains {adapters:,} ({adapters / parameters:.2%})"
        return line

    def memory(self, gpu: cost.Gpu | None) -> str:
        """What the planner estimates, and whether it exceeds the GPU."""
        need = cost.estimate(self._shape, self._padded_vocab(), self._layout, self._config.data.seq_length)
        parts = [(need.weights, "weights"), (need.gradients, "gradients"), (need.optimizer, "optimizer")]
        parts += [(need.activations, "activations")]
        unit, size = ("GiB", cost.GIB) if need.total >= cost.GIB else ("MiB", 2**20)
        line = f"about {need.total / size:.1f} {unit} per rank: "
        line += ", ".join(f"{name} {part / size:.1f}" for part, name in parts)
        if gpu and not need.fits(gpu):
            line += f"; exceeds {gpu.name} memory: see launch/plan.py"
        return line

    def flops_per_token(self, attended_length: float) -> float:
        """From the shape; with LoRA, without gradients of frozen weights."""
        return cost.flops_per_token(self._shape, attended_length, lora=bool(self._layout.lora_rank))

    def settings(self) -> dict[str, Any]:
        """The shape's fields."""
        return self._shape.as_dict()

    def _padded_vocab(self) -> int:
        return padded_vocab_size(
            self._shape.vocab_size, self._config.model.make_vocab_size_divisible_by, self._layout.tensor_parallel
        )
