"""A server of /v1/completions that fails as real ones do, on request."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret"
INCOMPLETE = "\n  ret"  # the text of a choice that was aborted
# What a request is answered with: a name below, or "ok".
FAULTS = (
    "429", "500", "503", "late", "broken", "html", "empty", "no choices", "few", "none", "aborted", "closed", "cut off", "trickle",
)  # fmt: skip


def text_of(prompt: str, seed: int, index: int) -> str:
    """What the served model answers: a body that depends on prompt, seed and index only."""
    return f"\n  return {len(prompt)} * {seed} + {index}\n}}\nconst more = 1"


class CompletionsServer(ThreadingHTTPServer):
    """Takes the next of `faults` for each request for samples; "ok" when there is none left."""

    daemon_threads = True

    def __init__(self, faults: list[str], forever: str | None = None, max_n: int = 100):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.forever, self.max_n = faults, forever, max_n
        self.lock, self.bodies = threading.Lock(), list[dict]()
        self.keys = set[str | None]()
        self.times = list[float]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        """A client that has given up is expected."""


class Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
            self.server.times.append(time.monotonic())
            if self.path != "/v1/completions":
                fault = "404"
            elif body.get("n", 1) > self.server.max_n:
                fault = "400"
            elif self.server.forever:
                fault = self.server.forever
            else:
                fault = self.server.faults.pop(0) if self.server.faults else "ok"
        self.respond(fault, body)

    def respond(self, fault: str, body: dict) -> None:
        choices = [
            {"index": i, "text": text_of(body["prompt"], body.get("seed", 0), i), "finish_reason": "stop"}
            for i in range(body.get("n", 1))
        ]
        usage = {"prompt_tokens": 100, "completion_tokens": 7 * len(choices)}
        good = json.dumps({"choices": choices, "usage": usage}).encode()
        if fault.isdecimal():
            echoed = {"error": {"message": f"refused: n is {body.get('n')}, {self.headers.get('Authorization')}"}}
            headers = {"429": {"Retry-After": "1"}, "307": {"Location": "http://127.0.0.1:1/v1/completions"}}
            self.send(int(fault), json.dumps(echoed).encode(), **headers.get(fault, {}))
        elif fault == "closed":
            self.connection.close()
        elif fault == "late":
            time.sleep(3)
        elif fault == "trickle":
            self.start(200, len(good))
            for i in range(30):
                self.wfile.write(good[i : i + 1])
                time.sleep(0.1)
            self.wfile.write(good[30:])
        elif fault == "cut off":
            self.start(200, len(good))
            self.wfile.write(good[:-20])
        else:
            few = choices[:-1] if len(choices) > 1 else choices
            aborted = [{**choices[0], "text": INCOMPLETE, "finish_reason": "abort"}, *choices[1:]]
            content = {
                "broken": good[:-20],
                "html": b"<html><body>Please log in</body></html>",
                "empty": b"",
                "no choices": b'{"object": "error"}',
                "few": json.dumps({"choices": few, "usage": usage}).encode(),
                "none": json.dumps({"choices": [], "usage": usage}).encode(),
                "aborted": json.dumps({"choices": aborted, "usage": usage}).encode(),
            }
            self.send(200, content.get(fault, good))

    def start(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.start(status, len(content), **{name.replace("_", "-"): value for name, value in headers.items()})
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Nothing is logged."""


@contextmanager
def serving(faults: list[str] | None = None, **settings) -> Iterator[CompletionsServer]:
    """A server in a thread of this process."""
    with CompletionsServer(faults or [], **settings) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
