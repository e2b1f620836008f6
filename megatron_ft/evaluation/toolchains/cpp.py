"""C++ programs: g++, with the headers of all programs compiled once."""

import os
from pathlib import Path

from megatron_ft.evaluation.languages.cpp import HEADERS
from megatron_ft.evaluation.toolchains.toolchain import (
    Toolchain,
    build_once,
    find_command,
    output_of,
    prefix_of,
    source_file,
)

FLAGS = ("-std=c++11",)
LIBRARIES = ("-lcrypto", "-lssl")


def find() -> Toolchain:
    """Raises ToolchainError if g++ or the headers of Boost or OpenSSL are missing."""
    compiler = find_command("g++", "g++, Boost and OpenSSL (Debian: g++ libboost-dev libssl-dev)")
    version = output_of(compiler, "--version").splitlines()[0]
    headers = build_once("cpp", (compiler, version, HEADERS), lambda directory: precompile(compiler, directory))
    return Toolchain(
        language="cpp",
        version=version,
        files=source_file("program.cpp"),
        compile=((compiler, *FLAGS, "-include", f"{headers}/headers.hpp", "program.cpp", *LIBRARIES),),
        run=("./a.out",),
        readable=(prefix_of(compiler), str(headers)),
        environment={"PATH": f"{os.path.dirname(compiler)}:/usr/bin:/bin"},
    )


def precompile(compiler: str, directory: Path) -> None:
    """headers.hpp.gch, which g++ takes instead of headers.hpp."""
    header = directory / "headers.hpp"
    header.write_text(HEADERS + "\n", encoding="utf-8")
    output_of(compiler, *FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch")
