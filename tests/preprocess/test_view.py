"""preprocess/view.py: what it shows is what training sees, in colours, as a page, as figures."""

import html
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import one_error_line, run_program
from doc_commands import run_page
from token_files import numbered_documents, training_flags, write_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_ft.data.packed_dataset import build_datasets

VIEW = "preprocess/view.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tokenizer, texts with markup and a terminal escape, and their data set: (prefix, tokenizer file, documents, tokenizer)."""
    folder = tmp_path_factory.mktemp("view")
    texts = [(f"question {i} <b>&\x1b[31m", f"answer {i}é\nline two of {i}<|endoftext|>") for i in range(40)]
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
    """The tags and texts of a page, to see that it is self-contained and balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "p":
            assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "span":
            self.texts.append((dict(self.attributes[-2:])["class"], text))


def test_rows_on_the_terminal_and_as_a_page_are_those_of_training(data, tmp_path):
    prefix, tokenizer_file, texts, tokenizer = data
    args = training_flags(
        "--data-prefix", prefix, "--validation-share", "0", "--data-cache-path", tmp_path / "cache", seq_length=128
    )
    dataset = build_datasets(args, train_samples=2, pad=1).train
    common = (VIEW, prefix, "--tokenizer-file", tokenizer_file, "--seq-length", "128", "--rows", "1")
    shown = run_program(*common, "--color", "always").stdout
    documents = dataset.provenance(1)["documents"]
    heads = re.findall(r"^┌ document (\d+) \(no\. (\d+) of the data set\), ", shown, re.MULTILINE)
    assert [tuple(map(int, head)) for head in heads] == list(enumerate(documents, 1))
    assert "\x1b[31m" not in shown  # what the data hold does not steer the terminal
    bodies = shown.split("┌ document ")[1:]
    colours = []
    for document, body in zip(documents, bodies, strict=True):
        question, answer = (side.replace("\x1b", "\\x1b") for side in texts[document])
        context = "".join(re.findall(r"\x1b\[38;5;\d+m(.*?)\x1b\[0m", body))
        loss = re.findall(r"\x1b\[1;97;48;5;(\d+)m(.*?)\x1b\[0m", body)
        assert context == question and "\n".join(text for _, text in loss) == answer
        (colour,) = {colour for colour, _ in loss}
        colours.append(colour)
    assert len(documents) > 1 and all(a != b for a, b in zip(colours, colours[1:], strict=False))
    learned = int((~dataset[1].is_inputs & (dataset[1].segment_ids != 0)).sum())
    assert f"{len(documents)} documents, loss on {learned} tokens" in shown

    out = tmp_path / "out"
    out.mkdir()
    page_file = out / "rows.html"
    run_program(*common, "--html", page_file, "--norm-target-loss", "--stats", "--plot", out / "lengths.png")
    text = page_file.read_text()
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|src=|<link|<script", text)
    pieces = page.texts[2:]  # after the legend
    expected = [
        (kind, side.replace("\x1b", "\\x1b"))
        for d in documents
        for kind, side in zip(("context", "loss"), texts[d], strict=True)
    ]
    assert pieces == expected
    answer_tokens = len(tokenizer.encode(texts[documents[0]][1]).ids)
    assert f"{answer_tokens} tokens, weight {1 / answer_tokens:.3g} each" in html.unescape(text)
    assert "fill rate" in text
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(out)) == ["lengths.png", "rows.html"]  # nothing temporary
    assert not os.path.exists(f"{prefix}_packing")  # looking writes nothing beside the data


def test_stats_say_what_the_data_are(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 60, (500, 2))
    lengths[7] = (400, 30)
    prefix = write_documents(tmp_path / "set", numbered_documents(lengths.tolist()))
    done = run_program(VIEW, prefix, "--stats", "--seq-length", "255", "--global-batch-size", "1", "8").stdout
    total, kept = int(lengths.sum()), int(lengths.sum()) - 430
    assert (
        f"500 documents, {total:,} tokens ({lengths[:, 0].sum():,} in inputs, {lengths[:, 1].sum():,} in outputs)"
        in done
    )
    assert f"longer than a row of 256 tokens: 1 documents (0.20%), {430 / total:.2%} of the tokens" in done
    percentiles = re.search(r"^inputs +([\d ,]+)$", done, re.MULTILINE)[1].replace(",", "").split()
    assert int(percentiles[0]) == 1 and int(percentiles[3]) == np.percentile(lengths[:, 0], 50, method="nearest")
    assert int(percentiles[7]) == 400 and int(percentiles[8]) == round(lengths[:, 0].mean())
    rows = {}
    for order in ("best-fit", "greedy"):
        found = re.search(rf"^{order} +([\d,]+) +([\d.]+)% +([\d,]+)$", done, re.MULTILINE)
        rows[order] = int(found[1])
        assert float(found[2]) == pytest.approx(100 * kept / (rows[order] * 256), abs=0.006)
        assert int(found[3].replace(",", "")) == rows[order] * 256 - kept
    assert rows["best-fit"] < rows["greedy"]
    assert re.search(rf"^ +8 +{-(-rows['best-fit'] // 8)} +{-(-rows['greedy'] // 8)}$", done, re.MULTILINE)
    counted = [int(n.replace(",", "")) for n in re.findall(r"^ +[\d,]+ to +[\d,]+ +([\d,]+)", done, re.MULTILINE)]
    assert sum(counted) == 500
    assert "1 documents left out, 430 tokens lost" in done


@pytest.mark.parametrize("flags, message", [
    ([], "nothing to show: give --tokenizer-file"),
    (["--stats", "--html", "x.html"], "--html shows rows, which need --tokenizer-file"),
    (["--stats", "--range", "0.9:0.2"], "--range 0.9:0.2: not START:END"),
    (["--stats", "--seq-length", "4"], "all 40 documents are longer than a row of 5 tokens"),
    (["--plot", "/proc/nowhere/x.png"], "/proc/nowhere/x.png: cannot be written"),
    (["--plot", "x.gif"], "must end in .png, .pdf or .svg"),
    (["--tokenizer-file", "TOKENIZER", "--rows", "900"], "--rows 900: no such row; there are "),
    (["--tokenizer-file", "TOKENIZER", "--rows", "a"], "--rows a: give one row like 7"),
    (["--stats", "--seq-length", "0"], "--seq-length 0: must be at least 1"),
])  # fmt: skip
def test_mistakes_end_in_one_line(data, flags, message):
    flags = [str(data[1]) if flag == "TOKENIZER" else flag for flag in flags]
    assert message in one_error_line(run_program(VIEW, data[0], *flags, ok=False))


def test_missing_data_end_in_one_line(tmp_path):
    line = one_error_line(run_program(VIEW, tmp_path / "absent", "--stats", ok=False))
    assert "absent_inputs_document.idx" in line and "preprocess/tokenize.py" in line


def test_the_page_on_packing_shows_commands_that_work(data, tmp_path):
    prefix, tokenizer_file, _, _ = data
    (tmp_path / "data").mkdir()
    for path in Path(prefix).parent.glob("set_*document.*"):
        shutil.copy(path, tmp_path / "data" / path.name.replace("set", "commits"))
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    printed = run_page("packing.md", tmp_path)
    assert "── row 1: 513 places" in printed and "«answer 7é" in printed and "steps, best-fit" in printed
    assert (tmp_path / "rows.html").is_file() and (tmp_path / "lengths.png").is_file()
