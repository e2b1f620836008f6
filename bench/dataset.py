"""Time dataset/commitpackft against the alternatives, on made-up commits of 7 KB.

    python bench/dataset.py --tokenizer-file tokenizer.json

Each is timed in turn, --repeats times, and the best CPU time of all threads is kept, which depends
less on other jobs on the machine than wall-clock time. Compared are

    rules        filter.py without the rule on tokens with datatrove's JsonlReader, LambdaFilter of
                 the same rules, JsonlWriter, both without start-up; the same rows must stay
    tokens       the rule on tokens with `tokenizers` on complete rows; the same rows must stay
    minhash      our bands with datasketch's MinHash, both of the same 5-word shingles
    decontaminate, near_dedup.py          rows per second, without a peer
    memory       peak of filter.py and near_dedup.py, on --megabytes and on four times as much

What is not installed is skipped, with a line that names it (pip install datatrove datasketch).
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import importlib.util
import json
import random
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from operator import itemgetter

from megatron_ft.commits.candidate import Columns, candidate_of, columns_of
from megatron_ft.commits.contamination import ProblemIndex
from megatron_ft.commits.minhash import PERMUTATIONS, SHINGLE, bands
from megatron_ft.commits.presets import PRESETS
from megatron_ft.commits.token_rule import TokenRule
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.atomic import sync_path
from megatron_ft.tokenizer.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
FILTER, NEAR_DEDUP = (ROOT / "dataset/commitpackft" / name for name in ("filter.py", "near_dedup.py"))
WORD = re.compile(r"\w+")
END_OF_TEXT = "<|endoftext|>"
# Runs a program in this process and prints the peak of its memory, in KiB.
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("PEAK", open("/proc/self/status", encoding="utf-8").read().split("VmHWM:")[1].split()[0])
"""
# Runs a program on a file of one row, which imports all modules, then on all rows in the same
# process, and prints the CPU seconds of the latter.
AFTER_START_UP = """
import runpy, sys, time
program, one_row, rows, *rest = sys.argv[1:]
main = runpy.run_path(program)["main"]
def run(source):
    sys.argv = [program, "--input", source, *rest]
    start = time.process_time()
    main()
    return time.process_time() - start
run(one_row)
print("CPU", run(rows))
"""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--tokenizer-file", help="tokenizer.json for the rule on tokens (default: not timed)")
    add("--problems", metavar="DIR", help="HumanEvalPack's files LANG.jsonl (default: decontamination is not timed)")
    add("--megabytes", type=int, default=100, help="size of the JSONL file")
    add("--repeats", type=int, default=3, help="rounds; the best time of each is kept")
    args = parser.parse_args()
    if args.megabytes < 1 or args.repeats < 1:
        raise UserError("--megabytes and --repeats: must be at least 1")
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.jsonl"
        count = make_rows(rows, args.megabytes * 1_000_000)
        print(f"{rows.stat().st_size / 1e6:.0f} MB of JSONL, {count:,} rows")
        bench_rules(rows, count, args.repeats)
        bench_minhash(rows, args.repeats)
        if args.tokenizer_file:
            bench_tokens(rows, args.tokenizer_file, args.repeats)
        if args.problems:
            bench_problems(rows, args.problems, args.repeats)
        seconds = min(run(NEAR_DEDUP, rows)[0] for _ in range(args.repeats))
        print(f"{'near_dedup.py, start-up included':50} {seconds:7.2f} s {count / seconds:10,.0f} rows/s")
        bench_memory(rows, args.megabytes)


