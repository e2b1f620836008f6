"""A tokenizer.json as a dictionary: read, checked, and made into the `tokenizers` library's object.

The library accepts what it cannot represent: it gives added tokens other ids than the file does
when those leave gaps, and two tokens may share an id. `build` refuses such files, so that ids are
always 0 to N - 1, the file's own, and N is what transformers calls the length.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import kind_of, read_json, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_BYTES = 128 << 20  # four times the largest tokenizer.json of a known model
MAX_ID = (1 << 32) - 1
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
REMEDY = "give the tokenizer.json that comes with the model"

Spec = dict[str, Any]


def read_spec(path: Path) -> Spec:
    """A tokenizer.json, checked where the library reads what the format does not allow, or crashes;
    it checks the rest.

    Raises UserError.
    """
    spec = read_json(path, max_bytes=MAX_BYTES, remedy=REMEDY)
    _check_prefix(path, require(spec, "model", dict, str(path)))
    for part in PARTS:
        if spec.get(part) is not None:
            require(spec, part, dict, str(path))
    tokens = require(spec, "added_tokens", list, str(path), of=dict) if "added_tokens" in spec else []
    for number, token in enumerate(tokens):
        where = f"{path}: added token {number}"
        require(token, "content", str, where, low=1)
        require(token, "id", int, where, low=0, high=MAX_ID)
        for flag in FLAGS:
            require(token, flag, bool, where)
    return {**spec, "added_tokens": tokens}


def _check_prefix(path: Path, model: Spec) -> None:
    """Raise UserError if the second token of a merge lacks the model's continuing_subword_prefix:
    the library cuts as many bytes from it without a look, and may end the process."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not prefix or not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for number, merge in enumerate(merges):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        second = pair[1] if isinstance(pair, list) and len(pair) > 1 else None
        if isinstance(second, str) and not second.startswith(prefix):
            raise UserError(
                f"{path}: merge {number} continues with {_shown(second)}, without the model's "
                f"continuing_subword_prefix {_shown(prefix)}; {REMEDY}"
            )


def build(path: Path, spec: Spec) -> "Backend":
    """The tokenizers.Tokenizer of a tokenizer.json, without truncation and padding.

    `path` is the file that messages name. Raises UserError if the library refuses it.
    """
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(orjson.dumps(spec).decode())
    except BaseException as error:  # bare Exception, or the BaseException of a panic in Rust
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path}: not a tokenizer.json ({first_line(error)}); {REMEDY}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def vocabulary_of(path: Path, spec: Spec, backend: "Backend") -> dict[str, int]:
    """All tokens with their ids; UserError unless these are 0 to N - 1, each for one token, and
    added tokens have those of the file."""
    for token in spec["added_tokens"]:
        if (given := backend.token_to_id(token["content"])) != token["id"]:
            raise UserError(
                f"{path}: {_shown(token['content'])} has id {token['id']}, but the tokenizers library gives it {given}: "
                f"ids of added tokens must follow the vocabulary without gaps or duplicates; {REMEDY}"
            )
    vocab = backend.get_vocab(with_added_tokens=True)
    by_id: dict[int, str] = {}
    for text, i in vocab.items():
        if i in by_id:
            raise UserError(f"{path}: {_shown(by_id[i])} and {_shown(text)} both have id {i}; {REMEDY}")
        by_id[i] = text
    if by_id and max(by_id) >= len(by_id):
        missing = next(i for i in range(len(by_id)) if i not in by_id)
        raise UserError(
            f"{path}: {len(by_id):,} tokens, but the largest id is {max(by_id):,} ({_shown(by_id[max(by_id)])}), "
            f"and none has id {missing:,}: ids must be 0 to {len(by_id) - 1:,}; {REMEDY}"
        )
    return vocab


def without_dropout(spec: Spec) -> Spec:
    """The tokenizer.json without BPE dropout, which merges at random to augment training data."""
    return {**spec, "model": {**spec["model"], "dropout": None}}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def content_of(value: object, where: str, name: str) -> str | None:
    """The text of a special token in a configuration: a string, or an object with `content`; None
    for null. UserError if it is anything else."""
    if isinstance(value, dict):
        return require(value, "content", str, f"{where}: {name}")
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{where}: {name!r} is {kind_of(value)}, expected a token: a string or an object with a content")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
