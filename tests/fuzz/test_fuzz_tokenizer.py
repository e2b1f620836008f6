"""Mutated tokenizers are read right or refused: JSON, Hugging Face directories, SentencePiece.

Each input ends in success or in one `error:` line with status 2: see workers.py, whose `check` also
tells how to repeat one input.
"""

import io
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from forked_transformers import fork_transformers
from minimal import FOREIGN, MINIMAL_JSON
from mutations import ANY, FORGED, json_tree
from one_input import Reader, program
from workers import check

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TEXTS = ("def f(x):\n    return x ** 2  # é 3.14\n", "<|endoftext|>", "<|user|>hi", "")
SPEC = json.loads((FIXTURES / "tokenizer.json").read_bytes())
DIRECTORY_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tokenizer_file(directory: Path) -> None:
    shutil.copy(FIXTURES / "tokenizer.json", directory)


def tokenizer_directory(directory: Path) -> None:
    """A directory as transformers writes it, with every file that names tokens."""
    tokenizer_file(directory)
    token = {
        "content": "<|endoftext|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    config = {
        "tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|endoftext|>", "bos_token": token, "pad_token": None,
        "additional_special_tokens": ["<|endoftext|>"], "added_tokens_decoder": {str(SPEC["model"]["vocab"].get("<|endoftext|>", 0)): token},
        "model_max_length": 1024, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    (directory / "added_tokens.json").write_text(json.dumps({}))


def sentencepiece_model(directory: Path) -> None:
    import sentencepiece

    lines = [json.loads(line)["inputs"] for line in (FIXTURES / "rows.jsonl").read_text().splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, hard_vocab_limit=False, byte_fallback=True,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())


def read_tokenizer(name: str, directory: Path) -> None:
    """What tokenizing, training and conversion ask of a tokenizer."""
    from megatron_ft.tokenizer.files import fingerprint, vocabulary_digest
    from megatron_ft.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory / name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids), "an id that is not in the vocabulary"
        tokenizer.decode(ids)
    assert all(i is None or 0 <= i < tokenizer.vocab_size for i in tokenizer.config_ids.values()), (
        "a special id that is not in it"
    )
    fingerprint(directory / name)
    vocabulary_digest(directory / name)


def tokenize(directory: Path) -> None:
    """tokenize.py with --literal-special-tokens, which edits the tokenizer."""
    (directory / "rows.jsonl").write_text(json.dumps({"inputs": TEXTS[0], "outputs": TEXTS[2]}) + "\n")
    words = (
        "--output-prefix",
        directory.parent / "out/rows",
        "--workers",
        "1",
        "--literal-special-tokens",
        "<|endoftext|>",
    )
    program(
        "preprocess/tokenize.py", directory / "rows.jsonl", "--tokenizer-file", directory / "tokenizer.json", *words
    )


def read_directory(directory: Path) -> None:
    fork_transformers()
    read_tokenizer("", directory)


def write_for_transformers(directory: Path) -> None:
    """The tokenizer files of a converted model."""
    fork_transformers()
    from megatron_ft.tokenizer.export import write_tokenizer
    from megatron_ft.tokenizer.tokenizer import load_tokenizer

    out = directory.parent / "out"
    out.mkdir()
    write_tokenizer(out, directory, load_tokenizer(directory), 1024)


def fixed(name: str, changes: dict[str, dict]) -> list[tuple[str, str, bytes]]:
    return [(name, description, json.dumps({**SPEC, **change}).encode()) for description, change in changes.items()]


