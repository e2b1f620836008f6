"""The two forms of GELU that StarCoder's descendants have, by the names of --activation."""

from megatron_ft.model.shape import ModelShape

# The value of --activation and `ModelShape.exact_gelu`.
ACTIVATIONS = {"gelu_tanh": False, "gelu": True}


def activation_flag(exact_gelu: bool | None) -> str:
    """The --activation of a shape's field, which may be absent from a manifest.

    >>> activation_flag(True), activation_flag(None)
    ('gelu', 'gelu_tanh')
    """
    return next(name for name, exact in ACTIVATIONS.items() if exact == bool(exact_gelu))


def overridden_activation(shape: ModelShape, activation: str | None) -> str | None:
    """A line for the log where --activation gives another form than `shape`, a checkpoint's.

    `activation` is None without the flag.
    """
    if activation is None or ACTIVATIONS[activation] == shape.exact_gelu:
        return None
    stored = activation_flag(shape.exact_gelu)
    return f"--activation {activation} overrides the checkpoint's {stored}"
