"""Prompts, answers and programs are the reference's, to the character: digests over all problems.

The digests were computed with bigcode-evaluation-harness itself: the first 16 hex digits of sha256
over the JSON of the list of 164 texts.
"""

import hashlib
import json

import pytest
from made_problems import DOCSTRING, made_problem

from megatron_ft.errors import UserError
from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.problems import LANGUAGES, load_problems
from megatron_ft.evaluation.programs import program_of
from megatron_ft.evaluation.prompts import FIX_STYLES, STYLES, TASKS, check_style, parse_tasks, prompt_of
from megatron_ft.prompts import COMMIT_FORMATS

PROMPT_DIGESTS = """
fixtests octocoder a56323ceb2d84696 bee8e1d0df62282b c32a30b70857bd02 ad36dcd5c4bc4ec0 109b111092554349 78eeafd30b37f176
fixtests instruct 42cf167469cc1501 a5b09a6cd38b56c5 6d05acd791148f3c 2633ecc15d9ffe2e 1e0742cfb9e573f2 0e358457ad9c7be1
fixtests starcodercommit f7882fd3403e4642 c9eab5b648991733 530c9b636ad564e2 21f5b3a775694d7f 84925701b447df64 169a1279fcfa2fd0
fixdocs octocoder b2c14c871a3ea5c3 b3e5a9a9fd6c252b 64edca8d86a40953 65cd1078a8b42d67 06a95ea5c11cedfc cee0a327f6ee4f67
fixdocs instruct 2236b273af8e9d03 73d9a3d9dfa55fd7 a2f8f480d2d764dd 00f4db00294bb8f8 bee7286d11f91bc5 166a1dd78161eae2
fixdocs starcodercommit b91a1fd233d25ce0 df13e44877b942f3 1051c7960662bba7 a474b782daf3a24b 97bf77258fedc38a f631d4110c6731ac
explaindescribe octocoder e3254868771fd56f 34bdb8bc6105a2b2 e963ed16c7b7ce7d ed0a4fd1dea77674 47c8c05cd33fab00 f7773fd0c8008dc0
explaindescribe instruct e02aae0a7e824ffc 3f82d11a497ac160 c08d6f775d9283a8 9ef1fa32189dd868 880f0772f031f32a f33ac509bec2e735
explaindescribe starcodercommit 197bd9393ccc5324 9ab91e8d4db10368 4879f8aa1e8c182b a20d553ce37f7438 ff2395de0bc073be fe6a9d27431b5bf9
synthesize octocoder a6db98151b23e676 795a2d905e565ce1 08a108755469d581 1d8afd3608269a2a 97882e9796ec9cef 30ca2ee5f86f1533
synthesize instruct caf57e39ea17f319 6201351f0c215a84 19e4fd47efe667c5 bdc3923995b1514d 012cf996c6a816a4 1d3863944189874c
synthesize starcodercommit 50820343652505f5 0a697cfeade9fc3e b12839889729aeac 220286dc1df856c1 3c166c2e7e543a37 a39d74197ae5a822
synthesize continue 17c71e03fc1ecd17 69b9fda2f0d4c765 16dfa3a5093cb7dc 0f9d4700909fcf2a 6206c12cff927143 febf5d4bc2ba466a
explainsynthesize octocoder aa204bc9190a172b e4d175541c44b91a 1f786430f7a6574e 400300e4abba92fc cdd0dc6fbb873283 b1f258bd5a9d7e50
"""
ANSWER_DIGESTS = """
fixtests octocoder ae54138d6f427324 6b8c8c254f253b33 11f01315a4889636 5183e5ae7dd096ac 7168c17f638d8c0d 9b8da74c7f9c7cc8
synthesize octocoder c1d390bc45a7d63d 2aca481af3d2a140 6ca93ff8044a8d93 6fe1dd172c928f71 9bf071bf023cc6cd 016f3ce7719282d9
explaindescribe octocoder 720f39bc6667e47c 2098226ce8837041 ee38f3e4287f7ff3 f49115fedab566af e9db8bc33a330392 4925d21ed0640683
"""
PROGRAM_DIGESTS = """
fixtests octocoder ca13ba23e2b19b33 74c760387d7c1c3b d76e387965561483 aa11be69153e3627 52ec562509f57c4f 28e67df37e1dc321
synthesize octocoder 217f88a09c893054 a33e2b33a516ae5d 725b6cdf380d7b35 0d5cc3908d245a10 83d6814cc2095519 e6a2d8a30750d6e3
"""
AFTER_THE_FUNCTION = {
    "python": "\n\ndef other():\n    pass\n",
    "cpp": "\nint other(){return 1;}\n",
    "js": "\nconst other = 1;\n",
    "java": "\nclass Other {}\n",
    "go": "\nfunc other() {}\n",
    "rust": "\nfn other(){}\n",
}


def table(text: str) -> list[tuple[str, str, str, str]]:
    rows = [line.split() for line in text.strip().splitlines()]
    return [(row[0], row[1], language, row[2 + i]) for row in rows for i, language in enumerate(LANGUAGES)]


def digest(texts: list) -> str:
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def problems(shared_data) -> dict:
    return {language: load_problems(shared_data / "humanevalpack", language) for language in LANGUAGES}


