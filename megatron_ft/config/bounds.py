"""What a number on the command line may be: `Bound`, and the bounds that many flags share."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """Numbers from `low` to `high`, without the ends where `open_low` or `open_high`.

    `note` explains an end in error messages.

    >>> 0 in Bound(0, 1), 1 in Bound(0, 1), float("nan") in Bound(0, 1)
    (True, False, False)
    >>> str(Bound(0, 1))
    'at least 0 and below 1'
    """

    low: float = 0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = True
    note: str = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        # False for NaN
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        words = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high < math.inf:
            words += f" and {'below' if self.open_high else 'at most'} {self.high:.10g}"
        return words + (f" ({self.note})" if self.note else "")


ONE_OR_MORE, NOT_NEGATIVE, POSITIVE = Bound(1), Bound(0), Bound(0, open_low=True)
ZERO_DISABLES = Bound(0, note="0 disables")
FRACTION = Bound(0, 1)
