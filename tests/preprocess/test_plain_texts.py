"""Rows of plain text: all tokens are learned; some are rearranged for fill-in-the-middle."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from fixtures.make import HERE
from tokenize_runs import TOKENIZE, token_bytes

from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.tokenizing.text_encoder import FillInTheMiddle

WORDS = ["def", "return", "x ", " 12", "λ", "我想", "\n    ", "🙂", "it's", "==", "👩‍👩‍👧", "e\u0301"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(HERE / "tokenizer.json")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[Path, list[str]]:
    """200 texts, all different, and their file."""
    rng = random.Random(5)
    texts = ["".join(rng.choices(WORDS, k=rng.randint(1, 60))) + str(i) for i in range(200)]
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path, texts


def tokenize(rows: Path, prefix: Path, *flags: str, **kwargs):
    where = (rows, "--tokenizer-file", HERE / "tokenizer.json", "--output-prefix", prefix, "--text-key", "text")
    return run_program(TOKENIZE, *where, *flags, **kwargs)


def documents_of(prefix: Path) -> list[list[int]]:
    documents = TokenizedDocuments(str(prefix))
    assert documents.learned is None and documents.inputs.num_tokens == 0
    return [documents.targets[i].tolist() for i in range(len(documents))]


def test_all_of_a_text_is_learned(rows, tokenizer, tmp_path):
    path, texts = rows
    done = tokenize(path, tmp_path / "data")
    assert documents_of(tmp_path / "data") == [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    assert "special tokens" not in done.stdout and "flags" not in (tmp_path / "data_made_from.json").read_text()


def text_of(document: list[int], tokenizer: Tokenizer) -> tuple[str, str]:
    """The order of a document's parts, "" if it is not rearranged, and the text they are cut from;
    every part is decoded by itself, so that half a character would be U+FFFD."""
    prefix, middle, suffix = (tokenizer.special_ids[f"<fim_{part}>"] for part in ("prefix", "middle", "suffix"))
    *tokens, end = document
    assert end == tokenizer.eod
    if tokens[0] != prefix:
        return "", tokenizer.decode(tokens)
    if tokens[1] == suffix:
        after, rest = tokens[2 : tokens.index(middle)], tokens[tokens.index(middle) + 1 :]
        return "SPM", tokenizer.decode(rest) + tokenizer.decode(after)
    cut, last = tokens.index(suffix), tokens.index(middle)
    parts = (tokens[1:cut], tokens[last + 1 :], tokens[cut + 1 : last])
    return "PSM", "".join(map(tokenizer.decode, parts))


def test_texts_are_rearranged_at_the_given_rates_and_lose_nothing(rows, tokenizer, tmp_path):
    path, texts = rows
    done = tokenize(path, tmp_path / "data", "--fim-rate", "0.8", "--fim-spm-rate", "0.25")
    orders, found = zip(*(text_of(document, tokenizer) for document in documents_of(tmp_path / "data")), strict=True)
    assert list(found) == texts
    counts = Counter(orders)
    assert 25 < counts[""] < 55 and 22 < counts["SPM"] < 58 and 100 < counts["PSM"] < 140
    assert "special tokens" not in done.stdout  # those that are added are not in the data


def test_cuts_depend_on_the_text_and_the_seed_only(rows, tmp_path):
    path, _ = rows
    flags = ("--fim-rate", "0.5")
    tokenize(path, tmp_path / "single", *flags, "--workers", "1")
    for i in (1, 2, 3):
        tokenize(path, tmp_path / f"part-{i}", *flags, "--shard", f"{i}/3", "--workers", "3")
    parts = [tmp_path / f"part-{i}" for i in (1, 2, 3)]
    run_program("preprocess/merge.py", *parts, "--output-prefix", tmp_path / "merged")
    assert token_bytes(tmp_path / "merged") == token_bytes(tmp_path / "single")
    tokenize(path, tmp_path / "other", *flags, "--seed", "7")
    assert token_bytes(tmp_path / "other") != token_bytes(tmp_path / "single")
    (tmp_path / "part-2_made_from.json").write_bytes((tmp_path / "other_made_from.json").read_bytes())
    line = one_error_line(run_program("preprocess/merge.py", *parts, "--output-prefix", tmp_path / "no", ok=False))
    assert "were made with different --seed; tokenize all parts with the same flags" in line


def test_every_cut_is_equally_likely():
    """A text of two characters can be cut at three points, and so in nine pairs of them."""
    counts = Counter()
    for seed in range(9000):
        _, prefix, _, suffix, _, middle = FillInTheMiddle(0, 1, 2, 1.0, 0.0, seed).arrange("🙂é")
        assert f"{prefix}{middle}{suffix}" == "🙂é"
        counts[len(str(prefix)), len(str(middle))] += 1
    once, twice = 1000, 2000  # two different points come in either order
    expected = {(0, 0): once, (1, 0): once, (2, 0): once, (0, 1): twice, (0, 2): twice, (1, 1): twice}
    assert counts.keys() == expected.keys()
    assert all(abs(counts[cut] - number) < 5 * number**0.5 for cut, number in expected.items())


def test_santacoder_spells_its_tokens_otherwise(tokenizer):
    class SantaCoder:
        special_ids = {"<fim-prefix>": 5, "<fim-middle>": 6, "<fim-suffix>": 7, "<fim-pad>": 8}

    assert FillInTheMiddle.of(SantaCoder(), 1.0, 0.0, 1).arrange("")[::2] == [5, 7, 6]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--fim-rate", "1.5"], "--fim-rate 1.5: expected a fraction from 0 to 1"),
        (["--fim-spm-rate", "1"], "--fim-spm-rate has no effect without --fim-rate; add --fim-rate 0.5"),
        (["--input-key", "prompt"], "--input-key is for rows of inputs and outputs; leave it out"),
        (["--fim-rate", "nan"], "--fim-rate nan: expected a fraction from 0 to 1"),
        (["--fim-rate", "0.5", "--literal-special-tokens", "<fim_middle>"], "has no special tokens <fim_prefix> <fim_"),
        (["--train-on", "all"], "--train-on is for conversations; add --messages-key messages, or leave it out"),
        (["--text-key", "code"], "line 1: no key 'code'; the row has 'text'; fix the row, name other keys"),
    ],
)  # fmt: skip
def test_usage_errors_report_one_line(rows, tmp_path, flags, message):
    assert message in one_error_line(tokenize(rows[0], tmp_path / "out", *flags, ok=False))
    assert not list(tmp_path.iterdir())
