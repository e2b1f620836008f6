"""Mutated rows, token files, provenance, split files and packing indices are read right or refused.

Each input ends in success or in one `error:` line with status 2: see workers.py, whose `check` also
tells how to repeat one input.
"""

import gzip
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import zstandard
from minimal import FOREIGN, MINIMAL_JSON
from mutations import ANY, json_lines, json_tree, mmididx, mmididx_moved, text
from one_input import Reader, program
from workers import check

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TOKENIZER = FIXTURES / "tokenizer.json"
FIELDS = ("data_inputs_document", "data_targets_document")
ROWS = "rows.jsonl"
BOMB = b'{"inputs": "' + b" " * (96 << 20) + b'", "outputs": "b"}\n'


def token_files(directory: Path) -> None:
    for file in FIXTURES.glob("data_*"):
        shutil.copy(file, directory)


def rows(directory: Path, name: str = ROWS) -> None:
    """Rows, compressed as their name requires."""
    content = (FIXTURES / ROWS).read_bytes()
    if name.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    elif name.endswith(".zst"):
        content = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    (directory / name).write_bytes(content)


def read_documents(directory: Path) -> list[tuple[list[int], list[int]]]:
    """All documents, after view.py has packed and shown them."""
    from megatron_ft.data.packing import TokenizedDocuments

    prefix = directory / "data"
    program(
        "preprocess/view.py",
        prefix,
        "--stats",
        "--seq-length",
        "64",
        "--tokenizer-file",
        TOKENIZER,
        "--sequences",
        "0:2",
    )
    documents = TokenizedDocuments(str(prefix))
    return [(documents.inputs[i].tolist(), documents.targets[i].tolist()) for i in range(len(documents))]


def two_parts(directory: Path) -> None:
    """Two shards of rows.jsonl."""
    rows(directory)
    for shard in (1, 2):
        words = ("--workers", "1", "--shard", f"{shard}/2", "--output-prefix", directory / f"part-{shard}")
        program("preprocess/tokenize.py", directory / ROWS, "--tokenizer-file", TOKENIZER, *words)


def read_merged(directory: Path) -> list[bytes]:
    """The files that merge.py writes from two parts."""
    out = directory.parent / "out"
    program("preprocess/merge.py", directory / "part-1", directory / "part-2", "--output-prefix", out / "all")
    return [path.read_bytes() for path in sorted(out.glob("*_document.*"))]


def read_rows(name: str, directory: Path, *flags: str) -> list[bytes]:
    """The token files that tokenize.py writes."""
    out = directory.parent / "out"
    words = ("--tokenizer-file", TOKENIZER, "--output-prefix", out / "rows", "--workers", "1", *flags)
    program("preprocess/tokenize.py", directory / name, *words)
    return [path.read_bytes() for path in sorted(out.glob("*_document.*"))]


def skip_bad_rows(name: str, directory: Path) -> list[bytes]:
    return read_rows(name, directory, "--skip-bad-rows")


def commits(directory: Path) -> None:
    content = (FIXTURES.parents[1] / "examples/commits.jsonl").read_bytes()
    (directory / "commits.jsonl").write_bytes(b"".join(content.splitlines(keepends=True)[:20]))


def read_commits(directory: Path) -> None:
    program(
        "dataset/commits_to_jsonl.py",
        "--input",
        directory / "commits.jsonl",
        "--output",
        directory.parent / "out.jsonl",
    )


def deduplicate(directory: Path) -> None:
    program("dataset/dedup_shuffle.py", directory / ROWS, "--output", directory.parent / "out.jsonl")


def train_tokenizer(directory: Path) -> None:
    words = ("--vocab-size", "300", "--output", directory.parent / "tokenizer.json")
    program("preprocess/train_tokenizer.py", "--input", directory / ROWS, *words)


def split_files(directory: Path) -> None:
    """Two blended datasets. The file names them without a folder, since its content is mutated."""
    token_files(directory)
    for file in FIXTURES.glob("data_*"):
        shutil.copy(file, directory / file.name.replace("data", "more", 1))
    (directory / "split.txt").write_text("# training\ntrain: 0.7 0:0.8 data, 0.3 0:0.5 more\n")


