"""Rules of the house that a machine can check: arrows go one way, no file named after a layer, the README's commands are CI's."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAMS = ("preprocess", "launch", "convert", "bench", "examples")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "megatron_ft").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_one_way(path):
    names = imported(path)
    assert not [n for n in names if n.split(".")[0] in PROGRAMS], "the package imports no program"
    if path.parent.name in ("data", "checkpoint"):
        assert not [n for n in names if n.startswith("megatron_ft.engine")], (
            "data and checkpoint know nothing of the engine"
        )
    if path.parent.name == "data":
        assert not [n for n in names if n.startswith("megatron_ft.checkpoint")]


def test_no_file_is_named_after_a_layer():
    layers = {"utils", "helpers", "common", "misc"}
    sources = [p for folder in ("megatron_ft", *PROGRAMS, "tests") for p in (ROOT / folder).rglob("*.py")]
    assert not [p for p in sources if p.stem in layers]


def test_readme_shows_the_commands_that_ci_runs():
    shown = re.findall(r"^    (make \w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    ci = (ROOT / ".ci/run").read_text().splitlines()
    assert shown == ["make demo", "make test"]
    assert set(shown) <= set(ci)


def test_readme_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