def make_rows(path: Path, size: int) -> int:
    """Write commit rows of about 7 KB, one in eight a near-duplicate; returns their number."""
    rng = random.Random(1)
    names = [f"{verb}_{noun}" for verb in ("get", "set", "read", "write", "open") for noun in ("row", "file", "name")]
    subjects = ["Add {}", "Fix {} for empty files", "update", "Merge branch '{}'", "use {} instead", "Remove {} twice"]

    def line() -> str:
        call = f"{rng.choice(names)}({rng.choice(names)}, {rng.randrange(100)})"
        return f"    {rng.choice(names)} = {call}  # {rng.choice(names)} {rng.randrange(10_000)}"

    written = count = 0
    lines: list[str] = []
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            if count % 8 != 7:
                lines = [line() for _ in range(55)]
            changed = [*lines]
            changed[rng.randrange(len(lines))] = line()
            subject = rng.choice(subjects).format(" ".join(rng.sample(names, 3)))
            row = {"commit": f"{rng.getrandbits(160):040x}", "old_file": "a/b.py", "new_file": "a/b.py"}
            row |= {"old_contents": "\n".join(lines), "new_contents": "\n".join(changed)}
            row |= {"subject": subject, "message": subject + "\n", "lang": "Python", "license": "mit", "repos": "a/b"}
            written += file.write(json.dumps(row) + "\n")
            count += 1
    return count


