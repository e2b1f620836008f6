"""What a family of models has of its own: `Family`, which each family's file makes one of.

A new family is one such file and one line in families.py. Everything else (engine, formats,
converters, adapters, planner) works from the `ModelShape` that the family makes of a configuration,
and from its names of tensors.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_ft.files.json_file import kind_of, require
from megatron_ft.model.shape import ModelShape

# Names in transformers of StarCoder's GELU, the tanh approximation, and of the exact one.
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate")
EXACT_GELU = ("gelu", "gelu_python")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, as transformers knows it.

    `model_type`: transformers' name in config.json, and `ModelShape.family`.
    `title`: its name for people, `models`: models of it that people know.
    `architecture`: transformers' class.
    `read_config(config, where)`: the shape that a config.json at `where` describes; UserError for
        what this family cannot express.
    `write_config(shape)`: the fields of config.json, without special token ids.
    `notices(config)`: lines for the log about what a configuration means.
    `check(shape)`: UserError, naming flags, for a shape that this family does not have.
    `prefix`: of the names of all tensors but the output layer's; a model saved without its head
        lacks it.
    `modules`: transformers' modules by `tensor_names.Weight.module`, {} for the layer's number;
        three of them where queries, keys and values are separate.
    `presets`: published models by the names of --preset.
    """

    model_type: str
    title: str
    models: str
    architecture: str
    read_config: Callable[[Mapping[str, Any], str], ModelShape]
    write_config: Callable[[ModelShape], dict[str, Any]]
    notices: Callable[[Mapping[str, Any]], list[str]]
    check: Callable[[ModelShape], None]
    prefix: str
    modules: Mapping[str, tuple[str, ...]]
    presets: Mapping[str, ModelShape]


def activation_of(shape: ModelShape) -> str:
    """transformers' name of the activation."""
    return EXACT_GELU[0] if shape.exact_gelu else TANH_GELU[0]


def given(found: Mapping[str, Any], name: str, kind: type[T], where: str, default: T, *, high: float = math.inf) -> T:
    """The value of `name`, at least 0; the default if there is none, an error if it is null."""
    return require(found, name, kind, where, low=0, high=high) if name in found else default


def shown(value: object) -> str:
    """A configuration's value, for messages."""
    return repr(value) if value is None or isinstance(value, str | bool | int | float) else kind_of(value)
