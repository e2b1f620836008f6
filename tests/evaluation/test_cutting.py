"""Where an answer ends: faithful cuts, clean cuts, and the moment generation stops."""

import difflib

import pytest
from made_problems import SOLUTIONS, made_problem

from megatron_ft.errors import UserError
from megatron_ft.evaluation.cutting import cut, diff_in
from megatron_ft.evaluation.diffs import apply_hunks, apply_patches
from megatron_ft.evaluation.lexing import code_only
from megatron_ft.evaluation.problems import LANGUAGES, load_problems
from megatron_ft.evaluation.stopping import StopRule, stop_words

JUNK = {
    "python": "\nprint(largest([1]))",
    "cpp": "\nint main(){}",
    "js": "\nconsole.log(1)",
    "java": "\nclass A {}",
    "go": "\nfunc main() {}",
    "rust": "\nfn main(){}",
}


@pytest.mark.parametrize("mode", ["faithful", "clean"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_answer_ends_with_its_function(language, mode, tmp_path):
    problem = made_problem(tmp_path, language)
    text = "\n" + SOLUTIONS[language].rstrip() + JUNK[language]
    answer = cut(text, problem, "synthesize", mode=mode)
    assert answer == problem.prompt.rstrip() + "\n" + SOLUTIONS[language].rstrip()


@pytest.mark.parametrize("language", LANGUAGES)
def test_stop_rule_stops_with_the_function_and_not_before(language):
    rule = StopRule(language, "synthesize", "octocoder")
    text = "\n" + SOLUTIONS[language].rstrip()
    ends = text + JUNK[language][:2] if language == "python" else text
    assert rule.finished(ends)
    assert not rule.finished(text[:-1])


def test_stop_words_depend_on_language_and_style():
    assert stop_words("go", "octocoder") == ["\n//", "\nfunc main(", "struct", "\nfunc", "<|endoftext|>"]
    assert stop_words("java", "starchat", "</s>") == ["<|end|>", "<|endoftext|>", "</s>"]
    assert stop_words("python", "diff") == ["<commit_before>", "<commit_msg>", "<commit_after>", "<|endoftext|>"]
    before = stop_words("python", "octocoder")
    stop_words("python", "starchat")
    assert stop_words("python", "octocoder") == before


def test_tokenizer_s_own_end_token_ends_the_answer(tmp_path):
    problem = made_problem(tmp_path, "python")
    text = "\n    return max(numbers)<end>garbage"
    assert cut(text, problem, "fixtests", eos="<end>") == "def largest(numbers):\n    return max(numbers)"
    assert StopRule("python", "fixtests", "octocoder", "<end>").finished(text)
    assert not StopRule("python", "fixtests", "octocoder").finished(text)


def test_description_is_no_longer_than_the_docstring_and_holds_no_code(tmp_path):
    problem = made_problem(tmp_path, "go")
    text = "Is return numbers[len(numbers)-1] last. <|endoftext|>more"
    assert cut(text, problem, "explaindescribe") == "Is  last."
    assert len(cut("x" * 999, problem, "explaindescribe")) == len(problem.docstring)
    rule = StopRule("python", "explaindescribe", "octocoder")
    assert not rule.finished("Unindented prose") and rule.finished("It\nif so")


@pytest.mark.parametrize(
    ("task", "expected"), [("fixtests", "declaration"), ("fixdocs", "prompt"), ("explainsynthesize", "prompt")]
)
def test_faithful_answers_continue_what_the_reference_continues(task, expected, tmp_path):
    problem = made_problem(tmp_path, "js")
    assert cut("\n}", problem, task) == getattr(problem, expected).rstrip() + "\n}"


def test_java_without_its_last_braces_is_completed(tmp_path):
    problem = made_problem(tmp_path, "java")
    text = "\n        if (true) { return 1; }\n    }\n    public static void main(String[] args) { x("
    assert cut(text, problem, "fixtests").endswith("{ return 1; }\n    }\n    }")


def test_clean_mode_keeps_braces_in_strings_and_comments(tmp_path):
    problem = made_problem(tmp_path, "js")
    body = '\n  let s = "}"; // }\n  return s;\n}'
    assert cut(body, problem, "fixtests").endswith('\n  let s = "}')
    assert cut(body, problem, "fixtests", mode="clean") == problem.prompt.rstrip() + body


@pytest.mark.parametrize(
    ("language", "answer", "unused"),
    [
        ("python", "\n    return best(numbers)\n\ndef best(\n    values,\n):\n    return max(values)", "\n\ndef x():\n    pass"),
        ("go", "\n    return best(numbers)\n}\n\nfunc best(n []int) int {\n    return n[0]\n}", "\nfunc main() {}"),
        ("rust", "\n    best(numbers)\n}\n\nfn best(n: Vec<i32>) -> i32 {\n    n[0]\n}", "\nfn main(){}"),
        ("js", "\n  return best(numbers)\n}\n\nfunction best(n) {\n  return n[0]\n}", "\nfunction other() { best() }"),
        ("js", "\n  return best(numbers)\n}\n\nconst best = (n) => {\n  return n[0]\n}", "\n```\nBut {that} is all."),
        ("java", "\n        return new Best().of(numbers);\n    }\n}\n\nclass Best {\n}", "\n\nclass Main {\n}"),
        ("cpp", "\n    int best(int);\n    return best(1);\n}\n\nint best(int n) {\n    return n;\n}", "\nint main(){}"),
    ],
)  # fmt: skip
def test_clean_mode_keeps_later_functions_that_are_used(language, answer, unused, tmp_path):
    problem = made_problem(tmp_path, language)
    kept = cut(answer + "\n" + unused, problem, "fixtests", mode="clean")
    assert kept == problem.prompt.rstrip() + answer
    assert kept.count("best") + kept.count("Best") == answer.count("best") + answer.count("Best")


def test_clean_mode_keeps_helpers_of_helpers_in_their_order(tmp_path):
    problem = made_problem(tmp_path, "python")
    text = "\n    return a()\n\n\ndef b():\n    return 1\n\n\ndef a():\n    return b()\n\n\ndef largest(x):\n    return 0\n"
    answer = cut(text, problem, "synthesize", mode="clean")
    assert answer.endswith("\n    return a()\n\ndef b():\n    return 1\n\ndef a():\n    return b()")


def test_clean_mode_keeps_canonical_solutions_that_the_reference_cuts(shared_data):
    for language, number in [("go", 72), ("go", 90), ("go", 158), ("rust", 137), ("rust", 145)]:
        problem = load_problems(shared_data / "humanevalpack", language)[number]
        text = "\n" + problem.canonical_solution.lstrip("\n")

        def squeezed(text: str) -> str:
            return "".join(text.split())

        assert squeezed(cut(text, problem, "fixtests", mode="clean")) == squeezed(problem.prompt + text)
        assert squeezed(cut(text, problem, "fixtests")) != squeezed(problem.declaration + text)


def test_canonical_solutions_are_not_changed_by_clean_mode(shared_data):
    for language in LANGUAGES:
        for problem in load_problems(shared_data / "humanevalpack", language):
            text = "\n" + problem.canonical_solution.strip("\n")
            answer = cut(text, problem, "synthesize", mode="clean")
            rest = "".join((problem.prompt + text).split()).removeprefix("".join(answer.split()))
            assert rest in ("", "#undefNDEBUG#include<assert.h>"), problem.task_id


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("rust", "fn f<'a>(x: &'a str) { '{' }", "fn f<'a>(x: &'a str) {     }"),
        ("go", "`{` + '\\'' + '}' /* {\n */", "    +      +         \n   "),
        ("python", "'''{'''#}\nx = \"\\\"}\"", "         \nx =      "),
        ("cpp", 'R"(})" "a//b" // c', "                  "),
    ],
)
def test_comments_and_strings_are_blanked_in_place(language, text, expected):
    assert code_only(text, language) == expected


