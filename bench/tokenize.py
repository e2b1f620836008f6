"""Time preprocess/tokenize.py against the alternatives, on 50 MB of Python's standard library.

    python bench/tokenize.py --tokenizer-file tokenizer.json
    python bench/tokenize.py --tokenizer-file tokenizer.json --peer ~/Megatron-LM --before ~/old

Each is timed in turn, --repeats times, and the best is kept: wall-clock time, and CPU time of all
cores, which depends less on other jobs on the machine. Timed are

    ours                    the complete process, both fields in one run; also with one worker,
                            and with one worker on one core
    --before DIR            that checkout of this project with one worker, with the same files
    --peer DIR              that checkout's tools/preprocess_data.py, which needs one run per field;
                            its files must be identical to ours
    tokenizers              `Tokenizer.encode_batch` on the same texts with as many threads
    in one thread           encoding the texts, nothing else: ours, `tokenizers` on a tenth of them,
                            and tokie (https://pypi.org/project/tokie) if it is installed

Texts to which ours, or tokie, gives other ids than `tokenizers` are counted.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's tokenize.py would hide Python's

import argparse
import filecmp
import importlib
import itertools
import json
import os
import resource
import subprocess
import sysconfig
import tempfile
import time
from collections import Counter
from types import ModuleType

from tokenizers import Tokenizer

from megatron_ft.config.parser import Help, Parser
from megatron_ft.data.indexed import field_paths
from megatron_ft.errors import UserError, run_program
from megatron_ft.tokenizer.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
BATCH = 1000  # texts of one encode_batch call

# The peer imports packages that tokenizing never uses and that are seldom installed, so it gets
# empty ones. It also uses numpy.float, which numpy has removed.
PEER_STAND_INS = """
import importlib.abc, importlib.machinery, importlib.util, sys, types
import numpy

