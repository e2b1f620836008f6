"""How far a conversion is: a bar on a terminal, a line every half minute in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds


@contextmanager
def bytes_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of bytes just done, of `total`."""
    if sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False) as bar:
            yield bar.update
        return
    began = said = time.monotonic()
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done, said
        done += nbytes
        now = time.monotonic()
        if now - said >= LOG_INTERVAL:
            said = now
            left = (total - done) * (now - began) / max(done, 1)
            print(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
