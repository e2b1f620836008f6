"""What the log of a run of `--engine transformers` has about its model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ft.config.config import Config
from megatron_ft.model.cost import GIB, Gpu


class CausalModelFacts:
    """A model of transformers, from its modules before they are wrapped; see ModelFacts.

    `sharded`: whether all ranks share weights, gradients and optimizer state.
    """

    def __init__(self, model: Any, where: Path, config: Config, *, sharded: bool) -> None:
        self._config, self._where = config, where
        self._ranks_per_copy = config.parallel.world_size if sharded else 1
        self._kind = model.config.model_type
        text = model.config.get_text_config(decoder=True)
        self._layers, self._hidden = text.num_hidden_layers, text.hidden_size
        parameters = list(model.parameters())
        self._parameters = sum(_elements(weight) for weight in parameters)
        self._bytes = sum(weight.numel() * weight.element_size() for weight in parameters)
        self._trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
        tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table}
        # Looking up a token multiplies nothing; a tied table counts for the output layer.
        lookups = model.get_input_embeddings().weight.numel() if len(tables) > 1 else 0
        self._multiplied = self._parameters - lookups

    def summary(self) -> str:
        """Kind, parameters and layers; with LoRA, how much of it is trained."""
        line = f"{self._kind} ({self._where}): {self._parameters:,} parameters, {self._layers} layers x {self._hidden}"
        if lora := self._config.lora.rank:
            method = "DoRA" if self._config.lora.dora else "LoRA"
            line += f"; {method} rank {lora} trains {self._trained:,} ({self._trained / self._parameters:.2%})"
        return line

    def memory(self, gpu: Gpu | None) -> str:
        """Weights, gradients and optimizer state of one rank."""
        moments = 8 if self._config.optimizer.name == "adam" else 4
        state = (self._bytes + (4 + moments) * self._trained) / self._ranks_per_copy
        unit, size = ("GiB", GIB) if state >= GIB else ("MiB", 2**20)
        return f"about {state / size:.1f} {unit} per rank for weights, gradients and optimizer, and activations"

    def flops_per_token(self, attended_length: float) -> float:
        """As `cost.flops_per_token`: 6 per weight, 4 with frozen ones, and attention."""
        attention = self._layers * self._hidden * attended_length
        return (4 if self._config.lora.rank else 6) * self._multiplied + 6 * attention

    def settings(self) -> dict[str, Any]:
        """Kind and size."""
        return {"model_type": self._kind, "parameters": self._parameters, "trained": self._trained}


def _elements(weight: Tensor) -> int:
    """Elements of a weight; bitsandbytes keeps two of 4 bits in one byte."""
    return weight.numel() * (2 if weight.dtype == torch.uint8 else 1)
