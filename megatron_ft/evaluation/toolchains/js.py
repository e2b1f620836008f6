"""JavaScript programs run in node, with js-md5."""

import os
from pathlib import Path

from megatron_ft.evaluation.sandbox.sandbox import ToolchainError
from megatron_ft.evaluation.toolchains.toolchain import Toolchain, find_command, output_of, prefix_of, source_file

MODULE = "js-md5"


def module_directories(node: str) -> list[str]:
    """Where modules may be installed: NODE_PATH, next to node, and where Debian and npm do it."""
    named = [path for path in os.environ.get("NODE_PATH", "").split(os.pathsep) if path]
    own = f"{prefix_of(node)}/lib/node_modules"
    return [*named, own, "/usr/local/lib/node_modules", "/usr/lib/node_modules", "/usr/share/nodejs"]


def find() -> Toolchain:
    """Raises ToolchainError if node or js-md5 is missing."""
    node = find_command("node", "node (Debian: nodejs)")
    modules = next((path for path in module_directories(node) if Path(path, MODULE).is_dir()), None)
    if modules is None:
        raise ToolchainError(f"{MODULE}: not found in NODE_PATH; install it with npm install -g {MODULE}@0.7.3")
    return Toolchain(
        language="js",
        version=f"node {output_of(node, '--version').strip()}",
        files=source_file("program.js"),
        compile=(),
        run=(node, "program.js"),
        readable=(prefix_of(node), os.path.realpath(modules), modules),
        environment={"NODE_PATH": modules},
    )