class Empty(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name) if name[0].islower() else type(name, (), {})

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("apex", "amp_C", "datasets", "nltk", "six"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Empty(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.append(Finder())
numpy.float = float
"""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--tokenizer-file", type=Path, required=True, help="tokenizer.json to encode with")
    add("--peer", type=Path, metavar="DIR", help="checkout of BigCode's Megatron-LM, branch mtf, to compare with")
    add(
        "--before",
        type=Path,
        metavar="DIR",
        help="another checkout of this project, installed in place, to compare with",
    )
    add("--rows", type=Path, metavar="FILE", help="JSONL to tokenize (default: made of the standard library)")
    add("--megabytes", type=int, default=50, help="size of the JSONL file")
    add("--workers", type=int, default=2, help="our threads, threads of encode_batch, processes of the peer")
    add("--repeats", type=int, default=3, help="rounds; the best time of each is kept")
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    if args.peer and not (args.peer / "tools/preprocess_data.py").is_file():
        raise UserError(f"--peer {args.peer}: tools/preprocess_data.py not found; give a Megatron-LM checkout")
    with tempfile.TemporaryDirectory() as directory:
        bench(args, Path(directory))


def bench(args: argparse.Namespace, directory: Path) -> None:
    rows = args.rows or directory / "rows.jsonl"
    if not args.rows:
        make_rows(rows, args.megabytes * 1_000_000)
    size = rows.stat().st_size
    with open(rows, "rb") as file:
        texts = [row[key] for row in map(json.loads, file) for key in ("inputs", "outputs", "targets") if key in row]
    print(f"{size / 1e6:.1f} MB of JSONL, {len(texts):,} texts, {args.workers} workers; load {os.getloadavg()[0]:.1f}")
    complete(args, directory, rows, texts, size)
    encoding_only(args, texts)


def complete(args: argparse.Namespace, directory: Path, rows: Path, texts: list[str], size: int) -> None:
    """Time complete programs, and check that their files are the same."""
    seconds: dict[str, list[tuple[float, float]]] = {}

    def same_as_ours(name: str) -> None:
        for ours, theirs in zip(field_paths(directory / "ours"), field_paths(directory / name), strict=True):
            for suffix in (".bin", ".idx"):
                if not filecmp.cmp(ours + suffix, theirs + suffix, shallow=False):
                    raise UserError(f"{name}: its {Path(theirs).name}{suffix} differs from ours")

    for _ in range(args.repeats):
        seconds.setdefault("ours", []).append(run_ours(args, ROOT, args.workers, rows, directory / "ours"))
        seconds.setdefault("one", []).append(run_ours(args, ROOT, 1, rows, directory / "one"))
        seconds.setdefault("core", []).append(run_ours(args, ROOT, 1, rows, directory / "core", one_core=True))
        if args.before:
            seconds.setdefault("before", []).append(run_ours(args, args.before, 1, rows, directory / "before"))
        if args.peer:
            seconds.setdefault("peer", []).append(run_peer(args, rows, directory / "peer"))
        for name in {*seconds} - {"ours", "encode_batch"}:
            same_as_ours(name)
        seconds.setdefault("encode_batch", []).append(run_encode_batch(args, texts))
    names = {
        "ours": f"preprocess/tokenize.py, {args.workers} workers",
        "one": "preprocess/tokenize.py, 1 worker (same bytes)",
        "core": "preprocess/tokenize.py, 1 core (same bytes)",
        "before": "that of --before, 1 worker (same bytes)",
        "peer": "tools/preprocess_data.py, two runs (same bytes)",
        "encode_batch": "tokenizers encode_batch, only encoding",
    }
    best = {name: [min(column) for column in zip(*times, strict=True)] for name, times in seconds.items()}
    for name, (wall, cpu) in best.items():
        print(f"{names[name]:50} {wall:6.2f} s wall, {size / 1e6 / wall:5.1f} MB/s; {cpu:6.2f} s of CPU")
    for name in [name for name in best if name not in ("ours", "before")]:
        wall, cpu = (theirs / ours for theirs, ours in zip(best[name], best["ours"], strict=True))
        print(f"ours is {wall:.1f}x as fast as {names[name]} by wall clock, {cpu:.1f}x by CPU time")
    if args.before:
        wall, cpu = (theirs / ours for theirs, ours in zip(best["before"], best["one"], strict=True))
        print(f"one worker is {wall:.1f}x as fast as {names['before']} by wall clock, {cpu:.1f}x by CPU time")


def encoding_only(args: argparse.Namespace, texts: list[str]) -> None:
    """Time encoding in one thread, by CPU time."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    tokenizer, reference = load_tokenizer(args.tokenizer_file), Tokenizer.from_file(str(args.tokenizer_file))
    tokenizer.encode("")
    encoders = {
        "ours": (tokenizer.encode_batch, texts),
        "tokenizers": (lambda batch: reference.encode_batch_fast(batch, add_special_tokens=False), texts[::10]),
    }
    if tokie := optional_tokie():
        theirs = tokie.Tokenizer.from_json(str(args.tokenizer_file))
        encoders["tokie"] = (lambda batch: theirs.encode_batch_flat(batch, add_special_tokens=False), texts)
    best = dict.fromkeys(encoders, 0.0)
    for _ in range(args.repeats):
        for name, (encode, batch) in encoders.items():
            start = time.process_time()
            encoded = encode(batch)
            best[name] = max(
                best[name], sum(len(text.encode()) for text in batch) / 1e6 / (time.process_time() - start)
            )
            del encoded
    for name, rate in best.items():
        ratio = "" if name == "ours" else f"; ours is {best['ours'] / rate:.2f}x as fast"
        print(f"one thread, encoding only: {name} {rate:.1f} MB/s{ratio}")
    different: Counter[str] = Counter()
    for i in range(0, len(texts), BATCH):
        batch = texts[i : i + BATCH]
        expected = [one.ids for one in reference.encode_batch_fast(batch, add_special_tokens=False)]
        found = {"ours": [ids.tolist() for ids in tokenizer.encode_batch(batch)]}
        if tokie:
            ids, lengths = theirs.encode_batch_flat(batch, add_special_tokens=False)
            ends = lengths.cumsum().tolist()
            found["tokie"] = [ids[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]
        for name, encoded in found.items():
            different[name] += sum(ids != right for ids, right in zip(encoded, expected, strict=True))
    for name, count in different.items():
        print(f"{name} has other ids than tokenizers in {count:,} of {len(texts):,} texts")


def optional_tokie() -> ModuleType | None:
    try:
        return importlib.import_module("tokie")
    except ImportError:
        return None


def make_rows(path: Path, size: int) -> int:
    """Write rows of pieces of the standard library, 1,000 to 8,000 characters; return the bytes."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for round in itertools.count():
            for source in sources:
                if "site-packages" in source.parts:
                    continue
                try:
                    text = source.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue
                length = 1000 + (len(text) * 7 + round * 1777) % 7000
                pieces = [text[i : i + length] for i in range(0, len(text), length)]
                for inputs, targets in zip(pieces[::2], pieces[1::2], strict=False):
                    written += file.write(json.dumps({"inputs": inputs, "targets": targets}) + "\n")
                    if written >= size:
                        return written


def timed(command: list, **kwargs) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command. Raises UserError if it fails."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    if done.returncode:
        raise UserError(f"{command[1]} failed: {done.stderr.strip().splitlines()[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def run_ours(
    args: argparse.Namespace, root: Path, workers: int, rows: Path, prefix: Path, *, one_core: bool = False
) -> tuple[float, float]:
    """Seconds of the complete program of a checkout, startup included."""
    command = [sys.executable, root / "preprocess/tokenize.py", rows, "--output-prefix", prefix]
    command += ["--tokenizer-file", args.tokenizer_file.resolve(), "--workers", workers]
    return timed(command, preexec_fn=use_one_core if one_core else None)


def use_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def run_peer(args: argparse.Namespace, rows: Path, prefix: Path) -> tuple[float, float]:
    """Seconds of the peer's two runs: inputs without end-of-text tokens, targets with them."""
    stand_ins = prefix.parent / "stand-ins"
    stand_ins.mkdir(exist_ok=True)
    (stand_ins / "sitecustomize.py").write_text(PEER_STAND_INS, encoding="utf-8")
    command = [sys.executable, args.peer / "tools/preprocess_data.py", "--input", rows, "--output-prefix", prefix]
    command += ["--tokenizer-type", "TokenizerFromFile", "--tokenizer-file", args.tokenizer_file.resolve()]
    command += ["--workers", args.workers, "--chunk-size", 100, "--log-interval", 100000]
    env = {**os.environ, "PYTHONPATH": str(stand_ins)}
    runs = [
        timed([*command, "--json-keys", "inputs"], env=env),
        timed([*command, "--json-keys", "targets", "--append-eod"], env=env),
    ]
    return tuple(map(sum, zip(*runs, strict=True)))


def run_encode_batch(args: argparse.Namespace, texts: list[str]) -> tuple[float, float]:
    """Seconds of encoding only, with the tokenizer loaded and the texts in memory."""
    tokenizer = Tokenizer.from_file(str(args.tokenizer_file))
    start, before = time.perf_counter(), time.process_time()
    for i in range(0, len(texts), BATCH):
        tokenizer.encode_batch(texts[i : i + BATCH], add_special_tokens=False)
    return time.perf_counter() - start, time.process_time() - before


if __name__ == "__main__":
    run_program(main)
