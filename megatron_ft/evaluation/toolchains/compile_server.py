"""A Java compiler that stays: one process, in a sandbox of its own, for many programs.

It only saves time. What it does not compile, or does not answer on, javac decides in the program's
own sandbox, so that a verdict never depends on the programs compiled before.
"""

import os
import select
import struct
import time
from contextlib import AbstractContextManager, suppress

from megatron_ft.evaluation.sandbox.sandbox import Job, Sandbox, SandboxError, Step
from megatron_ft.evaluation.toolchains.java import FLAGS, server_classes
from megatron_ft.evaluation.toolchains.toolchain import Toolchain

PROGRAMS = 300  # per process, then a new one: no leak grows
ANSWER_S = 60
MAX_BYTES = 1 << 24
NO_LIMIT_S = 1e6


class CompileServer:
    """Compiles the programs of one worker. Use `close` when done."""

    def __init__(self, toolchain: Toolchain, sandbox: Sandbox, slot: int):
        classes = str(server_classes(toolchain))
        command = (toolchain.run[0], *FLAGS, "-cp", classes, "CompileServer")
        self.job = Job({}, (Step(command, NO_LIMIT_S),), (*toolchain.readable, classes))
        self.sandbox, self.slot = sandbox, slot
        self.served = 0
        self._process: AbstractContextManager | None = None
        self._ends = (-1, -1)

    def classes(self, source: str) -> dict[str, bytes] | None:
        """The class files of a program by name; None if it did not compile."""
        if self.served >= PROGRAMS:
            self.close()
        try:
            if self._process is None:
                self._process = self.sandbox.serving(self.job, self.slot)
                self._ends = self._process.__enter__()
            self.served += 1
            return self._answer(source.encode("utf-8", "replace"))
        except (OSError, EOFError, SandboxError):
            self.close()
            return None

    def close(self) -> None:
        """End the process."""
        process, self._process, self.served = self._process, None, 0
        if process is not None:
            with suppress(SandboxError):
                process.__exit__(None, None, None)

    def _answer(self, source: bytes) -> dict[str, bytes] | None:
        deadline = time.monotonic() + ANSWER_S
        text = struct.pack(">i", len(source)) + source
        while text:
            text = text[os.write(self._ends[0], text) :]
        count = self._integer(">i", deadline)
        if count < 0:
            return None
        classes = {}
        for _ in range(count):
            name = self._read(self._integer(">H", deadline), deadline).decode()
            classes[name] = self._read(self._integer(">i", deadline), deadline)
        return classes

    def _integer(self, form: str, deadline: float) -> int:
        return struct.unpack(form, self._read(struct.calcsize(form), deadline))[0]

    def _read(self, size: int, deadline: float) -> bytes:
        data = b""
        if size > MAX_BYTES:
            raise EOFError
        while len(data) < size:
            if not select.select([self._ends[1]], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise EOFError
            part = os.read(self._ends[1], size - len(data))
            if not part:
                raise EOFError
            data += part
        return data
