"""evaluations.jsonl of a run: scores of its checkpoints on HumanEvalPack, one line per iteration,
task and language."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ft.files.output import writing
from megatron_ft.metrics.lines import EVALUATIONS, read_log


def append_scores(save_dir: Path, iteration: int, report: Mapping[str, Any]) -> None:
    """Append the pass@1 of each score in an evaluation's report (evaluation/run/report.py).

    Jobs may append at the same time: all lines are one write.
    """
    lines = b""
    for score in report["scores"]:
        if score["score"]:
            found = score["score"]["pass@1"]
            group = f"{score['task']}, {score['language']}"
            line = {"iteration": iteration, "group": group, "pass_at_1": found["estimate"], "time": time.time()}
            lines += json.dumps({**line, "low": found["low"], "high": found["high"]}).encode() + b"\n"
    path = save_dir / EVALUATIONS
    with writing(path), open(path, "ab", buffering=0) as file:
        file.write(lines)


def read_scores(save_dir: Path) -> list[dict[str, Any]]:
    """The usable lines in order of iteration; of a checkpoint evaluated twice, the last ones."""
    found = {(line["group"], line["iteration"]): line for line in read_log(save_dir, EVALUATIONS)}
    return sorted(found.values(), key=lambda line: line["iteration"])
