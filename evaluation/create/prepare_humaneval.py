"""Make HumanEvalPack from HumanEval-X: extract the solutions, edit bugs into them, merge.

    python evaluation/create/prepare_humaneval.py extract humaneval-x
    python evaluation/create/prepare_humaneval.py merge humaneval-x --output humanevalpack
    python evaluation/create/prepare_humaneval.py check humanevalpack PUBLISHED

DIR holds LANGUAGE/humaneval.jsonl, the rows of HumanEval-X with a prompt, a declaration, a solution
and tests, and HumanEval_original.jsonl, whose entry points name the functions. `extract` writes
LANGUAGE/humanevalpack.json, where each solution is to be turned into a buggy one by hand, and
existing bugs are never overwritten. `merge` adds the bugs, entry points, signatures, docstrings and
instructions. `check` compares field by field with another copy and exits with 1 if they differ.

The published rows have two fields that no rule gives. `merge` makes them as published, and both
`merge` and `check` list them with their reason; --no-edits leaves them out.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.evaluation.problems import ID_PREFIXES, LANGUAGES
from megatron_ft.files.json_file import kind_of, read_small_file
from megatron_ft.files.jsonl_row import BadRow, keys_of, parse_object, text_of
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.files.report import write_report
from megatron_ft.printable import printable

ROWS, BUGS, ORIGINAL = "humaneval.jsonl", "humanevalpack.json", "HumanEval_original.jsonl"
NEEDED = ("task_id", "prompt", "declaration", "canonical_solution", "test")
# Told apart in Python only, by hand; the bugs of the other languages are the same ones.
BUG_KINDS = {"bug_type": "variable misuse", "failure_symptoms": "incorrect output"}
METADATA = ("METADATA = {\n    'author': 'jt',\n    'dataset': 'test'\n}", "METADATA = {}")
MAX_BYTES = 64 << 20

# Functions that a language's rows name differently than the rule makes of HumanEval's names.
RENAMED = {
    "get_max_triples": "get_matrix_triples",
    "digitsum": "digitSum",
    "closestInteger": "closest_integer",
    "wordsString": "words_string",
    "minsubarraysum": "minSubarraySum",
    "minpath": "minPath",
    "fileNameCheck": "filenameCheck",
    "specialfilter": "specialFilter",
    "sortedListSum": "listSort",
    "strongestExtension": "StrongestExtension",
    "max_element": "maximum",
    "minSubArraySum": "min_sub_array_sum",
    "minPath": "min_path",
    "specialFilter": "special_filter",
    "Strongest_Extension": "strongest_extension",
}
HELPER_IN_PROMPT = ("make_palindrome", "decode_shift")  # some prompts name only the function's helper


@dataclass(frozen=True)
class Edit:
    """A field of the published rows that no rule gives: what to put before it, and why."""

    prefix: str
    reason: str


STRAY_QUOTE = (
    "published with the quote of a docstring that began with four quotes; "
    "the row was fixed by hand in HumanEval-X after HumanEvalPack had been made of it"
)
EDITS = {("Python/142", "docstring"): Edit('"\n', STRAY_QUOTE)}
# Fields that differ with an edit: the instruction holds the docstring.
EDITED = {(task, name): edit.reason for (task, _), edit in EDITS.items() for name in ("docstring", "instruction")}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False, reads_config=False)
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP", parser_class=Parser)
    extract = steps.add_parser("extract", help="write files for the bugs", formatter_class=Help, allow_abbrev=False)
    extract.add_argument("input", type=Path, metavar="DIR", help="directory with LANGUAGE/humaneval.jsonl")
    merge = steps.add_parser("merge", help="write HumanEvalPack", formatter_class=Help, allow_abbrev=False)
    merge.add_argument("input", type=Path, metavar="DIR", help="directory with the rows and the bugs")
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="where LANGUAGE.jsonl are written")
    merge.add_argument("--no-edits", action="store_true", help="only what the rules give")
    check = steps.add_parser("check", help="compare two copies", formatter_class=Help, allow_abbrev=False)
    check.add_argument("input", type=Path, metavar="DIR", help="directory with LANGUAGE.jsonl")
    check.add_argument("expected", type=Path, metavar="PUBLISHED", help="directory of the copy to compare with")
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    if args.step == "extract":
        return extract(args.input)
    if args.step == "merge":
        return merge(args.input, args.output, {} if args.no_edits else EDITS)
    return check(args.input, args.expected)


def extract(directory: Path) -> int:
    """Write each language's solutions as the start of its bugs."""
    paths = [directory / language / BUGS for language in LANGUAGES]
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists, and may hold bugs made by hand; move it away to extract again")
    rows = {language: read_rows(directory / language / ROWS, NEEDED, ID_PREFIXES[language]) for language in LANGUAGES}
    for language, path in zip(LANGUAGES, paths, strict=True):
        kinds = BUG_KINDS if language == "python" else {}
        bugs = [{"buggy_solution": row["canonical_solution"], **kinds} for row in rows[language]]
        with OutputFile(path) as output, writing(path):
            output.write(json.dumps(bugs, indent=4).encode() + b"\n")
            output.commit()
        print(f"{path}: {len(bugs)} solutions to edit bugs into", file=sys.stderr)
    return 0


