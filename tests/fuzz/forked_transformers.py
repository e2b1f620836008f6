"""What transformers makes of a tokenizer, asked in a fork instead of a new Python."""

import io
import os
import resource
import subprocess
import sys
from types import SimpleNamespace


def fork_transformers() -> None:
    """Let transformers load directories in a fork of this process. As in real use it is a process
    of its own, but one that need not import transformers, which takes seconds."""
    from transformers import AutoTokenizer  # noqa: F401 - imported before the fork

    from megatron_ft.tokenizer import as_transformers, transformers_view

    def run(command: list[str], *, input: bytes, **options) -> subprocess.CompletedProcess:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
                sys.stdin, sys.stdout, sys.stderr = (
                    io.StringIO(input.decode()),
                    open(writing, "w", encoding="utf-8"),
                    open(os.devnull, "w", encoding="utf-8"),
                )
                as_transformers.main()
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), answer, b"")

    transformers_view.subprocess = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
