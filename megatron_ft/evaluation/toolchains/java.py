"""Java programs: compiled by one long-lived compiler per worker, run in a JVM that starts fast."""

from pathlib import Path

from megatron_ft.evaluation.toolchains.toolchain import (
    Toolchain,
    build_once,
    find_command,
    output_of,
    prefix_of,
    source_file,
)

INSTALL = "a JDK, 11 or newer (Debian: openjdk-17-jdk-headless)"
# One thread for garbage, and only the fast compiler: programs run for a fraction of a second.
FLAGS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xshare:auto", "-Xmx1g")
SERVER = Path(__file__).with_name("CompileServer.java")


def find() -> Toolchain:
    """Raises ToolchainError if javac or java is missing."""
    compiler = find_command("javac", INSTALL)
    home = prefix_of(compiler)
    version = output_of(compiler, "-version").strip()
    java = f"{home}/bin/java"
    flags = [word for flag in FLAGS for word in (f"-J{flag}",)]
    configuration = [str(path) for path in Path("/etc").glob("java-*-openjdk")]
    return Toolchain(
        language="java",
        version=version,
        files=source_file("Main.java"),
        compile=((compiler, *flags, "-proc:none", "-encoding", "UTF-8", "-nowarn", "-d", ".", "Main.java"),),
        run=(java, *FLAGS, "-cp", ".", "Main"),
        readable=(home, *configuration),
    )


def server_classes(toolchain: Toolchain) -> Path:
    """The directory with the compiled CompileServer."""
    source = SERVER.read_text(encoding="utf-8")
    compiler = toolchain.compile[0][0]
    return build_once("java", (toolchain.version, source), lambda directory: _build(compiler, directory))


def _build(compiler: str, directory: Path) -> None:
    output_of(compiler, "-d", str(directory), str(SERVER))
