"""The rules of the house that a machine can check: imports, file lengths, the README's commands.

The import graph counts every import statement: at the top of a file, inside a function and under
TYPE_CHECKING.
"""

import ast
import functools
import graphlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.specifiers import SpecifierSet

from megatron_ft import __version__

PACKAGE = "megatron_ft"
PROGRAMS = ("dataset", "preprocess", "launch", "convert", "evaluation", "bench", "examples")

# Rooms of the package, lowest first: a room imports itself and the rooms before it.
LAYERS = (
    "printable", "called_as", "errors", "extras", "progress", "files", "model", "config", "tokenizer", "commits", "prompts",
    "conversations", "mixing", "data", "tokenizing", "weights", "evaluation", "checkpoint", "metrics", "training", "engine",
    "run", "finetune", "hf_engine", "launcher", "conversion", "publishing", "api", "cli",
)  # fmt: skip
# Arrows that stay forbidden wherever a room moves in LAYERS.
FORBIDDEN = {
    **dict.fromkeys(("data", "files", "model", "tokenizer", "commits", "evaluation"), {"engine"}),
    "weights": {"engine", "checkpoint"},
}
# `weights` knows no process group: of torch.distributed it may use only the checkpoint format.
DISTRIBUTED = ("torch.distributed", "megatron.core.parallel_state", "megatron.core.tensor_parallel")
FILE_FORMAT = "torch.distributed.checkpoint"

MAX_LINES = {"bench": 450, "tests": 450}  # 400 elsewhere
SOURCES = {".py", ".cpp", ".h", ".sh"}


def sources(root: Path, *folders: str) -> list[Path]:
    """Python files of these folders of the checkout, sorted."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_names(path: Path, module: str) -> frozenset[str]:
    """Absolute dotted names that a file imports; `from a import b` gives both `a` and `a.b`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    return names_in(path.read_text(encoding="utf-8"), tuple(package))


@functools.cache
def names_in(code: str, package: tuple[str, ...]) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return frozenset(names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def file_graph(root: Path) -> dict[str, set[str]]:
    """{module: modules of the package it imports}, with the `__init__` files an import runs."""
    modules = {module_name(path, root): path for path in sources(root, PACKAGE)}
    graph = {}
    for module, path in modules.items():
        imported = {name for name in imported_names(path, module) if name in modules}
        parts = [name.split(".") for name in imported]
        imported |= {".".join(names[:n]) for names in parts for n in range(1, len(names))}
        graph[module] = {name for name in imported if not within(module, name)}
    return graph


def folder_graph(files: dict[str, set[str]]) -> dict[str, set[str]]:
    """{folder: folders it imports}; a file directly in the package is a folder of its own."""

    def folder(module: str) -> str:
        return module if module.count(".") < 2 else module.rpartition(".")[0]

    graph: dict[str, set[str]] = {}
    for module, imported in files.items():
        here = folder(module)
        targets = {folder(name) for name in imported}
        graph.setdefault(here, set()).update(t for t in targets if not within(t, here) and not within(here, t))
    return graph


def cycles(graph: dict[str, set[str]], kind: str) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"{kind} cycle: {' -> '.join(reversed(error.args[1]))}"]
    return []


def room(module: str) -> str:
    return module.split(".")[1]


def wrong_arrows(files: dict[str, set[str]]) -> list[str]:
    """Imports that go up in LAYERS, and rooms that LAYERS does not name."""
    found = []
    for module, imported in files.items():
        if module == PACKAGE:
            continue
        if room(module) not in LAYERS:
            found.append(f"unknown room: {module}; add it to LAYERS")
            continue
        for name in imported - {PACKAGE}:
            if room(name) in FORBIDDEN.get(room(module), ()):
                found.append(f"forbidden arrow: {module} -> {name}")
            elif room(name) in LAYERS and LAYERS.index(room(name)) > LAYERS.index(room(module)):
                found.append(f"upward arrow: {module} -> {name}")
    return found


def process_groups(root: Path) -> list[str]:
    """Files of `weights` that import something which needs a process group."""
    found = []
    for path in sources(root, f"{PACKAGE}/weights"):
        module = module_name(path, root)
        for name in imported_names(path, module):
            if any(within(name, package) for package in DISTRIBUTED) and not within(name, FILE_FORMAT):
                found.append(f"process group: {module} -> {name}")
    return found


def program_arrows(root: Path) -> list[str]:
    """Programs that import a program, and files of the package that do."""
    programs = {module_name(path, root): path for path in sources(root, *PROGRAMS)}
    found = []
    for module, path in programs.items():
        siblings = {other.stem for other in path.parent.glob("*.py")} - set(sys.stdlib_module_names)
        for name in imported_names(path, module):
            if name.split(".")[0] in PROGRAMS or name in siblings:
                found.append(f"program imports program: {module} -> {name}")
    for path in sources(root, PACKAGE):
        module = module_name(path, root)
        for name in imported_names(path, module):
            if name.split(".")[0] in PROGRAMS:
                found.append(f"package imports program: {module} -> {name}")
    return found


def violations(root: Path) -> list[str]:
    """Everything wrong with the imports of a checkout, one line per finding."""
    files = file_graph(root)
    assert files, f"{root}: no package {PACKAGE}"
    return [
        *cycles(files, "file"),
        *cycles(folder_graph(files), "folder"),
        *wrong_arrows(files),
        *process_groups(root),
        *program_arrows(root),
    ]


def test_imports_form_no_cycle_and_only_go_down():
    assert violations(ROOT) == []


def test_layers_name_each_room_once():
    assert len(set(LAYERS)) == len(LAYERS)


