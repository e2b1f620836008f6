"""Types of the C++ module built from packing.cpp."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

def greedy(lengths: NDArray[np.int32], order: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]: ...
def best_fit(
    lengths: NDArray[np.int32], capacity: int, lookahead: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def blend(weights: ArrayLike, limits: ArrayLike, size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