def read_split_file(directory: Path) -> None:
    import os

    from megatron_ft.data.splits import read_split_file

    os.chdir(directory)
    read_split_file("split.txt")
    build_training_data("--train-weighted-split-paths-path", "split.txt", cache=directory.parent / "cache")


def packing_index(directory: Path) -> None:
    token_files(directory)
    build_training_data("--data-prefix", str(directory / "data"), cache=directory / "cache")
    built = next((directory / "cache/data_packing").glob("*epochs*/index.json")).parent
    for file in built.iterdir():
        shutil.copy(file, directory)
    (directory / "name.txt").write_text(str(built.relative_to(directory)))


def read_packing_index(directory: Path) -> list[list[int]]:
    """The documents of each packed sequence, from an index whose files are mutated."""
    built = directory / (directory / "name.txt").read_text()
    for name in ("documents.npy", "rows.npy", "index.json"):
        shutil.copy(directory / name, built)
    return build_training_data("--data-prefix", str(directory / "data"), cache=directory / "cache")


def build_training_data(*flags: str, cache: Path) -> list[list[int]]:
    """Tokens of the first sequences that training would read, at most 20."""
    from megatron_ft.config.arguments import parse_args
    from megatron_ft.data.packed_dataset import build_datasets

    common = ["--preset", "tiny", "--tokenizer-file", str(TOKENIZER), "--train-iters", "1", "--seq-length", "64"]
    config = parse_args([*common, "--overlong", "truncate", "--data-cache-path", str(cache), *flags], 1)
    data = build_datasets(config, train_samples=20, pad=0, vocab_size=400)
    assert data.train is not None
    return [data.train[i].tokens.tolist() for i in range(min(20, len(data.train)))]


