"""A tokenizer's chat template: the text of a conversation as its model was trained to read it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import download_hint, resolve_hub_cache
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.prompts import ASSISTANT, Turn


class ChatTemplate:
    """The template of a Hugging Face tokenizer directory, rendered by transformers itself.

    Nothing is downloaded, no code of the directory runs, and torch is not imported. Raises
    UserError if transformers cannot load the tokenizer, or it has no template.
    """

    def __init__(self, directory: Path):
        directory, _ = resolve_hub_cache(directory)
        if not directory.is_dir():
            raise UserError(
                f"--tokenizer-file {directory}: not a directory; a chat template needs a Hugging Face directory with "
                f"tokenizer_config.json{download_hint(directory)}"
            )
        self._tokenizer = _load(directory)
        try:
            self._template = self._tokenizer.get_chat_template()
        except (ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                f"--tokenizer-file {directory}: no chat template ({reason[:120]}); give the tokenizer of a chat model, or "
                "another --format"
            ) from None

    def texts(self, history: Sequence[Turn], answer: str) -> tuple[str, str]:
        """Inputs, which end in the template's generation prompt, and outputs, which end as the
        template ends an answer.

        BadRow if the template refuses the conversation, or renders the turns before an answer
        differently once the answer follows, so that there is no text to learn from.
        """
        messages = [{"role": turn.role, "content": turn.text} for turn in history]
        inputs = self._render(messages, add_generation_prompt=True)
        rendered = self._render([*messages, {"role": ASSISTANT, "content": answer}], add_generation_prompt=False)
        if not rendered.startswith(inputs):
            raise BadRow("the chat template renders these turns differently with and without the answer")
        return inputs, rendered[len(inputs) :]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # the template is a program, and may fail in any way
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadRow(f"the chat template refuses the conversation ({reason[:120]})") from None


def _load(directory: Path) -> Any:
    """The tokenizer as transformers loads it without torch, which takes most of the time to
    import."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # how Python marks a module as not installed
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many types, and that of a panic in Rust
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tokenizer-file {directory}: transformers cannot load it ({reason[:200]})") from None
