"""Check what score.py needs on this machine: a sandbox that holds, and six toolchains that work.

    python evaluation/run/check_toolchains.py --languages all

Run it once on a login node with the network, and once in a job on a compute node. It builds what is
built once (C++ headers, Go packages, Rust crates) in MEGATRON_FT_TOOLCHAIN_CACHE, by default
~/.cache/megatron-ft, runs a right and a wrong program per language, and prints what is missing and
what installs it; then the exit status is 1.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import time
from collections.abc import Sequence

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import run_program
from megatron_ft.evaluation.problems import parse_languages
from megatron_ft.evaluation.sandbox.probes import choose_sandbox, permitted
from megatron_ft.evaluation.sandbox.sandbox import KINDS, Sandbox, SandboxError, ToolchainError
from megatron_ft.evaluation.toolchains import smoke
from megatron_ft.evaluation.toolchains.find import find_toolchain
from megatron_ft.evaluation.toolchains.toolchain import cache_directory
from megatron_ft.printable import printable

DEBIAN = (
    "apt-get install bubblewrap g++ libboost-dev libssl-dev nodejs npm openjdk-17-jdk-headless golang-go "
    "golang-github-stretchr-testify-dev cargo rustc librust-regex-dev librust-md5-dev && npm install -g js-md5@0.7.3"
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--languages", default="all", help="languages, separated by commas, or all")
    add("--sandbox", choices=KINDS, help="default: the one that score.py would use")
    args = parser.parse_args(argv)
    args.languages = parse_languages(args.languages)
    return args


def main() -> int:
    args = parse_args()
    for kind in KINDS[:2]:
        print(f"sandbox {kind}: {printable(state_of(kind))}")
    try:
        sandbox, _ = choose_sandbox(args.sandbox)
    except (SandboxError, ToolchainError) as error:
        print(f"error: sandbox_error: {printable(error)}", file=sys.stderr)
        return 1
    print(f"used: {sandbox.kind}; built once in {cache_directory()}")
    broken = [language for language in args.languages if not works(language, sandbox)]
    if broken:
        print(f"missing or broken: {', '.join(broken)}; on Debian, all of it: {DEBIAN}", file=sys.stderr)
    return 1 if broken else 0


def state_of(kind: str) -> str:
    """Whether a sandbox holds, or what is wrong with it."""
    try:
        found = permitted(Sandbox(kind))
    except (SandboxError, ToolchainError) as error:
        return f"does not work: {error}"
    return f"permits: {', '.join(found).replace('_', ' ')}" if found else "refuses all hostile probes"


def works(language: str, sandbox: Sandbox) -> bool:
    """Print the state of a toolchain."""
    start = time.monotonic()
    try:
        toolchain = find_toolchain(language)
        smoke.check(toolchain, sandbox)
    except (SandboxError, ToolchainError) as error:
        print(f"{language}: error: {printable(error)}")
        return False
    print(f"{language}: {toolchain.version}, works ({time.monotonic() - start:.1f} s)")
    return True


if __name__ == "__main__":
    run_program(main)
