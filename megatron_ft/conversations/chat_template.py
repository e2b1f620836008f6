"""A tokenizer's chat template: the text of a conversation as its model was trained to read it."""

import hashlib
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import download_hint, resolve_hub_cache
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.files.os_error import remedy
from megatron_ft.prompts import ASSISTANT, Turn

MAX_BYTES = 1 << 20  # of a template's file; the longest known one has 20 KB
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as in transformers
SPECIAL_TOKEN = re.compile(r"\b(?:bos|eos|unk|pad|sep|cls|mask)_token\b")
Message = Mapping[str, Any]
Span = tuple[int, int]


class Rendered(NamedTuple):
    """The text of a conversation, and the characters [start, end) of it that are answers, None if
    the template does not mark them."""

    text: str
    spans: list[Span] | None


class ChatTemplate:
    """The template of a Hugging Face tokenizer directory or of a file, rendered by transformers
    itself.

    tokenizer_file: the directory or, with template_file, also a tokenizer.json.
    digest: of the template's text. dated: whether it writes the current date.

    Nothing is downloaded, no code of the directory runs, and torch is not imported. Raises
    UserError if transformers cannot load the tokenizer, or it has no template.
    """

    def __init__(self, tokenizer_file: Path, template_file: Path | None = None):
        _prepare_transformers()
        directory, _ = resolve_hub_cache(tokenizer_file)
        if not directory.is_dir() and template_file is None:
            raise UserError(
                f"--tokenizer-file {directory}: not a directory; a chat template needs a Hugging Face directory with "
                f"tokenizer_config.json, or a file (tokenize.py --chat-template FILE){download_hint(directory)}"
            )
        self._tokenizer: Any = _load(directory) if directory.is_dir() else None
        self._special_tokens = self._tokenizer.special_tokens_map if self._tokenizer else {}
        self._given = None if template_file is None else _read(template_file)
        self._where = f"--tokenizer-file {directory}" if template_file is None else f"--chat-template {template_file}"
        try:
            source = self.source_for(None)
        except (ValueError, KeyError) as error:
            why = f" ({_first_line(error)[:120]})" if getattr(self._tokenizer, "chat_template", None) else ""
            raise UserError(
                f"--tokenizer-file {directory}: no chat template{why}; give the tokenizer of a chat model, or a "
                "template of your own (tokenize.py --chat-template FILE)"
            ) from None
        if self._tokenizer is None and (named := SPECIAL_TOKEN.search(source)):
            raise UserError(
                f"--chat-template {template_file}: it uses {named[0]}, which {tokenizer_file} does not name; give "
                "--tokenizer-file a Hugging Face directory with tokenizer_config.json"
            )
        self._sources = {source, self.source_for([{}])}
        self.dated = any("strftime_now" in source for source in self._sources)
        self.digest = hashlib.sha256("\0".join(sorted(self._sources)).encode()).hexdigest()[:16]
        self._rendering = threading.Lock()  # some versions of transformers mark answers in the template

    def source_for(self, tools: list[dict] | None) -> str:
        """The template's text; a tokenizer may have one of its own for rows with tools."""
        if self._given is not None:
            return self._given
        return self._tokenizer.get_chat_template(tools=tools)

    def writes(self, token: str) -> bool:
        """Whether a special token is part of the template, spelled out or by its name."""
        names = [name for name, named in self._special_tokens.items() if named == token]
        return any(word in source for word in (token, *names) for source in self._sources)

    def texts(self, history: Sequence[Turn], answer: str) -> tuple[str, str]:
        """Inputs, which end in the template's generation prompt, and outputs, which end as the
        template ends an answer.

        BadRow if the template refuses the conversation, or renders the turns before an answer
        differently once the answer follows, so that there is no text to learn from.
        """
        messages = [{"role": turn.role, "content": turn.text} for turn in history]
        inputs = self.render(messages, add_generation_prompt=True).text
        rendered = self.render([*messages, {"role": ASSISTANT, "content": answer}]).text
        if not rendered.startswith(inputs):
            raise BadRow("the chat template renders these turns differently with and without the answer")
        return inputs, rendered[len(inputs) :]

    def render(
        self, messages: Sequence[Message], tools: list[dict] | None = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """The messages as text, with the spans inside of `{% generation %}`. BadRow if the template
        refuses the conversation; UserError if it is not a Jinja template, whatever the row."""
        from jinja2 import TemplateSyntaxError
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its types do not have the spans
        source = self.source_for(tools)
        marks = bool(MARKS.search(source))
        try:
            with self._rendering:
                texts, spans = render(
                    conversations=[list(messages)],
                    tools=tools,
                    chat_template=source,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
        except TemplateSyntaxError as error:
            raise UserError(
                f"{self._where}: line {error.lineno} of the chat template is not Jinja ({_first_line(error)[:120]}); "
                "fix the template"
            ) from None
        except Exception as error:  # the template is a program, and may fail in any way
            raise BadRow(f"the chat template refuses the conversation ({_first_line(error)[:120]})") from None
        return Rendered(texts[0], spans[0] if marks else None)


def _read(template_file: Path) -> str:
    try:
        with open(template_file, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        what_to_do = remedy(error, "give a file with a Jinja template, such as chat_template.jinja")
        raise UserError(f"--chat-template {template_file}: {error.strerror or error}; {what_to_do}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--chat-template {template_file}: not UTF-8 at byte {error.start}; give a file with a Jinja template"
        ) from None
    if len(content) > MAX_BYTES or not text.strip():
        found = "empty" if not text.strip() else f"more than {MAX_BYTES:,} bytes"
        raise UserError(f"--chat-template {template_file}: {found}, which is not a chat template")
    return text


def _prepare_transformers() -> None:
    """Keep transformers off the network, and from importing torch, which takes most of the time."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # how Python marks a module as not installed


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many types, and that of a panic in Rust
        raise UserError(
            f"--tokenizer-file {directory}: transformers cannot load it ({_first_line(error)[:200]})"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
