"""Rows of several lengths and scripts, a tokenizer for them, and runs of preprocess/tokenize.py."""

import json
import random
import subprocess
from pathlib import Path

from conftest import run_program

from megatron_ft.data.indexed import field_paths

TOKENIZE = "preprocess/tokenize.py"


def write_rows_and_tokenizer(directory: Path) -> Path:
    """Write 400 rows to `rows.jsonl` and a tokenizer trained on them to `t.json`."""
    rng = random.Random(5)
    words = ["def", "return", "x", "12", "λ", "我想", "\n    ", "🙂", "it's", "==", "<|endoftext|>", "value"]
    with open(directory / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(400):
            inputs, outputs = (" ".join(rng.choices(words, k=rng.randint(1, 80))) for _ in range(2))
            file.write(json.dumps({"id": 1, "inputs": inputs, "outputs": outputs}, ensure_ascii=False) + "\n")
    files = ("--input", directory / "rows.jsonl", "--output", directory / "t.json")
    run_program("preprocess/train_tokenizer.py", *files, "--vocab-size", 400)
    return directory


def tokenize(
    data: Path, prefix: Path, *flags: str | Path, rows: Path | None = None, **kwargs
) -> subprocess.CompletedProcess:
    """Run tokenize.py on the rows of `data`, or on `rows`."""
    given = (rows or data / "rows.jsonl", "--tokenizer-file", data / "t.json", "--output-prefix", prefix)
    return run_program(TOKENIZE, *given, *flags, **kwargs)


def token_bytes(prefix: Path) -> list[bytes]:
    """Contents of the four files of a tokenized dataset."""
    return [Path(field + suffix).read_bytes() for field in field_paths(prefix) for suffix in (".bin", ".idx")]