MODEL, ADDED = SPEC["model"], SPEC["added_tokens"]
FIXED_SPEC = (
    *(("tokenizer.json", *case) for case in {**MINIMAL_JSON, **FOREIGN}.items()),
    *fixed("tokenizer.json", {
        "added_tokens: null": {"added_tokens": None},
        "added_tokens: an object": {"added_tokens": {}},
        "added_tokens: empty": {"added_tokens": []},
        "an added token without content": {"added_tokens": [{"id": 0}]},
        "an added token with an empty text": {"added_tokens": [*ADDED, {**ADDED[0], "content": "", "id": 399}]},
        "an added token with an escape sequence": {"added_tokens": [*ADDED, {**ADDED[0], "content": FORGED, "id": 399}]},
        "an added token of id 2^31": {"added_tokens": [*ADDED, {**ADDED[0], "content": "<x>", "id": 2**31}]},
        "an added token of id -1": {"added_tokens": [*ADDED, {**ADDED[0], "content": "<x>", "id": -1}]},
        "an empty vocabulary": {"model": {**MODEL, "vocab": {}, "merges": []}},
        "one token of id 2^31": {"model": {**MODEL, "vocab": {"!": 2**31}}},
        "one token of id 2^32 - 1": {"model": {**MODEL, "vocab": {"!": 2**32 - 1}, "merges": []}},
        "one token of id 2^40": {"model": {**MODEL, "vocab": {"!": 2**40}, "merges": []}},
        "one token of id 10^8": {"model": {**MODEL, "vocab": {**MODEL["vocab"], "zz": 10**8}}},
        "equal ids": {"model": {**MODEL, "vocab": dict.fromkeys(MODEL["vocab"], 5)}},
        "merges of unknown tokens": {"model": {**MODEL, "merges": [["qqq", "zzz"]]}},
        "merges of three": {"model": {**MODEL, "merges": [["a", "b", "c"]]}},
        "merges: texts without a space": {"model": {**MODEL, "merges": ["ab"]}},
        "dropout": {"model": {**MODEL, "dropout": 0.5}},
        "dropout 2": {"model": {**MODEL, "dropout": 2.0}},
        "model: null": {"model": None},
        "model: an unknown type": {"model": {**MODEL, "type": FORGED}},
        "model: WordPiece": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
        "pre_tokenizer: no steps": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        "pre_tokenizer: a list": {"pre_tokenizer": []},
        "normalizer: a list": {"normalizer": []},
        "a regex that backtracks": {
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        },
        "an invalid regex": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
        "padding to 2^62": {"padding": {"strategy": {"Fixed": 2**62}, "direction": "Right", "pad_to_multiple_of": None,
                                        "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
        "version: 2.0": {"version": "2.0"},
    }),
)  # fmt: skip
FIXED_CONFIG = (
    *((name, *case) for name in DIRECTORY_FILES[:2] for case in {**MINIMAL_JSON, **FOREIGN}.items()),
    *(
        ("tokenizer_config.json", f"{change!r:.60}", json.dumps(change).encode())
        for change in (
            {"eos_token": ["<|endoftext|>"]}, {"eos_token": {"content": {}}}, {"eos_token": {"content": ["a"]}}, {"eos_token": 5},
            {"pad_token": []}, {"pad_token": {}}, {"pad_token": FORGED}, {"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": {}}},
            {"added_tokens_decoder": {"-1": {"content": "<x>"}}}, {"added_tokens_decoder": {str(2**40): {"content": "<x>"}}},
            {"added_tokens_decoder": {"9" * 5000: {"content": "<x>"}}}, {"additional_special_tokens": "text"},
            {"additional_special_tokens": [None, 5, {}]}, {"tokenizer_class": ["a"]}, {"chat_template": {}}, {"eos_token": "<new>"},
        )
    ),
)  # fmt: skip
CONFIGS = tuple((name, (json_tree,)) for name in DIRECTORY_FILES)

READERS = [
    Reader(
        "tokenizer.json",
        tokenizer_file,
        partial(read_tokenizer, "tokenizer.json"),
        (("tokenizer.json", (json_tree,)),),
        FIXED_SPEC,
        count=400,
    ),
    Reader(
        "tokenizer.json, literal tokens",
        tokenizer_file,
        tokenize,
        (("tokenizer.json", (json_tree,)),),
        FIXED_SPEC,
        count=150,
    ),
    Reader("tokenizer_config.json", tokenizer_directory, read_directory, CONFIGS, FIXED_CONFIG, count=300),
    Reader("tokenizer to be written", tokenizer_directory, write_for_transformers, CONFIGS, FIXED_CONFIG, count=150),
    Reader(
        "sentencepiece",
        sentencepiece_model,
        partial(read_tokenizer, "tokenizer.model"),
        (("tokenizer.model", ANY),),
        count=150,
    ),
]


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_a_mutated_tokenizer_is_read_right_or_refused(reader: Reader, tmp_path: Path):
    check(reader, tmp_path)
