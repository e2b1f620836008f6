"""Whether transformers, which most users of a model load its tokenizer with, gives the ids that it
was trained with.

transformers 5 replaces the pre-tokenizer and normalizer of a tokenizer.json by those of the class
in tokenizer_config.json: as a GPT2TokenizerFast, StarCoder's tokenizer no longer splits digits off
white space. So texts that tell such parts apart are encoded by both.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import resolve_hub_cache
from megatron_ft.tokenizer.fast_bpe import HARD_CASES
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.tokenizer.transformers_view import CannotLoad, TransformersView, check_count, transformers_view

MOST_TOKENS = 200  # added tokens that are tried out; a tokenizer may have thousands
TEXTS = [
    *HARD_CASES,
    "a  1",
    "x = [\n    1,\n    20,\n]",
    "I'm you're he'll she'd it's we've DON'T can\u2019t",
    " leading",
    "trailing ",
    "\ttab\u00a0no-break\u2003em\u3000ideographic\u200bzero\r\nwidth\x0bv\x0cf",
    "12345678901234567890 1,234.56 ١٢٣ ４５６ ²³",
    "今日は東京へ行きました。汉字漢字 한국어 ไทย हिन्दी العربية עברית",
    "👨‍👩‍👧‍👦👍🏽🏳️‍🌈🇯🇵",
    "Ａｌｐｈａ ﬁ Å A\u030a \ufb01 ½ İı ß ẞ",  # what normalizers change
    "UPPER lower CamelCase snake_case kebab-case",
    "<s> </s> <unk> <pad> [CLS] [SEP] [MASK] <|endoftext|> <|im_start|>",
    "▁meta ▁▁space",
    "## heading\n\n- item\n\n\n```py\nprint('x')\n```\n",
]


@dataclass(frozen=True)
class Comparison:
    """What transformers does otherwise than a tokenizer: one sentence, None if nothing; and its
    view of the directory, None if it cannot load it."""

    difference: str | None
    view: TransformersView | None


def difference_to_transformers(
    directory: str | Path, tokenizer: Tokenizer | None = None, name: str | Path | None = None
) -> str | None:
    """What transformers' AutoTokenizer.from_pretrained(directory) does otherwise than `tokenizer`:
    one sentence, None if nothing.

    `tokenizer` is by default the directory's own, as `load_tokenizer` reads it; `name` is what to
    call the directory. Takes two to three seconds. Raises UserError if the numbers of tokens
    differ, or an id is beyond the number.
    """
    return compare(directory, tokenizer or load_tokenizer(directory), name).difference


def compare(directory: str | Path, tokenizer: Tokenizer, name: str | Path | None = None) -> Comparison:
    """`difference_to_transformers`, with transformers' view of the directory."""
    directory, _ = resolve_hub_cache(Path(directory))
    texts = texts_for(tokenizer)
    try:
        view = transformers_view(directory, texts)
    except CannotLoad as error:
        return Comparison(str(error).replace(str(directory), str(name or directory)), None)
    check_count(Path(name or directory), tokenizer.vocab_size, view)
    loads = f"transformers {view.version} loads {name or directory} as {view.class_name}"
    ends = {tokenizer.eos} if tokenizer.eos is not None else {None, *tokenizer.stop_ids}
    if view.eos not in ends or view.pad != tokenizer.pad:
        found, expected = (
            f"{_or_none(eos)} and {_or_none(pad)}"
            for eos, pad in ((view.eos, view.pad), (tokenizer.eos, tokenizer.pad))
        )
        return Comparison(f"{loads} with end-of-sequence and padding ids {found}, expected {expected}", view)
    different = [
        (text, ours, theirs)
        for text, ours, theirs in zip(texts, (_encode(tokenizer, text) for text in texts), view.ids, strict=True)
        if ours != theirs
    ]
    if not different:
        return Comparison(None, view)
    text, ours, theirs = min(different, key=lambda found: len(found[0]))
    return Comparison(f"{loads}, which gives {_shown(text)} the ids {_start(theirs)}, expected {_start(ours)}", view)


def texts_for(tokenizer: Tokenizer) -> list[str]:
    """The texts to encode: the fixed ones, and the special tokens of a tokenizer spelled out."""
    names = list(tokenizer.special_ids)
    names = names[: MOST_TOKENS // 2] + names[MOST_TOKENS // 2 :][-MOST_TOKENS // 2 :]
    return [*TEXTS, *names, *(f" a {name} b{name}{name}\n" for name in names), "".join(names)]


def check_ids_fit(tokenizer: Tokenizer, rows: int, model: str | Path) -> None:
    """Raise UserError unless every id of a tokenizer is below the number of a model's embedding
    rows."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{tokenizer.path}: the largest id is {tokenizer.vocab_size - 1} "
            f"({tokenizer.token_of(tokenizer.vocab_size - 1)}), but {model} has {rows} embedding rows; "
            "give the tokenizer the model was trained with"
        )


def _encode(tokenizer: Tokenizer, text: str) -> list[int] | None:
    try:
        return tokenizer.encode(text)
    except UserError:  # a character that it does not know
        return None


def _start(ids: list[int] | None) -> str:
    return "none" if ids is None else str(ids[:12])


def _or_none(token_id: int | None) -> str:
    return "none" if token_id is None else str(token_id)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
