"""Decontamination: texts that hold a problem of HumanEvalPack are found, other code is not."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program

from megatron_ft.commits.contamination import LANGUAGES, ProblemIndex
from megatron_ft.errors import UserError

CONTAMINATION = "evaluation/run/contamination.py"
MEDIAN = {
    "task_id": "Python/0",
    "declaration": "from typing import List\n\n\ndef running_median(samples: List[float]) -> List[float]:\n",
    "docstring": "For every prefix of the samples, tell the median value.\n>>> running_median([3, 1])\n[3, 2]",
    "canonical_solution": "    medians = []\n    for stop in range(1, len(samples) + 1):\n"
    "        prefix = sorted(samples[:stop])\n        middle = (prefix[stop // 2] + prefix[~(stop // 2)]) / 2\n"
    "        medians.append(middle)\n    return medians\n",
}
ADD = {
    "task_id": "Python/1",
    "declaration": "def plus(x: int, y: int):\n",
    "docstring": "Add two numbers",
    "canonical_solution": "    result = x + y\n    return result\n",
}
LOOP = "    for (int row = 0; row < rows; row++) {\n"
JAVA = {
    "task_id": "Java/1",
    "declaration": "class Solution {\n    public int plus(int x, int y) {\n",
    "docstring": "Add two numbers",
    "canonical_solution": "        int result = x + y;\n        return result;\n    }\n}",
}
GRID = {
    "task_id": "Java/10",
    "declaration": "class Solution {\n    public int grid(int rows) {\n",
    "docstring": "Tell the number of cells that lie on the diagonal of the given square",
    "canonical_solution": "    int k = 0;\n" + LOOP + "        k++;\n    }\n    return k;\n}",
}
SUBJECT = "Tidy up"


def complete(problem: dict[str, str]) -> dict[str, str]:
    """The problem with its other fields."""
    prompt = problem["declaration"] + '    """' + problem["docstring"] + '"""\n'
    return {**problem, "prompt": prompt, "buggy_solution": problem["canonical_solution"].replace("+", "-")}


def write_problems(directory: Path, **languages: list[dict]) -> Path:
    directory.mkdir(exist_ok=True)
    for language, problems in languages.items():
        (directory / f"{language}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return directory


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ProblemIndex:
    python, java = [complete(MEDIAN), complete(ADD)], [complete(JAVA), complete(GRID)]
    return ProblemIndex.load(write_problems(tmp_path_factory.mktemp("problems"), python=python, java=java))


def reindented(text: str) -> list[str]:
    """The text as it is, with tabs and CRLF, with other line breaks, and on one line."""
    tabs = re.sub("^ +", lambda spaces: "\t" * (len(spaces[0]) // 2), text, flags=re.MULTILINE)
    return [text, tabs.replace("\n", "\r\n"), text.replace(" ", "\n"), " ".join(text.split())]


@pytest.mark.parametrize("field", ["prompt", "docstring", "canonical_solution", "buggy_solution"])
def test_a_problem_inside_a_file_is_found_at_any_indentation(index, field):
    for text in reindented(complete(MEDIAN)[field]):
        assert index.task_ids(["", "import math\n\n" + text + "\n\nprint(math.pi)\n", SUBJECT]) == ["Python/0"]


def test_thirteen_tokens_are_an_overlap_and_twelve_are_not(index):
    tokens = "For every prefix of the samples , tell the median value . >".split()
    assert len(tokens) == 13
    assert index.task_ids(["text " + " ".join(tokens) + " text"]) == ["Python/0"]
    assert index.task_ids(["text " + " ".join(tokens[:-1]) + " text"]) == []


def test_short_solution_is_found_alone_or_with_its_declaration_but_not_in_other_code(index):
    solution = ADD["canonical_solution"]
    assert index.task_ids([SUBJECT, solution]) == ["Python/1"]
    assert index.task_ids(["import os\n" + ADD["declaration"] + solution + "print(1)\n"]) == ["Python/1"]
    assert index.task_ids(["import os\n\n\ndef total(x, y):\n" + solution]) == []


def test_translations_of_a_problem_are_found_together_in_order(index):
    assert index.task_ids(["Add two numbers"]) == ["Java/1", "Python/1"]
    assert index.task_ids([complete(GRID)["prompt"], complete(JAVA)["prompt"]]) == ["Java/1", "Java/10"]


def test_what_two_problems_share_is_no_problem(tmp_path):
    header = "from typing import Callable, Iterable, Iterator, Mapping, Optional, Sequence\n\n\n"
    median = {**MEDIAN, "declaration": header + MEDIAN["declaration"].removeprefix("from typing import List\n\n\n")}
    problems = [complete(median), complete({**ADD, "declaration": header + ADD["declaration"]})]
    index = ProblemIndex.load(write_problems(tmp_path, python=problems))
    assert index.task_ids([header + "def other():\n    pass\n"]) == []
    assert index.task_ids([header + ADD["declaration"] + ADD["canonical_solution"]]) == ["Python/1"]


def test_loops_that_everybody_writes_are_no_problem(index):
    assert index.task_ids(["void fill(int n) {\n" + LOOP + "        a[row] = 0;\n"]) == []


def test_texts_of_a_row_are_not_joined(index):
    text = "every prefix of the samples, tell the median value.\n>>"
    assert index.task_ids([text]) == ["Python/0"]
    for middle in range(1, len(text)):
        assert index.task_ids([text[:middle], text[middle:]]) == []
    assert index.task_ids([]) == index.task_ids(["", "\0", "é\u00a0\ud800"]) == []


def test_a_problem_is_found_between_non_ascii_text(index):
    assert index.task_ids(["# café\u2003\n" + MEDIAN["canonical_solution"].replace(" ", "\u00a0")]) == ["Python/0"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**complete(ADD), "prompt": None}, "'prompt' is not a string"),
        ({"task_id": "Python/0"}, "'prompt' is missing"),
    ],
)
def test_row_that_is_not_a_problem_is_an_error(tmp_path, row, reason):
    write_problems(tmp_path, go=[complete(ADD), row])
    with pytest.raises(UserError, match=f"go.jsonl, line 2: not a problem of HumanEvalPack: {reason}"):
        ProblemIndex.load(tmp_path)


def test_directory_without_problems_is_an_error(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="no problems found; expected .* python.jsonl, cpp.jsonl"):
            ProblemIndex.load(directory)


@pytest.fixture(scope="module")
def humanevalpack(shared_data) -> tuple[ProblemIndex, list[dict]]:
    directory = shared_data / "humanevalpack"
    problems = [json.loads(line) for name in LANGUAGES for line in open(directory / f"{name}.jsonl", encoding="utf-8")]
    return ProblemIndex.load(directory), problems


def test_every_canonical_solution_of_humanevalpack_is_found(humanevalpack):
    index, problems = humanevalpack
    assert index.problems == len(problems) == 984
    for problem in problems:
        function = problem["declaration"] + problem["canonical_solution"]
        for solution in (problem["canonical_solution"], function, problem["prompt"] + problem["canonical_solution"]):
            for text in reindented(solution):
                assert problem["task_id"] in index.task_ids(["", text, SUBJECT])
        assert problem["task_id"] in index.task_ids([f"// before\n{function}\n// after", SUBJECT])


def test_other_code_holds_no_problem_of_humanevalpack(humanevalpack, shared_data):
    """Neither OctoCoder's training rows nor this package nor Python's own library."""
    index, _ = humanevalpack
    rows = [json.loads(line) for line in open(shared_data / "oasst-commitpackft.jsonl", encoding="utf-8")]
    assert [row for row in rows if index.task_ids([row["prompt"], row["completion"]])] == []
    files = [*(ROOT / "megatron_ft").rglob("*.py"), *Path(json.__file__).parents[1].glob("*.py")]
    assert len(files) > 200
    assert index.task_ids(path.read_text("utf-8", "replace") for path in files) == []


@pytest.fixture
def problems(tmp_path) -> Path:
    return write_problems(tmp_path / "problems", python=[complete(MEDIAN), complete(ADD)], java=[complete(JAVA)])


def test_program_lists_the_problems_of_training_rows(problems, tmp_path):
    commit = {"old_contents": "", "new_contents": "x = 1\n" + MEDIAN["canonical_solution"], "subject": "s"}
    chat = {"messages": [{"role": "user", "content": MEDIAN["docstring"]}, {"content": "Add two numbers"}]}
    rows = [{"inputs": "a", "outputs": "b"}, commit, chat]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", problems, "--json", tmp_path / "hits.json"]
    done = run_program(CONTAMINATION, data, *flags, ok=False)
    assert done.returncode == 1
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["task", "rows"],
        ["Java/1", "1"],
        ["Python/0", "2"],
        ["Python/1", "1"],
    ]
    assert "3 rows, 2 of them hold 3 of 3 problems" in done.stderr
    found = json.loads((tmp_path / "hits.json").read_text())
    assert (found["rows"], found["rows_with_problems"]) == (3, 2)
    assert found["tasks"]["Python/0"] == {"rows": 2, "first": f"{data}, line 2"}
    done = run_program(CONTAMINATION, data, "--data", problems, "--fields", "inputs", "outputs", ok=False)
    assert f"{data}, line 2: no key 'inputs' to search" in one_error_line(done)


def test_program_finds_nothing_in_clean_rows(problems, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"inputs": "a", "outputs": "b"}\n' * 3)
    done = run_program(CONTAMINATION, data, env={**os.environ, "HUMANEVALPACK": str(problems)})
    assert done.stdout == "" and "3 rows, 0 of them hold 0 of 3 problems" in done.stderr


@pytest.mark.parametrize(
    ("line", "flags", "message"),
    [
        ('{"a": 1}', ["--data", "{problems}"], "line 1: no text to search"),
        ('{"a": "b"}', [], "no problems: give --data DIR, or set HUMANEVALPACK"),
        ('{"a": "b"}', ["--data", "{problems}/x"], "x: no problems found"),
        ("text", ["--data", "{problems}"], "line 1: not JSON"),
    ],
)
def test_program_reports_one_line_errors(problems, tmp_path, line, flags, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(line + "\n")
    flags = [flag.format(problems=problems) for flag in flags]
    env = {name: value for name, value in os.environ.items() if name != "HUMANEVALPACK"}
    done = run_program(CONTAMINATION, data, "--json", tmp_path / "out.json", *flags, ok=False, env=env)
    assert done.returncode == 2 and message in one_error_line(done)
    assert not (tmp_path / "out.json").exists()
