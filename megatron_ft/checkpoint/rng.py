"""Random states of a rank as plain tensors: Python's, numpy's, torch's, CUDA's, and those of Megatron's tracker."""

import random

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

_TRACKER = "tracker."


def capture() -> dict[str, torch.Tensor]:
    """One-dimensional tensors by name; `restore` takes them back."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([position, has_gauss, *keys.tolist()], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_TRACKER + name] = state if torch.is_tensor(state) else state.get_state()
    return {name: state.clone() for name, state in states.items()}


def restore(states: dict[str, torch.Tensor]) -> None:
    """Set what `capture` returned, on a rank with the same devices."""
    version, *numbers = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(numbers), gauss[0] if gauss else None))
    position, has_gauss, *keys = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    saved = {name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)}
    if saved:
        tracker.set_states(saved)
