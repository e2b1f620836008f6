"""Programs run for real: the right answer passes, the wrong one and an early exit do not."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_problems import BUGS, SOLUTIONS, made_problem

from megatron_ft.errors import UserError
from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.problems import LANGUAGES
from megatron_ft.evaluation.programs import Program, program_of

GO = shutil.which("go") or "go"
# File name, and the commands that build and run it.
COMMANDS: dict[str, tuple[str, list[list[str]]]] = {
    "python": ("test.py", [[sys.executable, "-I", "test.py"]]),
    "cpp": ("test.cpp", [["g++", "-std=c++11", "test.cpp"], ["./a.out"]]),
    "js": ("test.js", [["node", "test.js"]]),
    "java": ("Main.java", [["javac", "Main.java"], ["java", "-cp", ".", "Main"]]),
    "go": ("main_test.go", [[GO, "test", "-vet=off", "-c", "-o", "a.out", "main_test.go"], ["./a.out"]]),
    "rust": ("test.rs", [["rustc", "--test", "--edition", "2021", "-o", "a.out", "test.rs"], ["./a.out"]]),
}
EXITS = {
    "python": "    import os\n    os._exit(0)\n",
    "cpp": "    exit(0);\n}\n",
    "js": "  process.exit(0)\n}\n",
    "java": "        System.exit(0);\n        return 0;\n    }\n}",
    "go": "    os.Exit(0)\n    return 0\n}\n",
    "rust": "    std::process::exit(0)\n}\n",
}


@functools.cache
def works(command: str) -> bool:
    """Whether a command exists; for rustc, which may be rustup's without a toolchain, also whether
    it starts."""
    found = shutil.which(command)
    return bool(found) and (
        command != "rustc" or not subprocess.run([found, "--version"], capture_output=True).returncode
    )


def run(program: Program, directory: Path) -> tuple[int, bytes, bytes]:
    """Exit status, stdout and stderr of the last command."""
    name, commands = COMMANDS[program.language]
    if not all(works(command[0]) for command in commands if command[0] != "./a.out"):
        pytest.skip(f"no toolchain for {program.language}")
    if program.language == "cpp" and not Path("/usr/include/boost/any.hpp").exists():
        program = Program("cpp", program.source.replace("#include<boost/any.hpp>", ""), program.nonce)
    (directory / name).write_text(program.source, encoding="utf-8")
    environment = os.environ | {"GO111MODULE": "off", "GOCACHE": str(directory / "cache")}
    for command in commands:
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, timeout=120)
        if done.returncode:
            break
    return done.returncode, done.stdout, done.stderr


def cut_and_run(language: str, solution: str, mode: str, directory: Path) -> tuple[bool, tuple[int, bytes, bytes]]:
    problem = made_problem(directory, language)
    answer = cut("\n" + solution.strip("\n"), problem, "fixdocs", mode=mode)
    program = program_of(problem, "fixdocs", answer, mode)
    done = run(program, directory)
    return program.passed(*done), done


@pytest.mark.parametrize("language", LANGUAGES)
def test_right_answer_passes_and_wrong_answer_fails_in_clean_mode(language, tmp_path):
    passed, done = cut_and_run(language, SOLUTIONS[language], "clean", tmp_path)
    assert passed, done
    assert not cut_and_run(language, BUGS[language], "clean", tmp_path)[0]


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "go"])
def test_right_answer_passes_and_wrong_answer_fails_in_faithful_mode(language, tmp_path):
    passed, done = cut_and_run(language, SOLUTIONS[language], "faithful", tmp_path)
    assert passed, done
    assert not cut_and_run(language, BUGS[language], "faithful", tmp_path)[0]


@pytest.mark.parametrize("language", LANGUAGES)
def test_answer_that_exits_before_the_tests_does_not_pass_in_clean_mode(language, tmp_path):
    solution = EXITS[language]
    if language == "go":  # os is not among the packages that are imported for the answer
        solution = solution.replace("os.Exit", "humanevalOS.Exit")
    passed, (status, _, stderr) = cut_and_run(language, solution, "clean", tmp_path)
    assert not passed
    assert status == 0 or language == "go", stderr  # Go's test harness turns an exit into a failure


def test_go_in_faithful_mode_fails_on_the_prompt_s_unused_import(tmp_path):
    """As Go/27 does in the reference; clean mode imports what is used."""
    passed, (_, stdout, stderr) = cut_and_run("go", SOLUTIONS["go"], "faithful", tmp_path)
    assert not passed and b"strings" in stdout + stderr


def test_deprecation_warning_fails_javascript_in_faithful_mode_only(tmp_path):
    warning = "  process.stderr.write('warning\\n');\n" + SOLUTIONS["js"]
    assert not cut_and_run("js", warning, "faithful", tmp_path)[0]
    assert cut_and_run("js", warning, "clean", tmp_path)[0]


@pytest.mark.parametrize("mode", ["faithful", "clean"])
def test_javascript_that_replaces_console_assert_passes_in_faithful_mode_only(mode, tmp_path):
    problem = made_problem(tmp_path, "js")
    answer = "console.assert = () => {};\n" + problem.prompt + BUGS["js"]
    program = program_of(problem, "fixdocs", answer, mode)
    assert program.passed(*run(program, tmp_path)) == (mode == "faithful")


def test_nonce_depends_on_the_program_and_equal_programs_are_equal(tmp_path):
    problem = made_problem(tmp_path, "python")
    one, same, other = (program_of(problem, "fixtests", text, "clean") for text in ("a", "a", "b"))
    assert one == same and one.sha256 == same.sha256
    assert one.nonce != other.nonce
    assert one.nonce is not None and one.source.count(one.nonce) == 1


def test_go_answers_in_faithful_mode_depend_on_earlier_ones_as_in_the_reference(tmp_path):
    problem = made_problem(tmp_path, "go")
    answer = cut("\n" + SOLUTIONS["go"], problem, "fixtests")
    importing = 'import (\n    "testing"\n)\n' + answer
    first = program_of(problem, "fixtests", answer).source
    assert first.startswith(problem.test_setup) and 'import (\n    "sort"\n)\n' in first
    after = program_of(problem, "fixtests", answer, earlier=[importing]).source
    assert '"testing"' not in after and first.count('"testing"') == 1
    assert program_of(problem, "fixtests", answer, "clean", earlier=[importing]) == program_of(
        problem, "fixtests", answer, "clean"
    )


def test_clean_go_imports_exactly_what_is_used(tmp_path):
    problem = made_problem(tmp_path, "go")
    body = '\n    // fmt.Println\n    x := "bytes.x"\n    return rand.Intn(len(x)) + m.MaxInt8\n}'
    answer = cut(body, problem, "fixdocs", mode="clean").replace("import (", 'import (\n    m "math"', 1)
    source = program_of(problem, "fixdocs", answer, "clean").source
    head = source.partition(")")[0].split()
    assert head == ["package", "main", "import", "(", '"math/rand"', '"testing"', "humanevalOS", '"os"', "m", '"math"']


def test_second_rust_main_is_cut_in_faithful_mode(tmp_path):
    problem = made_problem(tmp_path, "rust")
    source = program_of(problem, "fixdocs", problem.prompt + "1 }\nfn main(){}\nfn main(){}", "faithful").source
    assert source.count("fn main()") == 1
    assert program_of(problem, "fixtests", "fn largest() {}").source.startswith("fn main(){}\n")


def test_description_and_unknown_mode_are_user_errors(tmp_path):
    problem = made_problem(tmp_path, "python")
    with pytest.raises(UserError, match="a description is not a program"):
        program_of(problem, "explaindescribe", "text")
    with pytest.raises(UserError, match="mode 'strict': unknown; one of faithful, clean"):
        program_of(problem, "fixtests", "text", "strict")
