"""A Hugging Face tokenizer directory as transformers loads it, found out by a child process.

transformers 5 merges tokens from several files, adds those that a class has by default, and
rebuilds the pre-tokenizer of some classes, so only transformers itself knows the result.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError

PROGRAM = Path(__file__).with_name("as_transformers.py")
TIMEOUT = 300  # seconds; two suffice for 50,000 tokens


@dataclass(frozen=True)
class TransformersView:
    """What AutoTokenizer.from_pretrained(directory) gives.

    count: len() of it. last_id: the largest id. named: special tokens by the name of their
    attribute, such as eos_token. added_tokens: as in a tokenizer.json, by id. ids: those of each
    text that was asked about, None for one that it cannot encode. spec: its tokenizer.json, if that
    was asked for.
    """

    version: str
    class_name: str
    count: int
    last_id: int
    pad: int | None
    eos: int | None
    named: dict[str, str]
    added_tokens: list[dict[str, Any]]
    ids: list[list[int] | None]
    spec: dict[str, Any] | None


class CannotLoad(UserError):
    """transformers cannot load the directory; the message gives its reason."""


def transformers_view(directory: Path, texts: Sequence[str] = (), with_spec: bool = False) -> TransformersView:
    """Load a directory with transformers, in about two seconds, and encode `texts` without adding
    special tokens. Raises CannotLoad."""
    request = {"directory": str(directory.absolute()), "texts": list(texts), "spec": with_spec}
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONIOENCODING": "utf-8",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(PROGRAM)],  # -P: this folder's modules stay out of the way
            input=json.dumps(request).encode(),
            capture_output=True,
            env=environment,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise CannotLoad(f"{directory}: transformers has not loaded this tokenizer in {TIMEOUT} seconds") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
        raise CannotLoad(
            f"{directory}: loading this tokenizer with transformers failed with status {done.returncode} ({last[0][:200]})"
        ) from None
    if "error" in answer:
        raise CannotLoad(f"{directory}: transformers cannot load this tokenizer ({answer['error']})")
    return TransformersView(**answer)


def check_count(directory: Path, count: int, view: TransformersView, remedy: str = "") -> None:
    """Raise UserError unless a tokenizer of `count` tokens, ids 0 to count - 1, is as large as what
    transformers loads."""
    if (count, count - 1) == (view.count, view.last_id):
        return
    largest = f", the largest with id {view.last_id:,}" if view.last_id != view.count - 1 else ""
    raise UserError(
        f"{directory}: {count:,} tokens as Megatron-FT reads it, but {view.count:,}{largest} as transformers {view.version} "
        f"loads it ({view.class_name}); {remedy or 'use a directory in which tokenizer.json has all tokens'}"
    )
