"""Python programs run in the interpreter of this process, with numpy."""

import importlib.util
import os
import platform
import re
import sys

from megatron_ft.evaluation.languages.python import IMPORTS
from megatron_ft.evaluation.sandbox.sandbox import ToolchainError
from megatron_ft.evaluation.toolchains.toolchain import Toolchain

COMPLETED = 88
# As the reference runs programs: by exec, with empty globals. A program that ends early, by
# SystemExit or os._exit, has not completed. Without `site` (-S), which the reference's own
# environment would bring, there is no exit() or quit(); the reference removes them, too.
DRIVER = f"""\
import os, sys
sys.path.append(sys.argv.pop())
with open("program.py", "rb") as file:
    code = file.read()
exec(compile(code, "program.py", "exec"), {{}})
try:
    sys.stdout.flush()
    sys.stderr.flush()
except Exception:
    pass
os._exit({COMPLETED})
"""
NUMPY_IMPORTS = "import numpy\nimport numpy as np\n"
# What may mean numpy: its names, and what finds names at run time.
MAY_USE_NUMPY = re.compile(
    r"\bnp\b|numpy|\b(?:exec|eval|globals|locals|vars|modules|__dict__|import_module|__import__)\b(?!\(\"os\"\))"
)


def without_unused_numpy(source: str) -> str:
    """The program without the import of numpy, half of its time, if it cannot use numpy. Lines keep
    their numbers."""
    body = source.removeprefix(IMPORTS)
    if body == source or MAY_USE_NUMPY.search(body):
        return source
    return IMPORTS.replace(NUMPY_IMPORTS, "\n\n") + body


def find() -> Toolchain:
    """Raises ToolchainError if numpy is missing."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        raise ToolchainError("numpy: not found; install it with pip install numpy")
    from numpy import __version__ as numpy_version

    packages = os.path.dirname(os.path.dirname(os.path.realpath(spec.origin)))
    python = os.path.realpath(sys.executable)
    return Toolchain(
        language="python",
        version=f"Python {platform.python_version()}, numpy {numpy_version}",
        files=lambda source: {"program.py": without_unused_numpy(source).encode("utf-8", "surrogatepass")},
        compile=(),
        run=(python, "-I", "-S", "-B", "-c", DRIVER, packages),
        completed=COMPLETED,
        readable=(sys.base_prefix, packages),
    )
