"""dataset/other/filter_oasst.py: conversations with a phrase are dropped and counted."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program
from hypothesis import given
from hypothesis import strategies as st

from megatron_ft.conversations.fences import fenced_language
from megatron_ft.conversations.phrases import normalized, phrase_of, phrases_in, read_phrases

FILTER = "dataset/other/filter_oasst.py"
PHRASES = ROOT / "dataset/other/oasst_phrases.txt"


def chat(*texts: str) -> list[dict]:
    roles = ("user", "assistant")
    return [
        {"text": text, "from": roles[n % 2], "parent_id": n - 1 if n else None, "message_id": n}
        for n, text in enumerate(texts)
    ]


def filtered(directory: Path, rows: list, *flags) -> tuple[list[bytes], dict]:
    """The lines kept and the report."""
    lines = [json.dumps(row, indent=None, separators=(", ", ":  ")).encode() + b"\n" for row in rows]
    (directory / "in.jsonl").write_bytes(b"".join(lines))
    run_program(FILTER, "--input", directory / "in.jsonl", "--output", directory / "out.jsonl", *flags)
    report = json.loads((directory / "out_report.json").read_text(encoding="utf-8"))
    return (directory / "out.jsonl").read_bytes().splitlines(keepends=True), report


@pytest.mark.parametrize(
    "text, category",
    [
        ("As an AI language model, I enjoy nothing.", "about itself"),
        ("I\u2019m sorry,\nbut I cannot do that.", "refusal"),
        ("Lo siento, pero no puedo.", "refusal"),
        ("I am Open\nAssistant.", "brand"),
        ("Asked by Yannic Kilcher", "brand"),
        ("My knowledge cutoff is near.", "knowledge limit"),
        ("That is both illegal and unethical.", "moralizing"),
    ],
)
def test_phrases_of_each_category_are_found(text, category):
    assert category in {phrase.category for phrase in phrases_in(text, read_phrases(PHRASES))}


@pytest.mark.parametrize(
    "text",
    [
        "The bias of each neuron is added; the bias term reduces the diversity of the ensemble.",
        "EU regulations require vendors to comply, and an inappropriate choice is harmful to performance.",
        "I am an engineer. I cannot open the file; keep in mind that it is a binary.",
        "BERT is a language model. Use it as a chatbot, or as an AI startup would.",
        "It is important to close the file. Please note that ethics and morals are topics of philosophy.",
        "The explain function; laionic; reopen assistants; remains appropriate.",
    ],
)
def test_neutral_text_is_kept(text):
    assert phrases_in(text, read_phrases(PHRASES)) == []


def test_our_phrases_are_normalized_and_none_hides_in_another_category():
    phrases = read_phrases(PHRASES)
    assert len(phrases) > 100 and len({phrase.category for phrase in phrases}) == 6
    assert not [phrase.text for phrase in phrases if phrase.text not in PHRASES.read_text(encoding="utf-8")]
    assert all(len(phrase.core) >= 5 for phrase in phrases)


def test_phrases_end_at_word_boundaries_unless_a_star_says_otherwise():
    exact, prefix = phrase_of("c", "prioritiz"), phrase_of("c", "prioritiz*")
    texts = ["prioritize", "prioritiz", "deprioritize"]
    assert [bool(phrases_in(text, [exact])) for text in texts] == [False, True, False]
    assert [bool(phrases_in(text, [prefix])) for text in texts] == [True, True, False]


@given(
    words=st.lists(st.sampled_from(["i", "i'm", "an", "ai", "a_b", "prio", "c++"]), min_size=1, max_size=3),
    star=st.booleans(),
    text=st.lists(
        st.sampled_from(["I", "I\u2019m", "an", "ai", "ais", "a_b", "prior", "c++", ".", " ", "\n"]), max_size=9
    ).map("".join),
)
def test_phrases_are_found_as_a_plain_search_finds_them(words, star, text):
    core = " ".join(words)
    phrase = phrase_of("c", core + "*" * star)
    found, plain = False, normalized(text)
    for start in range(len(plain)):
        end = start + len(core)
        word_before = start > 0 and core[0] != "+" and (plain[start - 1].isalnum() or plain[start - 1] == "_")
        word_after = core[-1] != "+" and (plain[end : end + 1].isalnum() or plain[end : end + 1] == "_")
        found |= plain.startswith(core, start) and not word_before and (star or not word_after)
    assert bool(phrases_in(text, [phrase])) == found


def test_rows_are_kept_unchanged_and_dropped_by_their_first_category(tmp_path):
    rows = [
        chat("Sort a list", "```python\nsorted(x)\n```"),
        chat("Why?", "As an AI language model, I'm sorry, but I cannot tell."),
        chat("Are you Open Assistant?", "Yes."),
        chat("Add bias", "Done"),
    ]
    lines, report = filtered(tmp_path, rows)
    given = (tmp_path / "in.jsonl").read_bytes().splitlines(keepends=True)
    assert lines == [given[0], given[3]]
    assert (report["rows_in"], report["rows_out"]) == (4, 2)
    assert {name: count for name, count in report["dropped"].items() if count} == {"refusal": 1, "brand": 1}
    assert (
        report["phrases"]["about itself: as an ai language model"] == 1
        and report["phrases"]["brand: open assistant"] == 1
    )
    assert report["languages"] == {"Python": 1, "no code": 1}
    lines, report = filtered(tmp_path, rows, "--turns", "answers")
    assert lines == [given[0], given[2], given[3]] and report["dropped"]["brand"] == 0


def test_own_phrases_replace_ours(tmp_path):
    (tmp_path / "own.txt").write_text("# mine\n[greeting]\nGood  morning\n", encoding="utf-8")
    rows = [chat("Hi", "good morning!"), chat("Hi", "As an AI language model"), {"turns": chat("a", "b")}]
    lines, report = filtered(tmp_path, rows, "--phrases", tmp_path / "own.txt")
    assert (
        len(lines) == 2 and report["phrases"] == {"greeting: good morning": 1} and report["dropped"] == {"greeting": 1}
    )


def test_shards_concatenated_equal_the_single_run_and_their_reports_add_up(tmp_path):
    rows = [chat(f"Question {n}", "Open Assistant" if n % 3 == 0 else "An answer") for n in range(90)]
    lines, report = filtered(tmp_path, rows)
    parts, reports = [], []
    for n in (1, 2, 3):
        part, one = filtered(tmp_path, rows, "--shard", f"{n}/3")
        parts += part
        reports.append(one)
    assert parts == lines and len(lines) == 60
    assert report["rows_in"] == sum(one["rows_in"] for one in reports) == 90
    assert report["dropped"]["brand"] == sum(one["dropped"]["brand"] for one in reports) == 30


def test_parquet_in_and_out(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": chat("Q", "A")}, {"messages": chat("Q", "I am Open Assistant")}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    run_program(FILTER, "--input", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet")
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows[:1]


@pytest.mark.parametrize(
    "text, language",
    [
        ("no code", "no code"),
        ("``` inline ``` and `x`", "code with an unknown tag"),
        ("text\n```\nx\n```", "code without a tag"),
        ("```PY\nx\n```\n```js\n", "Python"),
        ("1. first:\n   ```c++\n", "C++"),
        ("~~~bash\nls\n~~~", "Shell"),
        ('```js title="a.js"\n', "JavaScript"),
        ("```visual basic\n", "Visual Basic"),
        ("```import numpy as np\n", "code with an unknown tag"),
        ("```{.python}\n", "code with an unknown tag"),
        ("```c#\n", "C#"),
        ("```" + "a" * 30 + "\n", "code with an unknown tag"),
    ],
)
def test_language_is_that_of_the_first_fence(text, language):
    assert fenced_language(["before", text]) == language


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no phrases; expected one per line, under [category]"),
        ("hello\n", "own.txt, line 1: a phrase without a category; write one above it"),
        ("[a]\nhello\nHello\n", "own.txt, line 3: 'hello' is listed twice; remove one"),
        ("[a]\n***\n", "own.txt, line 2: '***' has no word"),
        (b"[a]\n\xff\xfe\n", "own.txt: not UTF-8"),
        (None, "own.txt: no such file"),
    ],
)
def test_damaged_phrases_report_one_line_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    (tmp_path / "in.jsonl").write_text(json.dumps(chat("Q", "A")) + "\n", encoding="utf-8")
    flags = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--phrases", tmp_path / "own.txt"]
    assert message in one_error_line(run_program(FILTER, *flags, ok=False))
    assert not (tmp_path / "out.jsonl").exists()


def test_input_without_rows_is_one_line(tmp_path):
    (tmp_path / "in.json").write_text("[]")
    done = run_program(FILTER, "--input", tmp_path / "in.json", "--output", tmp_path / "out.jsonl", ok=False)
    assert "in.json: no conversation; expected" in one_error_line(done) and not (tmp_path / "out.jsonl").exists()


def test_bad_rows_stop_or_are_counted(tmp_path):
    rows = [chat("Q", "A"), [{"text": 3, "from": "user"}]]
    with pytest.raises(AssertionError, match=r"line 2: 'text' is an integer, not a string|not a list of messages"):
        filtered(tmp_path, rows)
    lines, report = filtered(tmp_path, rows, "--skip-bad-rows")
    assert len(lines) == 1 and sum(report["bad_rows"].values()) == 1 and report["rows_in"] == 2
