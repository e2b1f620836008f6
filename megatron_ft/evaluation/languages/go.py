"""Go programs: one file of package main that `go test` builds, with the imports it uses."""

import re
from collections.abc import Iterable, Sequence

from megatron_ft.evaluation.lexing import code_only
from megatron_ft.evaluation.problems import Problem

PACKAGE = "package main"
# Packages that answers may use without importing them. Source: the reference.
KNOWN = ("math", "strings", "fmt", "strconv", "time", "bytes", "regexp", "sort", "math/rand", "crypto/md5")
IMPORT = re.compile(r"^import\s*(?:\((?P<several>[^)]*)\)|(?P<one>[^\n]*))", re.MULTILINE)
# `alias "path"`; the alias is optional.
IMPORTED = re.compile(r'(?:([\w.]+)[ \t]+)?"([^"\n]+)"')
WRITE_NONCE = """
func TestMain(tests *testing.M) {{
    if tests.Run() == 0 {{
        humanevalOS.Stdout.WriteString("\\n{}\\n")
    }} else {{
        humanevalOS.Exit(1)
    }}
}}
"""


def faithful(problem: Problem, answer: str, earlier: Sequence[str]) -> str:
    """The answer after the imports of the tests and of known packages that are used.

    As in the reference, an import that an answer has, too, is removed from the tests' imports, also
    for all later answers to the same problem: `earlier` are the answers before this one.
    """
    setup = f"{problem.test_setup}\n"
    for text in [*earlier, answer]:
        setup = _without_imports_of(setup, text)
    whole = f"{setup}{answer}\n\n{problem.test}"
    used = [f'"{name}"' for name in map(_last_part, _missing(whole)) if _is_used(name, whole)]
    block = "import (\n" + "\n".join(f"    {name}" for name in sorted(used)) + "\n)\n" if used else ""
    if PACKAGE in answer and PACKAGE in setup:
        answer = answer.replace(PACKAGE, "")
    return setup + block + answer


def _without_imports_of(setup: str, answer: str) -> str:
    for line in setup.split("\n"):
        line = re.sub(r"import|[()]", "", line).strip()
        if line.startswith('"') and line in answer:
            setup = setup.replace(line, "")
    return setup


def _missing(program: str) -> list[str]:
    return [package for package in KNOWN if f'"{package}"' not in program]


def _last_part(package: str) -> str:
    return package.rpartition("/")[2]


def _is_used(name: str, program: str) -> bool:
    """Whether `name.` occurs in a line that is not a comment."""
    return any(f"{name}." in line and not line.strip().startswith("//") for line in program.split("\n"))


def clean(problem: Problem, answer: str) -> str:
    """The answer after one import block of what it and the tests use, and nothing else.

    `import humanevalOS "os"` is for `proving`.
    """
    imports = dict(_imports([problem.test_setup, answer]))
    body = IMPORT.sub("", answer.replace(PACKAGE, ""))
    code = code_only(f"{body}\n{problem.test}", "go")
    known = {_last_part(package): package for package in KNOWN}
    wanted = {**known, **imports}
    used = {name: path for name, path in wanted.items() if name in "_." or re.search(rf"(?<![\w.]){name}\.", code)}
    used |= {"testing": "testing", "humanevalOS": "os"}
    lines = [f'    "{path}"' if name == _last_part(path) else f'    {name} "{path}"' for name, path in used.items()]
    return f"{PACKAGE}\n\nimport (\n" + "\n".join(sorted(lines)) + f"\n)\n\n{body.strip()}"


def _imports(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Name and path of what the texts import."""
    blocks = [match["several"] or match["one"] or "" for text in texts for match in IMPORT.finditer(text)]
    found = [pair for block in blocks for pair in IMPORTED.findall(re.sub(r"//[^\n]*", "", block))]
    return [(alias or _last_part(path), path) for alias, path in found]


def proving(test: str, nonce: str) -> str:
    """The tests, and a TestMain that writes the nonce once all have passed."""
    return test + WRITE_NONCE.format(nonce)
