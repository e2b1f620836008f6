"""Hugging Face tokenizer directories for tests, and what transformers loads from them."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from megatron_ft.tokenizer import consumer, tokenizer
from megatron_ft.tokenizer.as_transformers import view
from megatron_ft.tokenizer.transformers_view import CannotLoad, TransformersView

SPEC = json.loads((ROOT / "tests/fixtures/tokenizer.json").read_text(encoding="utf-8"))
SIZE = len(SPEC["model"]["vocab"])
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
ADDED = {str(token["id"]): {key: token[key] for key in ("content", *FLAGS)} for token in SPEC["added_tokens"]}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def write_directory(directory: Path, spec: dict = SPEC, **files: object) -> Path:
    """A directory with tokenizer.json and other JSON files, given by their names without suffix."""
    directory.mkdir(exist_ok=True)
    for name, content in {"tokenizer": spec, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture
def asked(monkeypatch) -> list[Path]:
    """Let transformers answer in this process, which is faster; the directories asked about."""
    directories = []

    def answer(directory: Path, texts=(), with_spec=False) -> TransformersView:
        directories.append(directory)
        try:
            return TransformersView(**view(str(directory), list(texts), with_spec))
        except Exception as error:
            raise CannotLoad(f"{directory}: transformers cannot load this tokenizer ({error})") from error

    for module in (tokenizer, consumer):
        monkeypatch.setattr(module, "transformers_view", answer)
    return directories