def answers(problems, task, style) -> list[str]:
    """The answers cut from texts that continue after the function."""
    if task == "explaindescribe":
        texts = [f"\nThis code: {p.canonical_solution} END {p.docstring}<|endoftext|>" for p in problems]
    else:
        texts = [
            "\n" + p.canonical_solution.lstrip("\n") + AFTER_THE_FUNCTION[p.language] + "<|endoftext|>"
            for p in problems
        ]
    return [cut(text, problem, task, style) for text, problem in zip(texts, problems, strict=True)]


@pytest.mark.parametrize(("task", "style", "language", "expected"), table(PROMPT_DIGESTS))
def test_prompts_are_the_reference_s(task, style, language, expected, problems):
    prompts = [prompt_of(p, task, style, description=p.docstring) for p in problems[language]]
    assert digest(prompts) == expected


@pytest.mark.parametrize(("task", "style", "language", "expected"), table(ANSWER_DIGESTS))
def test_answers_are_the_reference_s(task, style, language, expected, problems):
    found = answers(problems[language], task, style)
    assert digest(found if task == "explaindescribe" else [[answer] for answer in found]) == expected


@pytest.mark.parametrize(("task", "style", "language", "expected"), table(PROGRAM_DIGESTS))
def test_programs_are_the_reference_s(task, style, language, expected, problems):
    found = answers(problems[language], task, style)
    sources = [program_of(p, task, answer).source for p, answer in zip(problems[language], found, strict=True)]
    # The reference writes Go's imports in the random order of a set.
    assert digest([sorted(source.split("\n")) for source in sources] if language == "go" else sources) == expected


# Of the styles that the tables above leave out: (Python's) prompts of fixtests and synthesize.
OTHER_STYLES = {
    "octogeex": "Question: {}\n\nAnswer:\n",
    "starchat": "<|system|>\n<|end|>\n<|user|>\n{}<|end|>\n<|assistant|>\n",
    "starchat2": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<|user|>\n{}</s>\n<|assistant|>\n",
    "tulu": "<|user|>\n{}\n<|assistant|>\n",
    "codellama": "[INST] {} [/INST] ",
    "codegemma": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "aurora-m": "### Instruction:\n{}\n### Response:\n",
}


@pytest.mark.parametrize("style", OTHER_STYLES)
def test_chat_styles_frame_instruction_and_start(style, tmp_path):
    problem = made_problem(tmp_path, "python")
    expected = OTHER_STYLES[style].format(problem.instruction) + problem.prompt
    assert prompt_of(problem, "synthesize", style) == expected.strip()


def test_fix_styles_hold_the_buggy_code(tmp_path):
    problem = made_problem(tmp_path, "js")
    code = problem.declaration + problem.buggy_solution + "\n" + problem.test
    diff = prompt_of(problem, "fixtests", "diff-carper")
    assert diff == f"<NME> largest.js\n<BEF> {code}\n<MSG> Fix bugs in largest.\n<DFF>"
    issue = prompt_of(problem, "fixtests", "issue")
    assert issue.startswith(f"<issue_start>username_0: Fix bugs in largest.\n\n```{code}```\nUpvotes: 100")


@pytest.mark.parametrize("language", LANGUAGES)
def test_prompts_end_without_white_space_and_rust_has_one_main(language, tmp_path):
    problem = made_problem(tmp_path, language)
    for task in TASKS:
        for style in dict.fromkeys([*STYLES, *FIX_STYLES]):
            try:
                check_style(task, style)
            except UserError:
                continue
            prompt = prompt_of(problem, task, style, description=DOCSTRING)
            assert prompt == prompt.strip()
    assert prompt_of(problem, "synthesize", "octocoder").count("fn main(){}") == (language == "rust")
    assert prompt_of(problem, "fixtests", "octocoder").count("fn main(){}") == 2 * (language == "rust")


def test_evaluation_reads_the_format_that_training_wrote(tmp_path):
    problem = made_problem(tmp_path, "python")
    start = problem.prompt.rstrip()
    old = problem.prompt + problem.buggy_solution
    inputs, _ = COMMIT_FORMATS["starcoder"](old, "", "Fix bugs in largest.")
    assert prompt_of(problem, "fixdocs", "starcodercommit") == inputs + start


@pytest.mark.parametrize(
    ("task", "style", "message"),
    [
        ("fix", "octocoder", "task 'fix': unknown; one of fixtests, fixdocs"),
        ("fixtests", "prompt", "style 'prompt': unknown; one of octocoder, octogeex"),
        ("fixtests", "continue", "style 'continue' has no place for an instruction: for synthesize only, not fixtests"),
        ("synthesize", "diff", "style 'diff' is for fixtests and fixdocs only, not synthesize"),
        ("explainsynthesize", "octocoder", "explainsynthesize needs a description; run explaindescribe first"),
    ],
)
def test_unknown_tasks_and_styles_are_one_line(task, style, message, tmp_path):
    with pytest.raises(UserError) as error:
        prompt_of(made_problem(tmp_path, "python"), task, style)
    assert message in str(error.value)


def test_unknown_task_in_a_list_is_named():
    assert parse_tasks("synthesize,explain") == ["synthesize", "explaindescribe", "explainsynthesize"]
    with pytest.raises(UserError, match="task 'explains': unknown"):
        parse_tasks("fixtests,explains")
