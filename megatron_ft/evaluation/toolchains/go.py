"""Go programs: compiled and linked against packages that are built once, as `go test` would.

`go test` itself spends most of its time on finding out that nothing else has to be built. Like it,
this runs vet's checks of tests before the program.
"""

import json
import re
import shutil
from pathlib import Path

from megatron_ft.evaluation.sandbox.sandbox import ToolchainError
from megatron_ft.evaluation.toolchains.toolchain import BUILD_S, Toolchain, build_once, find_command, output_of

TESTIFY = "github.com/stretchr/testify/assert"
INSTALL = "Go and testify (Debian: golang-go golang-github-stretchr-testify-dev)"
DEBIAN_GOPATH = "/usr/share/gocode"
ARCHIVES = "archives.json"
PACKAGE = "command-line-arguments"  # the import path that `go test FILE` gives a program
VET_CHECKS = ("-atomic", "-bool", "-buildtags", "-errorsas", "-ifaceassert", "-nilfunc", "-printf", "-stringintconv")
TEST = re.compile(r"^func\s+(Test(?:[^a-z\W]\w*)?)\s*\(\s*\w+\s+\*testing\.T\s*\)", re.MULTILINE)
TEST_MAIN = re.compile(r"^func\s+TestMain\s*\(", re.MULTILINE)
MAIN = """\
package main

import (
	"os"
	"testing"
	"testing/internal/testdeps"

	_test "{package}"
)

var tests = []testing.InternalTest{{{tests}}}

func main() {{
	m := testing.MainStart(testdeps.TestDeps{{}}, tests, nil, nil, nil)
	{run}
}}

var _ = os.Exit
"""


def find() -> Toolchain:
    """Raises ToolchainError if go or testify is missing."""
    go = find_command("go", INSTALL)
    root = output_of(go, "env", "GOROOT").strip()
    version = output_of(go, "version").strip()
    built = build_once("go", (go, version), lambda directory: build_packages(go, directory))
    archives = archives_in(built)
    tools = output_of(go, "env", "GOTOOLDIR").strip()
    compile_test = (f"{tools}/compile", "-p", PACKAGE, "-complete", "-importcfg", "importcfg", "-pack")
    compile_main = (f"{tools}/compile", "-p", "main", "-complete", "-importcfg", "importcfg", "-pack")
    return Toolchain(
        language="go",
        version=version,
        files=lambda source: files(source, archives),
        compile=(
            (*compile_test, "-o", "program.a", "program_test.go"),
            (f"{tools}/vet", *VET_CHECKS, "vet.cfg"),
            (*compile_main, "-o", "main.a", "main.go"),
            (f"{tools}/link", "-importcfg", "importcfg", "-s", "-w", "-o", "a.out", "main.a"),
        ),
        run=("./a.out",),
        readable=(root, tools, str(built)),
        environment={"GOROOT": root},
    )


def files(source: str, archives: dict[str, str]) -> dict[str, bytes]:
    """The program, the main package that runs its tests, and the configuration of the tools."""
    tests = ", ".join(f'{{"{name}", _test.{name}}}' for name in dict.fromkeys(TEST.findall(source)))
    run = "_test.TestMain(m)" if TEST_MAIN.search(source) else "os.Exit(m.Run())"
    packages = {**archives, PACKAGE: "program.a"}
    vet = {
        "ID": PACKAGE,
        "Compiler": "gc",
        "ImportPath": PACKAGE,
        "GoFiles": ["program_test.go"],
        "ImportMap": {name: name for name in archives},
        "PackageFile": archives,
        "VetxOutput": "vet.out",
    }
    return {
        "program_test.go": source.encode("utf-8", "surrogatepass"),
        "main.go": MAIN.format(package=PACKAGE, tests=tests, run=run).encode(),
        "importcfg": "".join(f"packagefile {name}={path}\n" for name, path in packages.items()).encode(),
        "vet.cfg": json.dumps(vet).encode(),
    }


def archives_in(built: Path) -> dict[str, str]:
    """{import path: archive} of all packages that programs may import."""
    archives = json.loads((built / ARCHIVES).read_text(encoding="utf-8"))
    return {name: str(built / path) for name, path in archives.items()}


def build_packages(go: str, directory: Path) -> None:
    """ARCHIVES, which names the archive of each package that programs may import, and the archives
    that the toolchain does not ship."""
    environment = {"GO111MODULE": "off", "GOCACHE": f"{directory}/cache", "GOFLAGS": "", "CGO_ENABLED": "0"}
    path = output_of(go, "env", "GOPATH").strip()
    environment["GOPATH"] = f"{path}:{DEBIAN_GOPATH}"
    form = "{{if .Export}}{{.ImportPath}} {{.Export}}{{end}}"
    try:
        listed = output_of(
            go, "list", "-export", "-deps", "-f", form, "std", TESTIFY, environment=environment, seconds=BUILD_S
        )
    except ToolchainError as error:
        raise ToolchainError(f"{error}; install {INSTALL}") from None
    archives = {}
    for number, line in enumerate(listed.splitlines()):
        name, archive = line.split(" ", 1)
        if archive.startswith(str(directory)):
            shutil.move(archive, directory / f"{number}.a")
            archive = f"{number}.a"
        archives[name] = archive
    shutil.rmtree(directory / "cache", ignore_errors=True)
    (directory / ARCHIVES).write_text(json.dumps(archives), encoding="utf-8")