def zstd_of(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(content)


ONE_ROW = b'{"inputs": "1 + 1", "outputs": "2"}\n'
FIXED_ROWS = (
    *((ROWS, name, content) for name, content in {**MINIMAL_JSON, **FOREIGN}.items()),
    (ROWS, "a huge number in another key", b'{"inputs": "a", "outputs": "b", "n": ' + b"9" * 5000 + b"}\n"),
    (
        ROWS,
        "a deep value in another key",
        b'{"inputs": "a", "outputs": "b", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    ),
    (ROWS, "a byte order mark in the middle", ONE_ROW + b"\xef\xbb\xbf" + ONE_ROW),
    (ROWS, "two objects on a line", ONE_ROW.strip() + ONE_ROW),
    (ROWS, "CR line ends", ONE_ROW.replace(b"\n", b"\r") * 3),
    (ROWS, "NUL bytes at the end", ONE_ROW + b"\0" * 4096),
    (ROWS, "a lone surrogate", b'{"inputs": "\\ud83d", "outputs": "b"}\n'),
    (ROWS, "an escape sequence as key", b'{"\\u001b[2J\\nerror: forged": "a"}\n'),
    (ROWS, "a key of a megabyte", b'{"' + b"k" * (1 << 20) + b'": "a"}\n'),
    (ROWS, "numbers as texts", b'{"inputs": 1, "outputs": 2.5}\n'),
)
FIXED_ZSTD = (
    ("rows.jsonl.zst", "a line of 96 MiB", zstd_of(ONE_ROW + BOMB)),
    ("rows.jsonl.zst", "a frame of 1 GiB", zstd_of(bytes(1 << 20)) * 1024),
    ("rows.jsonl.zst", "skippable frames", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" * 1000),
    ("rows.jsonl.zst", "a window of 2 GiB", b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00"),
)
MADE_FROM = json.loads((FIXTURES / "data_made_from.json").read_bytes())
FIXED_MADE_FROM = tuple(
    ("data_made_from.json", name, json.dumps({**MADE_FROM, **change}).encode())
    for name, change in {
        "shard 1 of 2^40": {"shard": [1, 2**40]},
        "shard 2 of 1": {"shard": [2, 1]},
        "shard -1 of -1": {"shard": [-1, -1]},
        "shard of floats": {"shard": [1.0, 1.0]},
        "shard of texts": {"shard": ["1", "1"]},
        "inputs: sizes are texts": {"inputs": [["rows.jsonl", "1"]]},
        "inputs: lists as names": {"inputs": [[["a"], 1]]},
        "inputs: a text": {"inputs": "ab"},
        "sha256: a number": {"sha256": 5},
        "sha256: a list": {"sha256": [1]},
        "tokenizer: an object": {"tokenizer": {}, "sha256": "00"},
        "tokenizer: an escape sequence": {"tokenizer": "\x1b]0;owned\x07\nerror: forged", "sha256": "00" * 32},
        "literal_special_tokens: numbers": {"literal_special_tokens": [1, None]},
        "version: a list": {"version": [1]},
        "version: true": {"version": True},
    }.items()
)
FIXED_SPLITS = tuple(
    ("split.txt", content.decode("latin-1")[:40], content)
    for content in (
        b"", b"\n", b":", b"train:", b'"', b"train: 1 0:1 /etc/hostname", b"train: 1e308 0:1 data, 1e308 0:1 more",
        b"train: 1e-320 0:1 data", b"train: 1 0:1e-320 data", b"train: 1 0:1 data\0x", b"train: 1 0:1 \x1b[2J\x07", b"\xff\xfe",
        b"train: 1 0:1 data, " * 2000, b"train: 1 0:1 ", b"a: 1 0:1 data\nb: 1 0:1 data", b"train: 1 0:1 ..", b"train: 1_0 0:1 data",
        b"t\x1brain: 1 0:1 data\r\n", b"train: 1 0.5:0.50001 data", b"train: 1 0:1 data" + b"x" * 5000,
    )
)  # fmt: skip
INDEX = tuple((f"{name}.idx", (mmididx, mmididx, mmididx_moved)) for name in FIELDS)
PART_INDEX = tuple((f"part-2_{name[5:]}.idx", (mmididx, mmididx, mmididx_moved)) for name in FIELDS)
READERS = [
    Reader("idx", token_files, read_documents, INDEX, exact=True, count=400),
    Reader("bin", token_files, read_documents, tuple((f"{name}.bin", ()) for name in FIELDS)),
    Reader("idx of a part", two_parts, read_merged, PART_INDEX, exact=True),
    Reader(
        "made_from of a part", two_parts, read_merged, (("part-1_made_from.json", (json_tree,)),),
        fixed=tuple(("part-1_made_from.json", *case[1:]) for case in FIXED_MADE_FROM), count=150,
    ),
    Reader(
        "made_from", token_files, read_documents, (("data_made_from.json", (json_tree,)),), exact=True, count=150,
        fixed=(*FIXED_MADE_FROM, *(("data_made_from.json", *case) for case in MINIMAL_JSON.items())),
    ),
    Reader("rows", rows, partial(read_rows, ROWS), ((ROWS, (json_lines,)),), fixed=FIXED_ROWS, count=300),
    Reader("rows, bad ones skipped", rows, partial(skip_bad_rows, ROWS), ((ROWS, (json_lines,)),), fixed=FIXED_ROWS, count=300),
    Reader(
        "rows.gz", partial(rows, name="rows.jsonl.gz"), partial(read_rows, "rows.jsonl.gz"), (("rows.jsonl.gz", ANY),), exact=True,
        fixed=(("rows.jsonl.gz", "a line of 96 MiB", gzip.compress(ONE_ROW + BOMB, mtime=0)),),
    ),
    Reader(
        "rows.zst", partial(rows, name="rows.jsonl.zst"), partial(skip_bad_rows, "rows.jsonl.zst"), (("rows.jsonl.zst", ANY),),
        exact=True, fixed=FIXED_ZSTD,
    ),
    Reader("commits", commits, read_commits, (("commits.jsonl", (json_lines,)),), count=150),
    Reader("rows to deduplicate", rows, deduplicate, ((ROWS, (json_lines,)),), count=150),
    Reader("rows to train a tokenizer", rows, train_tokenizer, ((ROWS, (json_lines,)),), count=100),
    Reader("split file", split_files, read_split_file, (("split.txt", (text,)),), fixed=FIXED_SPLITS),
    Reader(
        "packing index", packing_index, read_packing_index,
        (("documents.npy", ()), ("rows.npy", ()), ("index.json", (json_tree,))), count=150,
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_mutated_data_is_read_right_or_refused(reader: Reader, tmp_path: Path):
    check(reader, tmp_path)
