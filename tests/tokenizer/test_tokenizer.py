"""Tokenizers: the fast encoder gives the ids of the `tokenizers` library, or is not used, with a
reason."""

import json
import random
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_ft.errors import UserError
from megatron_ft.tokenizer import fast_bpe
from megatron_ft.tokenizer.tokenizer import load_tokenizer

SPECIALS = ["<|endoftext|>", "<fim_prefix>", "<fim_pad>"]
SNIPPETS = [
    "def f(x):\n    return x ** 2  # it's\n", "  \n\t", "don't", "'s", "'", "''ll", " 1", "12  34", "½", "٣", "é", "e\u0301", "我想", "🙂", "\u00a0",
    "\u3000", "\u2028", "\r\n", "\x1c", "\x00", "<|endoftext|>", "<fim_prefix>", "<|endoftext", "\U00011de0", "\U00040041", "{}[];", " ==", "\u0378",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=12)), max_size=12).map("".join)


def train(pre_tokenizer, vocab_size=600, alphabet=None) -> Backend:
    """A small BPE tokenizer trained on this file."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet is None else alphabet,
        show_progress=False,
    )
    with open(__file__, encoding="utf-8") as file:
        backend.train_from_iterator([file.read()], trainer)
    return backend


STARCODERS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
GPT2S = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(ours, reference) for StarCoder's and GPT-2's pre-tokenization, and with few bytes known."""
    directory = tmp_path_factory.mktemp("tokenizers")
    pairs = []
    for name, backend in {
        "starcoder": train(STARCODERS),
        "gpt2": train(GPT2S),
        "without-bytes": train(STARCODERS, alphabet=[]),
    }.items():
        backend.save(str(directory / f"{name}.json"))
        ours = load_tokenizer(directory / f"{name}.json")
        ours.encode("")
        assert ours.notices == []
        pairs.append((ours, backend))
    return pairs


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("a  1")
@example("\n\n 2")
@example("x\u0378y")
def test_fast_bpe_matches_tokenizers_on_random_text(pairs, text):
    for ours, reference in pairs:
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            TEXTS,
            st.builds(
                lambda piece, n: piece * n,
                st.sampled_from(["a", " ", "=", "ab", "\n", "xyz", "0", "é", "def", " \t", "'s", "<fim_pad>"]),
                st.integers(1, 9000),
            ),
            st.builds(
                lambda seed, n: "".join(random.Random(seed).choices("defrtun_", k=n)),
                st.integers(0, 1 << 32),
                st.sampled_from([70, 90, 100, 130, 9000]),
            ),
        ),
        max_size=3,
    ).map("".join)
)
def test_fast_bpe_matches_tokenizers_on_long_pre_tokens(pairs, text):
    for ours, reference in pairs:
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


def chain_tokenizer(length: int) -> tuple[Backend, str]:
    """A tokenizer that merges pairs of the characters in a text from its end on, and the text."""
    alphabet = {byte: character for character, byte in fast_bpe.byte_alphabet().items()}
    characters = ["".join(alphabet[byte] for byte in chr(0x4E00 + i).encode()) for i in range(length)]
    merges = {(a[:split], a[split:]): None for split in (1, 2) for a in (c[: split + 1] for c in characters)}
    merges |= {pair: None for pair in zip(characters[-2::-1], characters[:0:-1], strict=True)}
    tokens = [*alphabet.values(), *map("".join, merges)]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer, backend.decoder = GPT2S, decoders.ByteLevel()
    return backend, "".join(chr(0x4E00 + i) for i in range(length))


@pytest.mark.parametrize("before", [7592, 7593])
def test_an_end_that_changes_all_tokens_before_it_is_seen_in_a_long_pre_token(tmp_path, before):
    """The end is behind the first window of merges.h, whose tokens are all wrong or all right."""
    backend, chain = chain_tokenizer(401)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    for text in ("x" * before + chain, "x" * before + chain[:-1], "x" * before + chain + "y" * 9000 + chain):
        assert ours.encode(text) == backend.encode(text).ids
    assert ours.fast_encoder is not None


def test_starcoder_reference_vectors(shared_data):
    tokenizer = load_tokenizer(shared_data / "starcoder-tokenizer.json")
    rows = [json.loads(line) for line in open(shared_data / "starcoder-tokenizer-vectors.jsonl", encoding="utf-8")]
    assert len(rows) == 47
    for row in rows:
        assert tokenizer.encode(row["text"]) == row["ids"]
    assert tokenizer.notices == []
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad, tokenizer.dtype) == (49152, 0, None, np.uint16)
    assert tokenizer.special_ids["<commit_msg>"] == 16 and len(tokenizer.special_ids) == 19


def test_real_rows_with_the_starcoder_tokenizer(shared_data):
    tokenizer = load_tokenizer(shared_data / "starcoder-tokenizer.json")
    reference = Backend.from_file(str(shared_data / "starcoder-tokenizer.json"))
    texts = [
        t
        for line in open(shared_data / "oasst-commitpackft.jsonl", encoding="utf-8")
        for t in json.loads(line).values()
        if isinstance(t, str)
    ]
    texts = texts[::4] + [
        f"<commit_before>{a}<commit_msg>{b}<commit_after>" for a, b in zip(texts[::9], texts[1::9], strict=False)
    ]
    expected = [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
    assert tokenizer.decode(expected[-1]) == texts[-1]


@pytest.mark.slow
def test_every_code_point_has_the_same_ids(shared_data):
    tokenizer = load_tokenizer(shared_data / "starcoder-tokenizer.json")
    reference = Backend.from_file(str(shared_data / "starcoder-tokenizer.json"))
    points = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 2048):
        text = "".join(f"a{c}a {c} !{c}!  {c}1{c}\n" for c in points[start : start + 2048])
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids, hex(start)
    assert tokenizer.notices == []