def merge(directory: Path, output: Path, edits: dict[tuple[str, str], Edit]) -> int:
    """Write HumanEvalPack's rows and list the fields that were edited."""
    originals = [row["entry_point"] for row in read_rows(directory / ORIGINAL, ("entry_point",), None)]
    kinds = read_bugs(directory / "python" / BUGS, ("buggy_solution", *BUG_KINDS), len(originals))
    packs = {}
    for language in LANGUAGES:
        path = directory / language / ROWS
        rows = read_rows(path, NEEDED, ID_PREFIXES[language])
        if len(rows) != len(originals):
            raise UserError(f"{path}: {len(rows)} rows, expected {len(originals)} as in {ORIGINAL}")
        bugs = read_bugs(directory / language / BUGS, ("buggy_solution",), len(rows))
        for row, bug, kind, name in zip(rows, bugs, kinds, originals, strict=True):
            if bug["buggy_solution"] == row["canonical_solution"]:
                raise UserError(f"{directory / language / BUGS}: {row['task_id']} has no bug yet; edit one in by hand")
            add_fields(row, language, bug["buggy_solution"], kind, name, edits)
        packs[language] = rows
    for language, rows in packs.items():
        path = output / f"{language}.jsonl"
        with OutputFile(path) as file, writing(path):
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.commit()
    edited = EDITED if edits else {}
    for (task, name), reason in edited.items():
        print(f"{task} {name}: {reason}", file=sys.stderr)
    listed = [{"problem": task, "field": name, "reason": reason} for (task, name), reason in edited.items()]
    write_report(output / "humanevalpack.jsonl", {"rows": {k: len(v) for k, v in packs.items()}, "edits": listed})
    print(f"{len(packs)} languages, {len(originals)} problems each -> {output}", file=sys.stderr)
    return 0


def check(directory: Path, expected: Path) -> int:
    """Print every field that differs; 0 if all that do are explained."""
    unexplained = 0
    for language in LANGUAGES:
        found = read_rows(directory / f"{language}.jsonl", NEEDED, ID_PREFIXES[language])
        wanted = read_rows(expected / f"{language}.jsonl", NEEDED, ID_PREFIXES[language])
        if len(found) != len(wanted):
            raise UserError(f"{directory / f'{language}.jsonl'}: {len(found)} rows, expected {len(wanted)}")
        for ours, theirs in zip(found, wanted, strict=True):
            for name in dict.fromkeys([*theirs, *ours]):
                if ours.get(name) != theirs.get(name):
                    reason = EDITED.get((ours["task_id"], name))
                    unexplained += reason is None
                    print(printable(f"{ours['task_id']} {name}: {reason or 'differs'}"))
    print(f"{unexplained} fields differ without a known reason")
    return 1 if unexplained else 0


def read_rows(path: Path, names: Sequence[str], prefix: str | None) -> list[dict[str, Any]]:
    """The rows of a JSONL file with these keys; ids must be PREFIX/0, PREFIX/1, ..."""
    rows = []
    for number, line in enumerate(read_small_file(path, MAX_BYTES).splitlines(), 1):
        try:
            row = parse_object(line)
            for name in names:
                if name not in row:
                    raise BadRow(f"no key {name!r}; {keys_of(row)}")
                text_of(row, name, line)
            if prefix and row["task_id"] != f"{prefix}/{number - 1}":
                raise BadRow(f"task_id is {row['task_id'][:40]!r}, expected '{prefix}/{number - 1}'")
        except BadRow as reason:
            raise UserError(f"{path}:{number}: {reason}") from None
        rows.append(row)
    return rows


