"""Seeds of training steps."""


def step_seed(seed: int, iteration: int, replica: int) -> int:
    """The seed of one step's dropout on one replica, a function of only --seed and these.

    So dropout needs no saved random state: a resumed run draws the numbers of an uninterrupted one.
    """
    return (seed + 1_000_003 * (iteration + 1) + 10_007 * replica) % 2**31