def run(program: Path, rows: Path, *flags: str) -> tuple[float, Path, int]:
    """Run a program on rows. Returns its CPU seconds, its output, and its peak memory in MiB."""
    output = rows.with_name(f"{program.stem}.jsonl")
    command = [sys.executable, "-c", PROBE, program, "--input", rows, "--output", output, *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{program.name} failed: {done.stderr.strip().splitlines()[-1]}")
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, output, int(done.stdout.split("PEAK ")[1]) // 1024


def best(repeats: int, action: Callable[[], object]) -> float:
    """The fewest CPU seconds of this process that an action takes."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return min(seconds)


def compare(name: str, count: int, ours: float, theirs: float, peer: str) -> None:
    for label, seconds in ((f"{name}, ours", ours), (f"{name}, {peer}", theirs)):
        print(f"{label:50} {seconds:7.2f} s {count / seconds:10,.0f} rows/s")
    print(f"ours is {theirs / ours:.1f}x as fast as {peer}")


def installed(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        print(f"{name} is not installed; not compared")
        return False
    return True


def commit_ids(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["commit"] for line in file]


def read_rows(path: Path, limit: int) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(limit), file, strict=False)]


def bench_rules(rows: Path, count: int, repeats: int) -> None:
    flags = ["--decontaminate", "off", "--secrets", "off"]
    one_row = rows.with_name("one_row.jsonl")
    one_row.write_bytes(rows.read_bytes().partition(b"\n")[0] + b"\n")
    kept = rows.with_name("filtered.jsonl")
    command = [sys.executable, "-c", AFTER_START_UP, FILTER, one_row, rows, "--output", kept, *flags]

    def seconds() -> float:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{FILTER.name} failed: {done.stderr.strip().splitlines()[-1]}")
        return float(done.stdout.split("CPU ")[1])

    if not installed("datatrove"):
        ours = min(seconds() for _ in range(repeats))
        print(f"{'rules, ours':50} {ours:7.2f} s {count / ours:10,.0f} rows/s")
        return
    peer = rows.with_name("datatrove")
    run_datatrove(one_row, peer)  # imports its modules
    rounds = [(seconds(), best(1, lambda: run_datatrove(rows, peer))) for _ in range(repeats)]
    if commit_ids(peer / "00000.jsonl") != commit_ids(kept):
        raise UserError("datatrove keeps other rows than filter.py")
    ours, theirs = map(min, zip(*rounds, strict=True))
    compare("rules", count, ours, theirs, "datatrove")


def run_datatrove(rows: Path, output: Path) -> None:
    """datatrove's pipeline: read, filter by the rules of our preset and count by rule, write."""
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from loguru import logger

    logger.disable("datatrove")
    preset = PRESETS["commitpackft"]

    steps = [(rule.name, rule.drops) for rule in preset.rules]
    ten_of = itemgetter(*Columns.__struct_fields__)  # the reader adds the name of the file

    def stays(document) -> bool | tuple[bool, str]:
        row = {**document.metadata, "old_contents": document.text}
        candidate = candidate_of(Columns(*ten_of(row)), None, row)
        for name, drops in steps:
            if drops(candidate, preset.limits):
                return False, name  # which the filter counts, as filter.py does
        document.metadata |= candidate.row()
        return True

    def to_row(writer, document) -> dict:
        return {**document.metadata, "old_contents": document.text}

    reader = JsonlReader(str(rows.parent), glob_pattern=rows.name, text_key="old_contents", id_key="commit_id")
    writer = JsonlWriter(str(output), "${rank}.jsonl", compression=None, adapter=to_row)
    documents = reader.run(None)
    for step in (LambdaFilter(stays), writer):
        documents = step.run(documents)
    for _ in documents:
        pass
    for file in output.glob("*.jsonl"):
        sync_path(file)  # as filter.py does


def bench_tokens(rows: Path, tokenizer_file: str, repeats: int) -> None:
    tokenizer, limits = load_tokenizer(tokenizer_file), PRESETS["commitpackft"].limits
    rule = TokenRule(tokenizer)
    some = read_rows(rows, 500)
    # Half of them short enough to stay, like those that the rules before have left.
    for row in some[::2]:
        row["old_contents"], row["new_contents"] = row["old_contents"][:900], row["new_contents"][:900]
    candidates = [candidate_of(columns_of(row), None, row) for row in some]

    from tokenizers import Tokenizer

    peer = Tokenizer.from_file(tokenizer_file)
    texts = [row["old_contents"] + END_OF_TEXT + row["new_contents"] for row in some]

    def peer_drops(text: str) -> bool:
        return not limits.min_tokens <= len(peer.encode(text).ids) <= limits.max_tokens

    if [rule(candidate, limits) for candidate in candidates] != [peer_drops(text) for text in texts]:
        raise UserError("the rule on tokens keeps other rows than tokenizers")
    ours = best(repeats, lambda: [rule(candidate, limits) for candidate in candidates])
    theirs = best(repeats, lambda: [peer_drops(text) for text in texts])
    compare("tokens", len(some), ours, theirs, "tokenizers on complete rows")


def bench_minhash(rows: Path, repeats: int) -> None:
    some = read_rows(rows, 500)
    texts = ["\n".join([row["old_contents"], row["new_contents"], row["subject"]]) for row in some]
    ours = best(repeats, lambda: bands(texts))
    if not installed("datasketch"):
        print(f"{'minhash, ours':50} {ours:7.2f} s {len(texts) / ours:10,.0f} rows/s")
        return
    from datasketch import MinHash

    def theirs() -> None:
        for text in texts:
            words = WORD.findall(text)
            shingles = {" ".join(words[i : i + SHINGLE]).encode() for i in range(len(words) - SHINGLE + 1)}
            MinHash(PERMUTATIONS).update_batch(shingles)

    compare("minhash", len(texts), ours, best(repeats, theirs), "datasketch")


def bench_problems(rows: Path, problems: str, repeats: int) -> None:
    index = ProblemIndex.load(problems)
    some = read_rows(rows, 2000)
    texts = [[row["old_contents"], row["new_contents"], row["subject"]] for row in some]
    seconds = best(repeats, lambda: [index.task_ids(row) for row in texts])
    print(f"{f'decontaminate, {index.problems} problems':50} {seconds:7.2f} s {len(some) / seconds:10,.0f} rows/s")


def bench_memory(rows: Path, megabytes: int) -> None:
    """Print the peak of memory on these rows, and on four times as many."""
    larger = rows.with_name("larger.jsonl")
    make_rows(larger, 4 * megabytes * 1_000_000)
    for program in (FILTER, NEAR_DEDUP):
        peaks = [run(program, path)[2] for path in (rows, larger)]
        print(
            f"{program.name + f', peak memory on {megabytes} and {4 * megabytes} MB':50} {peaks[0]} and {peaks[1]} MiB"
        )


if __name__ == "__main__":
    run_program(main)
