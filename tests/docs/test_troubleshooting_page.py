"""Each message that docs/troubleshooting.md quotes is one that the sources print."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("megatron_ft", "dataset", "preprocess", "launch", "convert", "evaluation")
BLANK = "\0"  # what an f-string fills in


def texts_of(code: str) -> list[str]:
    """The string literals of Python code without docstrings; adjacent ones are one, BLANK stands
    for each {value}."""

    def text(node: ast.AST) -> str:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        return "".join(part.value if isinstance(part, ast.Constant) else BLANK for part in parts)

    nodes = list(ast.walk(ast.parse(code)))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    literals = [n for n in nodes if isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", None), str)]
    return [text(literal) for literal in literals if literal not in docstrings]


def texts_of_sources() -> str:
    code = [path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    python = [text for file in code for text in texts_of(file)]
    shell = [path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.sh")]
    return "\n".join([*python, *(line for file in shell for line in file.splitlines())])


def quoted(page: Path) -> list[str]:
    """The first column of the page's tables."""
    return re.findall(r"^\| `(.+?)` \|", page.read_text(encoding="utf-8"), flags=re.MULTILINE)


def expression(message: str) -> str:
    """A message as a regular expression: `...` matches anything within one literal."""
    return ".*?".join(re.escape(part.strip()) for part in message.split("..."))


MESSAGES = quoted(ROOT / "docs/troubleshooting.md")


@pytest.fixture(scope="module")
def sources() -> str:
    return texts_of_sources()


def test_each_quoted_message_is_printed_somewhere(sources):
    assert len(MESSAGES) > 30
    unknown = [message for message in MESSAGES if not re.search(expression(message), sources)]
    assert not unknown, "no program prints these any more"


def test_a_message_that_nothing_prints_is_found(sources):
    assert not re.search(expression("--num-processes ...: there are ... GPUs, and nobody takes them"), sources)
    assert re.search(expression("are ... GPUs"), f"there are {BLANK} GPUs")
    assert not re.search(expression("are ... GPUs"), "there are\nGPUs")