def test_unified_diff_of_an_answer_is_applied(tmp_path):
    problem = made_problem(tmp_path, "cpp")
    old, new = (problem.prompt + body for body in (problem.buggy_solution, problem.canonical_solution))
    lines = [*difflib.unified_diff(old.split("\n"), new.split("\n"), lineterm="")][2:]
    assert apply_hunks(old, "\n".join(lines) + "\n\\ No newline at end of file") == new
    assert apply_hunks(old, "@@ -1,1 +1,1 @@\n-not in it\n+x") == old
    assert apply_hunks(old, "") == ""
    text = " " + "\n".join(lines)
    assert cut(text, problem, "fixdocs", "diff-carper", mode="clean") == new


def test_faithful_mode_cuts_python_diffs_away_as_the_reference_does():
    patch = "@@ -1,3 +1,3 @@\n-min\n+max\n"
    assert diff_in(patch, "python", "diff") == ""
    assert diff_in(patch, "python", "diff", mode="clean") == patch.rstrip()


def test_patch_of_diff_match_patch_is_applied():
    pytest.importorskip("diff_match_patch")
    assert apply_patches("return min(x)", "\n@@ -4,10 +4,10 @@\n urn \n-min\n+max\n (x)\n") == "return max(x)"
    assert apply_patches("return min(x)", "not a patch") == ""


def test_unknown_style_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="style 'chat': unknown"):
        cut("", made_problem(tmp_path, "go"), "fixtests", "chat")