@pytest.mark.slow
def test_long_single_pre_tokens_have_the_same_ids(shared_data):
    tokenizer = load_tokenizer(shared_data / "starcoder-tokenizer.json")
    reference = Backend.from_file(str(shared_data / "starcoder-tokenizer.json"))
    letters = random.Random(1).choices("etaoinshrdlu", k=1_500_000)
    for text in ("x" * 1_500_000, " " * 1_500_000 + "y", "".join(letters), "=" * 1_500_000, "\u3000" * 700_000):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


def notice_of(backend: Backend | dict, path) -> str:
    """The notice of the loaded tokenizer, after it has encoded like the reference."""
    spec = backend if isinstance(backend, dict) else json.loads(backend.to_str())
    path.write_text(json.dumps(spec))
    tokenizer = load_tokenizer(path)
    text = "def f(x): return 12  # don't <|endoftext|>"
    assert tokenizer.encode(text) == Backend.from_str(json.dumps(spec)).encode(text, add_special_tokens=False).ids
    return " ".join(tokenizer.notices)


def test_unsupported_tokenizers_fall_back_with_a_reason(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    good = json.loads(train(STARCODERS).to_str())
    normalizing = train(GPT2S)
    normalizing.normalizer = normalizers.NFC()
    assert "normalizer (NFC)" in notice_of(normalizing, path)
    assert "Whitespace" in notice_of(train(pre_tokenizers.Whitespace()), path)
    assert "Digits" in notice_of(train(pre_tokenizers.Sequence([pre_tokenizers.Digits(False), GPT2S])), path)
    without_steps = {**good, "pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}
    assert "has no steps" in notice_of(without_steps, path)
    lower_rank_last = json.loads(json.dumps(good))
    lower_rank_last["model"]["merges"].reverse()
    assert "comes before those that make them" in notice_of(lower_rank_last, path)
    stripping = json.loads(json.dumps(good))
    stripping["added_tokens"][0]["lstrip"] = True
    assert "matching rules" in notice_of(stripping, path)
    monkeypatch.setattr(fast_bpe, "_splits_digits", lambda spec: False)
    assert "its ids differ on" in notice_of(good, path)
    assert "\n" not in notice_of(good, path)


def test_a_difference_on_real_data_falls_back(tmp_path, monkeypatch):
    train(STARCODERS).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(fast_bpe, "HARD_CASES", ["="])
    monkeypatch.setattr(fast_bpe, "class_edges", list)
    monkeypatch.setattr(fast_bpe, "_splits_digits", lambda spec: False)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    tokenizer.encode("=")
    assert tokenizer.notices == []
    tokenizer.check_sample(["=", "return  1"])
    assert "ids differ on 'return" in tokenizer.notices[0] and tokenizer.fast_encoder is None
    reference = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("return  1") == reference.encode("return  1").ids


def test_literal_special_tokens_are_encoded_as_text(pairs):
    path = pairs[0][0].path
    tokenizer = load_tokenizer(path, ["<|endoftext|>"])
    ids = tokenizer.encode("a<|endoftext|>b<fim_pad>")
    assert 0 not in ids and ids[-1] == 2
    assert tokenizer.decode(ids) == "a<|endoftext|>b<fim_pad>"
    assert (tokenizer.eod, tokenizer.vocab_size) == (0, pairs[0][0].vocab_size)
    with pytest.raises(UserError, match="no such special token; it has"):
        load_tokenizer(path, ["<nope>"])


def test_sentencepiece_models_load(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        input=__file__, model_prefix=str(tmp_path / "spm"), vocab_size=400, hard_vocab_limit=False, minloglevel=2
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    tokenizer = load_tokenizer(tmp_path / "spm.model")
    assert tokenizer.encode("def test_this") == reference.encode("def test_this")
    assert tokenizer.decode(tokenizer.encode("def test_this")) == "def test_this"
    assert (tokenizer.kind, tokenizer.eod, tokenizer.vocab_size) == (
        "sentencepiece",
        reference.eos_id(),
        len(reference),
    )
    (tmp_path / "hf").mkdir()
    (tmp_path / "spm.model").rename(tmp_path / "hf/tokenizer.model")
    assert load_tokenizer(tmp_path / "hf").kind == "sentencepiece"
    model = (tmp_path / "hf/tokenizer.model").read_bytes()
    piece = reference.id_to_piece(len(reference) - 50).encode()
    (tmp_path / "hf/tokenizer.model").write_bytes(model.replace(piece, b"\xff" + piece[1:], 1))
    with pytest.raises(UserError, match="tokenizer.model: a piece is not UTF-8; copy the file again"):
        load_tokenizer(tmp_path / "hf")


def test_hugging_face_directories_load(pairs, tmp_path):
    backend = pairs[1][1]
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    fast.mkdir()
    backend.save(str(fast / "tokenizer.json"))
    (fast / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<fim_prefix>"}, "pad_token": "<fim_pad>"})
    )
    tokenizer = load_tokenizer(fast)
    assert (tokenizer.eod, tokenizer.pad) == (0, 2)  # <|endoftext|> is Megatron's end of text wherever it exists
    slow.mkdir()
    backend.model.save(str(slow))
    (slow / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    text = "def f(x):\n    return x  # don't"
    assert load_tokenizer(slow).encode(text) == tokenizer.encode(text) == backend.encode(text).ids