PLANTED = {
    "file cycle: ": [
        {"data/planted.py": "import megatron_ft.data.planted_too", "data/planted_too.py": "from . import planted"},
        {"data/indexed.py": "def later():\n    from megatron_ft.data import packing"},
        {"data/indexed.py": "if TYPE_CHECKING:\n    from .packing import Packing"},
        {"errors.py": "import megatron_ft.errors_too", "errors_too.py": "from megatron_ft.errors import UserError"},
    ],
    "folder cycle: ": [
        {"model/planted.py": "import megatron_ft.data.planted", "data/planted.py": "import megatron_ft.model.shape"},
        {"errors.py": "import megatron_ft.config", "config/__init__.py": "from megatron_ft.errors import UserError"},
    ],
    "upward arrow: megatron_ft.": [
        {"errors.py": "from megatron_ft import progress"},
        {"metrics/planted.py": "def later():\n    from ..engine.loss import token_losses"},
    ],
    "forbidden arrow: megatron_ft.": [
        {"data/planted.py": "from megatron_ft.engine import loss"},
        {"weights/planted.py": "from megatron_ft import checkpoint"},
    ],
    "process group: megatron_ft.weights.": [
        {"weights/planted.py": "import torch.distributed as dist"},
        {"weights/planted.py": "from torch import distributed"},
        {"weights/planted.py": "import torch\nrank = torch.distributed.get_rank()"},
        {"weights/planted.py": "from megatron.core import parallel_state"},
    ],
    "unknown room: megatron_ft.utils.planted": [{"utils/planted.py": ""}],
    "program imports program: launch.planted": [
        {"../launch/planted.py": "import convert.verify"},
        {"../launch/planted.py": "from plan import main"},
    ],
    "package imports program: megatron_ft.files.planted": [{"files/planted.py": "from preprocess.view import main"}],
}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the Python files, free to be changed."""
    for path in sources(ROOT, PACKAGE, *PROGRAMS):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path


@pytest.mark.parametrize(
    ("expected", "files"), [(expected, files) for expected, cases in PLANTED.items() for files in cases]
)
def test_planted_violation_is_found(expected, files, checkout):
    before = set(violations(checkout))
    for name, code in files.items():
        path = checkout / PACKAGE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + f"\n{code}\n")
    found = set(violations(checkout)) - before
    assert [line for line in found if line.startswith(expected)], found


SHOW_HELP = """
import contextlib, io, runpy, sys
sys.path[0], sys.argv = "", [sys.argv[1], "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_path(sys.argv[0], run_name="__main__")
print(*sorted({"torch", "megatron", "transformers"} & set(sys.modules)))
"""
FOLDERS = ("dataset", "preprocess", "launch", "convert", "evaluation")
WITH_FLAGS = [path for path in sources(ROOT, *FOLDERS) if path.name != "rank.py"]


@pytest.mark.parametrize("program", WITH_FLAGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_are_parsed_before_torch_is_loaded(program):
    command = [sys.executable, "-c", SHOW_HELP, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"{program.name} --help loads {done.stdout}"


def test_no_file_is_named_after_a_layer():
    layers = {"utils", "helpers", "common", "misc"}
    assert not [path for path in sources(ROOT, PACKAGE, *PROGRAMS, "tests") if path.stem in layers]


# One table in one file: splitting it would hide which flags there are.
LONG = {"megatron_ft/config/flags.py"}


def test_no_file_is_too_long():
    folders = (PACKAGE, *PROGRAMS, "slurm", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in paths}
    assert not {str(path): n for path, n in lines.items() if n > MAX_LINES.get(path.parts[0], 400)}.keys() - LONG


def test_every_file_has_a_docstring():
    files = [path for path in sources(ROOT, PACKAGE, *PROGRAMS) if path.name != "__init__.py" or path.read_text()]
    assert not [path for path in files if not ast.get_docstring(ast.parse(path.read_text()))]


def test_text_files_are_opened_with_an_encoding():
    """Where ruff's PLW1514 does not see that an object is a Path."""
    found = []
    for path in sources(ROOT, PACKAGE, *PROGRAMS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                encoding_at = {"read_text": 0, "write_text": 1}.get(node.func.attr, len(node.args) - 1)
                if len(node.args) <= encoding_at and "encoding" not in {keyword.arg for keyword in node.keywords}:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_readme_shows_the_commands_that_ci_runs():
    shown = re.findall(r"^    (make \w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    ci = (ROOT / ".ci/run").read_text().splitlines()
    assert shown == ["make demo", "make test"]
    assert set(shown) <= set(ci)


def test_readme_links_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower(): version for name, version in pins}


def test_pre_commit_uses_the_pinned_versions():
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        tool = repo["hooks"][0]["id"]
        if tool in ("ruff", "codespell"):
            assert repo["rev"] == f"v{constraints()[tool]}"


def test_every_direct_dependency_is_pinned():
    names = {re.match(r"[\w-]+", line)[0].lower() for line in importlib.metadata.requires("megatron-ft")}
    assert names - set(constraints()) == {"transformer-engine"}  # follows the machine's CUDA


def test_pinned_versions_install_on_debians_python():
    """Debian 12 has 3.11.2, and some packages ask for a later 3.11."""
    for name, version in constraints().items():
        try:
            installed = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        if installed["Version"].partition("+")[0] != version:
            continue  # of another Megatron-Core (make test CORE=...)
        needed = installed.get("Requires-Python")
        assert SpecifierSet(needed or "").contains("3.11.2"), f"{name} needs Python {needed}; pin an older version"


def test_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