def read_bugs(path: Path, names: Sequence[str], count: int) -> list[dict[str, str]]:
    """The bugs of a language: a JSON list with one object per problem."""
    try:
        bugs = json.loads(read_small_file(path, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON ({error}); expected a list, as `extract` writes it") from None
    if not isinstance(bugs, list) or len(bugs) != count:
        found = f"{len(bugs)} entries" if isinstance(bugs, list) else kind_of(bugs)
        raise UserError(f"{path}: {found}, expected a list of {count}, as `extract` writes it")
    for i, bug in enumerate(bugs):
        if not isinstance(bug, dict) or not all(isinstance(bug.get(name), str) for name in names):
            raise UserError(f"{path}: entry {i} needs the texts {', '.join(names)}")
    return bugs


def add_fields(
    row: dict[str, Any], language: str, buggy: str, kind: dict[str, str], name: str, edits: dict[tuple[str, str], Edit]
) -> None:
    """Add HumanEvalPack's fields to a row of HumanEval-X; `name` is HumanEval's entry point."""
    row["buggy_solution"] = buggy
    row |= {key: kind[key] for key in BUG_KINDS}
    row["entry_point"] = entry_point(name, language, row)
    if language == "python":
        for metadata in METADATA:
            row["test"] = row["test"].replace(metadata, "")
    row["signature"], row["docstring"] = DESCRIBE[language](row)
    if edit := edits.get((row["task_id"], "docstring")):
        row["docstring"] = edit.prefix + row["docstring"]
    row["instruction"] = (
        f"Write a {LANGUAGES[language]} function `{row['signature']}` to solve the following problem:\n"
        f"{row['docstring']}"
    )
    if language == "rust":
        row["prompt"] = rust_prompt(row)


def entry_point(name: str, language: str, row: dict[str, Any]) -> str:
    """The function's name by the language's custom: HelloWorld, helloWorld or hello_world."""
    if language in ("go", "java", "js"):
        name = name.replace("_", " ").title().replace(" ", "")
        name = name if language == "go" else name[0].lower() + name[1:]
    if name in row["declaration"] + row["prompt"] or name in HELPER_IN_PROMPT:
        return name
    if name not in RENAMED:
        raise UserError(
            f"{row['task_id']}: {name!r} is neither in the declaration nor in the prompt; add it to RENAMED"
        )
    return RENAMED[name]


def unindented(lines: Sequence[str]) -> str:
    """Lines without white space around them, and without blank lines."""
    return "\n".join(filter(None, map(str.strip, lines)))


def describe_python(row: dict[str, Any]) -> tuple[str, str]:
    """Signature and docstring of the last function of the prompt."""
    function = row["prompt"].rpartition("def ")[2]
    parts = re.split(r'"{3}|\'{3}', function)
    if len(parts) != 3:
        raise UserError(f"{row['task_id']}: the prompt does not end in a function with one docstring")
    return parts[0].strip().strip(":"), unindented(parts[1].split("\n"))


def last_line(row: dict[str, Any]) -> str:
    return row["prompt"].strip().rpartition("\n")[2].strip().strip("{").strip()


def block_comment(row: dict[str, Any]) -> str | None:
    """The last comment between /* and */; None if there is none."""
    parts = re.split(r"/\*|\*/", row["prompt"])
    return parts[-2] if len(parts) >= 3 else None


def line_comment(row: dict[str, Any]) -> str:
    """The last block of lines that start with //."""
    found: list[str] = []
    for line in reversed(unindented(row["prompt"].split("\n")).split("\n")):
        if line.startswith("//"):
            found.insert(0, line.strip("/"))
        elif found:
            break
    return unindented(found)


def describe_cpp(row: dict[str, Any]) -> tuple[str, str]:
    """The last line that opens the function, and the comment before it."""
    lines = [line.strip() for line in row["prompt"].split("\n")]
    opening = [line for line in lines if row["entry_point"] in line and line.endswith("{")]
    if not opening:
        raise UserError(f"{row['task_id']}: no line of the prompt opens {row['entry_point']!r}")
    comment = block_comment(row)
    docstring = line_comment(row) if comment is None else unindented(comment.strip("*").split("\n"))
    return opening[-1].strip("{"), docstring


def describe_java_or_js(row: dict[str, Any]) -> tuple[str, str]:
    """The last line, without JavaScript's arrow, and the last comment, without Java's second *."""
    comment = block_comment(row)
    if comment is None:
        raise UserError(f"{row['task_id']}: the prompt has no comment between /* and */")
    java = row["task_id"].startswith("Java/")
    signature = last_line(row) if java else last_line(row).strip("=>").strip()
    return signature, unindented((comment.strip("*") if java else comment).split("\n"))


def describe_go(row: dict[str, Any]) -> tuple[str, str]:
    """The last line and the comment before it."""
    return last_line(row), line_comment(row)


def describe_rust(row: dict[str, Any]) -> tuple[str, str]:
    """The declaration's last function, and the prompt, which is a comment only."""
    signature = row["declaration"].rpartition("fn ")[2].partition("{")[0].strip()
    lines = [line.strip() for line in row["prompt"].split("\n")]
    lines = [line.strip("/*") if line.startswith(("/*", "*/")) else line for line in lines]
    return signature, unindented([line for line in lines if line.strip() != '"'])


DESCRIBE: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "python": describe_python,
    "cpp": describe_cpp,
    "js": describe_java_or_js,
    "java": describe_java_or_js,
    "go": describe_go,
    "rust": describe_rust,
}


def rust_prompt(row: dict[str, Any]) -> str:
    """`fn main(){}`, and the declaration with the comment before its last function."""
    declaration = row["declaration"]
    position = max(declaration.rfind("\nfn "), declaration.rfind("\npub fn "))
    if position < 0:
        raise UserError(f"{row['task_id']}: no line of the declaration starts with 'fn' or 'pub fn'")
    return f"fn main(){{}}\n{declaration[:position]}\n{row['prompt'].strip()}\n{declaration[position:].lstrip()}"


if __name__ == "__main__":
    run_program(main)
