"""evaluation/run/generate.py in this process, on three made problems in JavaScript."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from made_problems import row, write_rows

from megatron_ft.evaluation.records import read_generations

GENERATE = "evaluation/run/generate.py"


def write_data(directory: Path) -> Path:
    """The directory with three problems."""
    directory.mkdir(exist_ok=True)
    write_rows(directory, "js", [row("js", number) for number in range(3)])
    return directory


def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The program's `main`, called with its arguments."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("generate_under_test", ROOT / GENERATE)
    assert spec and spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def main(*arguments: str | int | Path) -> None:
        monkeypatch.setattr(sys, "argv", [GENERATE, *map(str, arguments)])
        program.main()

    return main


def texts(output: Path, task: str = "synthesize") -> dict[tuple[str, int], str]:
    """The generated texts by problem and sample."""
    return {key: found.text for key, found in read_generations(output, task, "js").items()}
