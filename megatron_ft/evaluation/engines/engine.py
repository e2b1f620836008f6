"""What every engine has: it is given requests, samples of one prompt, and gives texts."""

import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_ft.evaluation.problems import Problem
from megatron_ft.evaluation.stopping import StopRule

LEAST_NEW_TOKENS = 256  # kept free for the answer where a prompt is longer than --max-length


@dataclass(frozen=True)
class Request:
    """Samples of one problem that have the same prompt.

    `numbers` are those to generate. `group` has the numbers of all samples that belong together,
    done or not: it is the same after a restart, so an engine that gets several samples from one
    seed asks for all of them.
    """

    task: str
    problem: Problem
    prompt: str
    numbers: tuple[int, ...]
    group: tuple[int, ...]
    seed: int
    rule: StopRule

    def seed_of(self, number: int) -> int:
        """63 bits that depend on the run's seed, the problem and the sample only."""
        text = f"{self.seed} {self.task} {self.problem.task_id} {number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


@dataclass(frozen=True)
class Sample:
    """What was generated after a prompt; see `records.Generation`."""

    text: str
    tokens: int
    finish: str
    seed: int
    prompt_cut: int = 0


class Engine(Protocol):
    """Where samples come from.

    `eos` is the end token that texts may hold, `at_once` how many requests are answered at a time.
    """

    eos: str | None
    at_once: int

    def identity(self) -> dict[str, Any]:
        """What the manifest holds of it: runs that differ in it are different evaluations."""

    def sample(self, request: Request) -> list[Sample]:
        """One sample per number of `request.numbers`, in their order."""


def answered(engine: Engine, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Sample]]]:
    """Each request with its samples, in the order in which they are answered.

    Raises what `engine.sample` raises; requests that are being answered then are abandoned.
    """
    if engine.at_once == 1:
        for request in requests:
            yield request, engine.sample(request)
        return
    waiting = list(requests)
    todo: queue.SimpleQueue[Request] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Request, list[Sample] | BaseException]] = queue.SimpleQueue()
    for request in waiting:
        todo.put(request)

    def work() -> None:
        while True:
            try:
                request = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((request, engine.sample(request)))
            except BaseException as error:
                done.put((request, error))
                return

    # Daemons, so that a program that is stopped does not wait for the server.
    for _ in range(min(engine.at_once, len(waiting))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in waiting:
            request, found = done.get()
            if isinstance(found, BaseException):
                raise found
            yield request, found
    finally:
        while not todo.empty():
            try:
                todo.get_nowait()
            except queue.Empty:
                break
