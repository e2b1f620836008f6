"""preprocess/view.py shows exactly the packed sequences of training, as text, page and figures."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_error_line, run_program
from doc_commands import run_page
from token_files import numbered_documents, training_flags, write_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_ft.data.packed_dataset import build_datasets, sequences_per_epoch

VIEW = "preprocess/view.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of texts with markup and a terminal escape.

    Returns (prefix, tokenizer file, texts, tokenizer).
    """
    folder = tmp_path_factory.mktemp("view")
    texts = [(f"question {i} <b>&\x1b[31m\u202e", f"answer {i}é\nline two of {i}<|endoftext|>") for i in range(40)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [side for pair in texts for side in pair],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    documents = [tuple(tokenizer.encode(side).ids for side in pair) for pair in texts]
    return write_documents(folder / "set", documents), folder / "tokenizer.json", texts, tokenizer


class Page(HTMLParser):
    """The attributes and span texts of a page; fails if its tags are not balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.attributes, self.tokens = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta", "p"):
            self.open.append(tag)
        if tag == "span":
            self.texts.append((dict(attributes)["class"], ""))
        self.tokens += tag == "i"

    def handle_endtag(self, tag):
        if tag != "p":
            assert self.open.pop() == tag

    def handle_data(self, text):
        if "span" in self.open:
            kind, before = self.texts[-1]
            self.texts[-1] = (kind, before + text)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The training data of the same flags, a PackedDataset."""
    flags = ("--data-prefix", data[0], "--validation-fraction", "0")
    cache = tmp_path_factory.mktemp("cache")
    config = training_flags(*flags, "--data-cache-path", cache, seq_length=128)
    return build_datasets(config, train_samples=2, pad=1).train


def view_second_sequence(data, *flags) -> str:
    prefix, tokenizer_file, _, _ = data
    shown = ("--tokenizer-file", tokenizer_file, "--seq-length", "128", "--sequences", "1")
    return run_program(VIEW, prefix, *shown, *flags).stdout


@pytest.fixture(scope="module")
def colored(data) -> str:
    """The second packed sequence as printed on a terminal."""
    return view_second_sequence(data, "--color", "always")


def test_terminal_shows_the_documents_and_loss_of_training(data, trained, colored):
    documents = trained.provenance(1)["documents"]
    titles = re.findall(r"^┌ document (\d+) \(number (\d+) of the dataset\), ", colored, re.MULTILINE)
    assert [tuple(map(int, title)) for title in titles] == list(enumerate(documents, 1))
    for document, body in zip(documents, colored.split("┌ document ")[1:], strict=True):
        question, answer = map(escaped, data[2][document])
        context = "".join(re.findall(r"\x1b\[38;5;\d+m(.*?)\x1b\[0m", body))
        loss = re.findall(r"\x1b\[1;97;48;5;\d+m(.*?)\x1b\[0m", body)
        assert context == question and "\n".join(loss) == answer
    learned = int((~trained[1].is_inputs & (trained[1].segment_ids != 0)).sum())
    assert f"{len(documents)} documents, loss on {learned} tokens" in colored


def test_neighboring_documents_differ_in_color(colored):
    bodies = colored.split("┌ document ")[1:]
    colors = [set(re.findall(r"\x1b\[1;97;48;5;(\d+)m", body)) for body in bodies]
    assert len(colors) > 1 and all(len(color) == 1 for color in colors)
    assert all(a != b for a, b in zip(colors, colors[1:], strict=False))


def test_data_cannot_send_escape_sequences_to_the_terminal(data, colored):
    assert "\x1b[31m" in data[2][0][0]
    assert "\x1b[31m" not in colored and "\\x1b[31m" in colored
    assert "\u202e" not in colored and "\\u202e" in colored


def escaped(text: str) -> str:
    return text.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_terminals_that_are_not_utf8_show_escapes(data, env):
    command = [
        sys.executable,
        ROOT / VIEW,
        data[0],
        "--tokenizer-file",
        data[1],
        "--seq-length",
        "128",
        "--sequences",
        "0",
    ]
    for flags in ([], ["--help"]):
        done = subprocess.run([*map(str, command), *flags], capture_output=True, env={**os.environ, **env})
        assert done.returncode == 0 and done.stderr == b""
    shown = subprocess.run(list(map(str, command)), capture_output=True, env={**os.environ, **env}).stdout
    assert b"\\u250c document 1" in shown and "é" not in shown.decode("utf-8", "replace")


def test_page_is_self_contained_and_shows_the_documents_of_training(data, trained, tmp_path):
    _, _, texts, tokenizer = data
    view_second_sequence(data, "--html", tmp_path / "page.html", "--norm-target-loss", "--stats")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|src=|<link|<script", text)
    documents = trained.provenance(1)["documents"]
    pieces = [pair for d in documents for pair in zip(("context", "loss"), map(escaped, texts[d]), strict=True)]
    assert page.texts[2:] == pieces  # after the legend
    sides = [tokenizer.encode(side).ids for d in documents for side in texts[d]]
    ends = [k for ids in sides for k in range(1, len(ids) + 1) if "\ufffd" not in tokenizer.decode(ids[:k], False)]
    assert page.tokens == len(ends), "each token has an end, unless it is in the middle of a character"
    answer_tokens = len(tokenizer.encode(texts[documents[0]][1]).ids)
    assert f"{answer_tokens} tokens, weight {1 / answer_tokens:.3g} each" in html.unescape(text)
    assert "fill rate" in text


def test_plot_is_an_image(data, tmp_path):
    run_program(VIEW, data[0], "--plot", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_but_the_requested_files_is_written(data, tmp_path):
    before = sorted(os.listdir(Path(data[0]).parent))
    view_second_sequence(data, "--html", tmp_path / "page.html", "--stats", "--plot", tmp_path / "lengths.svg")
    assert sorted(os.listdir(tmp_path)) == ["lengths.svg", "page.html"]
    assert sorted(os.listdir(Path(data[0]).parent)) == before


def test_rows_is_another_name_of_sequences(data, colored):
    prefix, tokenizer_file, _, _ = data
    flags = ("--tokenizer-file", tokenizer_file, "--seq-length", "128", "--color", "always")
    assert run_program(VIEW, prefix, *flags, "--rows", "1").stdout == colored


@pytest.fixture(scope="module")
def stats(tmp_path_factory) -> tuple[np.ndarray, str]:
    """Lengths [500, 2] of documents, one of them too long, and what --stats prints for them."""
    lengths = np.random.default_rng(0).integers(1, 60, (500, 2))
    lengths[7] = (400, 30)
    prefix = write_documents(tmp_path_factory.mktemp("stats") / "set", numbered_documents(lengths.tolist()))
    done = run_program(VIEW, prefix, "--stats", "--seq-length", "255", "--global-batch-size", "1", "8")
    return lengths, done.stdout


def test_stats_count_tokens_and_documents_too_long(stats):
    lengths, printed = stats
    total, inputs, outputs = int(lengths.sum()), lengths[:, 0].sum(), lengths[:, 1].sum()
    assert f"500 documents, {total:,} tokens ({inputs:,} in inputs, {outputs:,} in outputs)" in printed
    too_long = f"1 document (0.20%), {430 / total:.2%} of the tokens"
    assert f"longer than a packed sequence of 256 tokens: {too_long}" in printed
    assert "\n--overlong drop: 1 document dropped, 430 tokens lost" in printed


def test_stats_warn_of_many_lost_tokens_and_show_no_sequences(data):
    printed = run_program(VIEW, data[0], "--stats", "--tokenizer-file", data[1], "--seq-length", "17").stdout
    assert re.search(
        r"^warning: --overlong drop: .* lost \(\d+\.\d+%\); raise --seq-length, or cut them", printed, re.MULTILINE
    )
    assert "sequence 0:" not in printed


@pytest.mark.parametrize("order", ["best-fit", "greedy"])
def test_validation_fraction_and_load_show_exactly_the_sequences_of_training(data, tmp_path, order):
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "gpt_bigcode", "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 320}
    (model / "config.json").write_text(json.dumps(config))
    flags = ("--packing", order, "--validation-fraction", "0.3")
    trained = training_flags("--data-prefix", data[0], *flags, "--data-cache-path", tmp_path, seq_length=64)
    epoch = sequences_per_epoch(trained)
    dataset = build_datasets(trained, train_samples=epoch, pad=1).train
    words = ("--tokenizer-file", data[1], "--load", model, "--sequences", "0:999", *flags)
    printed = run_program(VIEW, data[0], *words).stdout
    shown = [re.findall(r"\(number (\d+) of", text) for text in printed.split("── sequence ")[1:]]
    assert [list(map(int, numbers)) for numbers in shown] == [dataset.provenance(i)["documents"] for i in range(epoch)]
    assert "sequence 0: 65 token positions" in printed


def test_stats_show_percentiles_and_a_histogram_of_lengths(stats):
    lengths, printed = stats
    match = re.search(r"^inputs +([\d ,]+)$", printed, re.MULTILINE)
    assert match
    shown = [int(number) for number in match[1].replace(",", "").split()]
    percentiles = np.percentile(lengths[:, 0], (0, 5, 25, 50, 75, 95, 99, 100), method="nearest")
    assert shown == [*percentiles, round(lengths[:, 0].mean())]
    counts = re.findall(r"^ +[\d,]+ to +[\d,]+ +([\d,]+)", printed, re.MULTILINE)
    assert sum(int(count.replace(",", "")) for count in counts) == 500


def test_stats_compare_packing_orders(stats):
    lengths, printed = stats
    kept, sequences = int(lengths.sum()) - 430, {}
    for order in ("best-fit", "greedy"):
        match = re.search(rf"^{order} +([\d,]+) +([\d.]+)% +([\d,]+)$", printed, re.MULTILINE)
        assert match
        count, fill_rate, padding = int(match[1]), float(match[2]), int(match[3].replace(",", ""))
        assert fill_rate == pytest.approx(100 * kept / (count * 256), abs=0.006)
        assert padding == count * 256 - kept
        sequences[order] = count
    assert sequences["best-fit"] < sequences["greedy"]
    steps = [-(-count // 8) for count in sequences.values()]
    assert re.search(rf"^ +8 +{steps[0]} +{steps[1]}$", printed, re.MULTILINE)


@pytest.mark.parametrize("flags, message", [
    ([], "nothing to show: give --tokenizer-file PATH"),
    (["--stats", "--html", "x.html"], "--html shows packed sequences, which need --tokenizer-file"),
    (["--stats", "--range", "0:1", "--validation-fraction", "0.1"], "excludes --range"),
    (["--stats", "--load", "/nowhere"], "/nowhere: no such directory"),
    (["--stats", "--range", "0.9:0.2"], "--range 0.9:0.2: not START:END"),
    (["--stats", "--seq-length", "4"], "all 40 documents are longer than a packed sequence of 5 tokens"),
    (["--plot", "/proc/nowhere/x.png"], "/proc/nowhere/x.png: cannot be written"),
    (["--plot", "x.gif"], "must end in .png, .pdf or .svg"),
    (["--tokenizer-file", "TOKENIZER", "--rows", "900"], "--sequences 900: not found; there are "),
    (["--tokenizer-file", "TOKENIZER", "--sequences", "a"], "--sequences a: give one number like 7"),
    (["--stats", "--seq-length", "0"], "--seq-length 0: must be at least 1"),
    (["--stats", "--seq-length", "9" * 20], "must be at least 1 and at most 10,000,000"),
    (["--stats", "--packing-lookahead", "2147483648"], "must be at least 1 and at most 2,147,483,647"),
    (["--tokenizer-file", "TOKENIZER", "--sequences", "9" * 5000], "give one number like 7"),
    (["--plot", "x.png", "--range", "0.5:0.501"], "--range 0.5:0.501 holds none of its 40 documents"),
    (["--stats", "--range", "0.5:0.501"], "--range 0.5:0.501 holds none of its 40 documents"),
])  # fmt: skip
def test_usage_errors_report_one_line(data, flags, message):
    flags = [str(data[1]) if flag == "TOKENIZER" else flag for flag in flags]
    assert message in one_error_line(run_program(VIEW, data[0], *flags, ok=False))


def test_missing_dataset_reports_one_line(tmp_path):
    line = one_error_line(run_program(VIEW, tmp_path / "absent", "--stats", ok=False))
    assert "absent_inputs_document.idx" in line and "preprocess/tokenize.py" in line


def test_commands_of_the_packing_page_work(data, tmp_path):
    prefix, tokenizer_file, _, _ = data
    (tmp_path / "data").mkdir()
    for path in Path(prefix).parent.glob("set_*document.*"):
        shutil.copy(path, tmp_path / "data" / path.name.replace("set", "commits"))
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    printed = run_page("packing.md", tmp_path)
    assert "── sequence 1: 513 token positions" in printed and "«answer 7é" in printed and "steps, best-fit" in printed
    assert (tmp_path / "rows.html").is_file() and (tmp_path / "lengths.png").is_file()
