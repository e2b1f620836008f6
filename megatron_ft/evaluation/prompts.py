"""HumanEvalPack's prompts: what a model is asked, by task and by the style it was trained on.

The texts are those of the reference (bigcode-evaluation-harness), to the character: scores of
different prompts cannot be compared. Every prompt ends without white space, so that the model
generates the line break before the body.
"""

from collections.abc import Callable

from megatron_ft.errors import UserError
from megatron_ft.evaluation.problems import LANGUAGES, Problem
from megatron_ft.prompts import commit_prompt, question_prompt

# fixtests: fix the bug, given the tests; fixdocs: given the docstring. explaindescribe: describe
# the code; explainsynthesize: write it again from that description. synthesize: from the docstring.
TASKS = ("fixtests", "fixdocs", "explaindescribe", "explainsynthesize", "synthesize")
EXTENSIONS = {"python": "py", "cpp": "cpp", "js": "js", "java": "java", "go": "go", "rust": "rs"}
RUST_MAIN = "fn main(){}\n"  # in the dataset's prompts, not in its declarations

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Response:"
)
DEEPSEEK = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n### Instruction:\n{}\n### Response:\n"
)


def _tulu(question: str, start: str) -> str:
    return f"<|user|>\n{question}\n<|assistant|>\n{start}"


def _chatml(question: str, start: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{start}"


# Of every task: (instruction and context, start of the answer) to the prompt.
STYLES: dict[str, Callable[[str, str], str]] = {
    "octocoder": lambda question, start: f"{question_prompt(question)}\n{start}",
    "octogeex": lambda question, start: f"{question_prompt(question.strip())}\n{start}",
    "instruct": lambda question, start: f"{question}\n\n{start}",
    "continue": lambda question, start: start,
    "starcodercommit": lambda question, start: commit_prompt("", question) + start,
    "starchat": lambda question, start: f"<|system|>\n<|end|>\n<|user|>\n{question}<|end|>\n<|assistant|>\n{start}",
    "starchat2": _chatml,
    "wizardcoder": lambda question, start: f"{ALPACA.format(question)}\n{start}",
    "instructcodet5p": lambda question, start: ALPACA.format(question) + start,
    "aurora-m": lambda question, start: f"### Instruction:\n{question}\n### Response:\n{start}",
    "codegemma": lambda question, start: f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{start}",
    "codellama": lambda question, start: f"[INST] {question.strip()} [/INST] {start}",
    "codellama-70b": lambda question, start: (
        f"Source: user\n\n {question.strip()} Source: assistant\nDestination: user \n\n{start}"
    ),
    "codeqwen": _chatml,
    "deepseek": lambda question, start: DEEPSEEK.format(question.strip()) + start,
    "gritlm": _tulu,
    "tulu": _tulu,
    "yi": _chatml,
    "zephyr": lambda question, start: f"<|user|>\n{question}</s>\n<|assistant|>\n{start}",
}
CONTEXT_FIRST = ("instruct", "continue")  # other styles put the instruction before the context

# Of the fix tasks: (buggy code and its tests, instruction, start, file name) to the prompt.
FIX_STYLES: dict[str, Callable[[str, str, str, str], str]] = {
    "starcodercommit": lambda context, instruction, start, file: commit_prompt(context, instruction) + start,
    "diff": lambda context, instruction, start, file: commit_prompt(context, instruction),
    "diff-carper": lambda context, instruction, start, file: (
        f"<NME> {file}\n<BEF> {context}\n<MSG> {instruction}\n<DFF>"
    ),
    "file": lambda context, instruction, start, file: (
        f"<file_name>\n{file}\n<commit_before>\n{context}\n<commit_msg>\n{instruction}<commit_after>\n{start}"
    ),
    "issue": lambda context, instruction, start, file: (
        f"<issue_start>username_0: {instruction}\n\n```{context}```\nUpvotes: 100"
        f"<issue_comment>username_1: Sure, here is the fixed code.\n\n```{start}"
    ),
}


def prompt_of(problem: Problem, task: str, style: str, description: str | None = None) -> str:
    """The exact text that the model reads. `description` is the model's own answer to
    explaindescribe, which explainsynthesize needs.

    Raises UserError if the task or the style is unknown, or the style is not one of the task.
    """
    check_style(task, style)
    start = start_of(problem, task)
    instruction, context = _question(problem, task, start, description)
    if task in ("fixtests", "fixdocs") and style in FIX_STYLES:
        file = f"{problem.entry_point}.{EXTENSIONS[problem.language]}"
        assert context is not None
        return FIX_STYLES[style](context, instruction, start, file).strip()
    if context is None:
        question = instruction
    else:
        question = "\n".join([context, instruction] if style in CONTEXT_FIRST else [instruction, context])
    return STYLES[style](question, "" if task == "explaindescribe" else start).strip()


def start_of(problem: Problem, task: str) -> str:
    """The start of the function, which the answer continues: with comment where the task gives it,
    so for fixdocs and synthesize."""
    if task in ("fixdocs", "synthesize"):
        return problem.prompt
    return (RUST_MAIN if problem.language == "rust" else "") + problem.declaration


def _question(problem: Problem, task: str, start: str, description: str | None) -> tuple[str, str | None]:
    """Instruction and context; None for no context."""
    if task in ("fixtests", "fixdocs"):
        context = start + problem.buggy_solution + (f"\n{problem.test}" if task == "fixtests" else "")
        return f"Fix bugs in {problem.entry_point}.", context
    if task == "explaindescribe":
        limit = len(problem.docstring)
        instruction = f"Provide a concise natural language description of the code using at most {limit} characters."
        return instruction, start + problem.canonical_solution
    if task == "explainsynthesize":
        if description is None:
            raise UserError(f"{problem.task_id}: explainsynthesize needs a description; run explaindescribe first")
        return f"Write functional code in {LANGUAGES[problem.language]} according to the description.", description
    return problem.instruction.strip(), None


def check_style(task: str, style: str) -> None:
    """Raise UserError if a task or style is unknown, or the style is not one of the task."""
    check_task(task)
    if style not in STYLES and style not in FIX_STYLES:
        known = ", ".join(dict.fromkeys([*STYLES, *FIX_STYLES]))
        raise UserError(f"style {style!r}: unknown; one of {known}")
    if style == "continue" and task != "synthesize":
        raise UserError(f"style 'continue' has no place for an instruction: for synthesize only, not {task}")
    if style not in STYLES and not task.startswith("fix"):
        raise UserError(f"style {style!r} is for fixtests and fixdocs only, not {task}; one of {', '.join(STYLES)}")


def check_task(task: str) -> None:
    """Raise UserError if HumanEvalPack does not have a task."""
    if task not in TASKS:
        raise UserError(f"task {task!r}: unknown; one of {', '.join(TASKS)}, explain")


def parse_tasks(names: str) -> list[str]:
    """The tasks of a flag, in the order given; explain stands for its two parts.

    >>> parse_tasks("fixtests,explain")
    ['fixtests', 'explaindescribe', 'explainsynthesize']
    """
    both = ["explaindescribe", "explainsynthesize"]
    given = [name.strip() for name in names.split(",")]
    tasks = list(dict.fromkeys(task for name in given for task in (both if name == "explain" else [name])))
    for task in tasks:
        check_task(task)
    return tasks
