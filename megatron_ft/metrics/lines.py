"""The lines of a run's .jsonl files: their keys, and one reader that no damaged line can stop.

A crash, a full disk or an editor may have truncated or changed any line, and lines of an older
version lack keys. A line without what it is about (NEEDED) is skipped; every other key is None
if it is missing or its value cannot be used.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_ft.files.json_file import is_a
from megatron_ft.files.log_lines import read_lines

DETERMINISTIC_KEYS = (
    "iteration", "consumed_samples", "consumed_tokens", "loss", "lr", "grad_norm", "loss_scale", "global_batch_size",
    "loss_tokens", "fill_rate", "skipped_iterations", "spikes",
)  # fmt: skip
TIMING_KEYS = ("step_seconds", "tokens_per_second", "tflops_per_gpu", "mfu", "memory_bytes", "part", "time")
METRICS, VALIDATION, EVENTS = "metrics.jsonl", "validation.jsonl", "events.jsonl"
EVALUATIONS = "evaluations.jsonl"
COUNTS = (
    "iteration", "train_iters", "part", "consumed_samples", "consumed_tokens", "global_batch_size", "skipped_iterations", "spikes",
)  # fmt: skip
TEXTS = ("group", "event")
# Keys that readers use. Numbers other than COUNTS are floats.
KEYS = {
    METRICS: DETERMINISTIC_KEYS + TIMING_KEYS,
    VALIDATION: ("iteration", "group", "loss", "time"),
    EVENTS: ("iteration", "event", "train_iters", "part", "time"),
    EVALUATIONS: ("iteration", "group", "pass_at_1", "low", "high", "time"),
}
NEEDED = {
    METRICS: ("iteration",),
    VALIDATION: ("iteration", "group"),
    EVENTS: ("event",),
    EVALUATIONS: ("iteration", "group", "pass_at_1"),
}
LARGEST_COUNT = 10**18
LARGEST_NUMBER = 1e100  # sums, squares and differences of such numbers are finite
LATEST = 253_402_300_799  # the last second of the year 9999, as far as dates go


def read_log(directory: Path, name: str, last_bytes: int | None = None) -> list[dict]:
    """The usable lines of file `name` in `directory`, in order; [] if it cannot be read.

    With `last_bytes` only the end of the file is read.
    """
    try:
        records = read_lines(directory / name, last_bytes=last_bytes)
    except OSError:
        return []
    return [line for record in records if (line := usable(record, name)) is not None]


def usable(record: Mapping, name: str) -> dict | None:
    """A line of file `name` with all its keys, None for the values that cannot be used; None for a
    line that lacks a needed one.

    >>> usable({"iteration": 3, "group": "all", "loss": "2.5"}, VALIDATION)
    {'iteration': 3, 'group': 'all', 'loss': None, 'time': None}
    >>> usable({"iteration": "3", "group": "all"}, VALIDATION)
    """
    line = {**record, **{key: _value(key, record.get(key)) for key in KEYS[name]}}
    return None if any(line[key] is None for key in NEEDED[name]) else line


def _value(key: str, value: object) -> object:
    if key in TEXTS:
        return value if isinstance(value, str) else None
    if key in COUNTS:
        return value if isinstance(value, int) and is_a(value, int) and 0 <= value <= LARGEST_COUNT else None
    if not isinstance(value, (int, float)) or not is_a(value, float) or abs(value) > LARGEST_NUMBER:
        return None
    return None if key == "time" and not 0 <= value <= LATEST else value
