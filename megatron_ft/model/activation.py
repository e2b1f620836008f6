"""The two forms of GELU that StarCoder's descendants have, by the names of --activation."""

from dataclasses import replace

from megatron_ft.model.shape import ModelShape

# The value of --activation and `ModelShape.exact_gelu`.
ACTIVATIONS = {"gelu_tanh": False, "gelu": True}


def name_of_activation(shape: ModelShape) -> str:
    """The value of --activation that gives this shape's form."""
    return next(name for name, exact in ACTIVATIONS.items() if exact == shape.exact_gelu)


def override_activation(shape: ModelShape, activation: str | None) -> tuple[ModelShape, str | None]:
    """`shape`, which a checkpoint gave, with the form that --activation gives.

    Also a line for the log where that is another one. `activation` is None without the flag.
    """
    if activation is None or ACTIVATIONS[activation] == shape.exact_gelu:
        return shape, None
    line = f"--activation {activation} overrides {name_of_activation(shape)} of the checkpoint's configuration"
    return replace(shape, exact_gelu=ACTIVATIONS[activation]), line
