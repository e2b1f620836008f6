"""A git server on 127.0.0.1 for tests: `git http-backend` behind HTTP, which counts and misbehaves.

    python tests/dataset/git_server.py --root DIR --delay 0.05 --log requests.log

Every request is one entry of `log`. `answers[repo]` are answers to its next requests instead of the
real ones, see `misbehave`; `always[repo]` answers all of them.
"""

import argparse
import os
import subprocess
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

PAGE = b"<!DOCTYPE html><html><body>Whoa there! You have exceeded a secondary rate limit.</body></html>"


class Request(NamedTuple):
    time: float  # monotonic seconds
    repo: str  # OWNER/NAME
    method: str
    authorization: str


class GitServer(ThreadingHTTPServer):
    """Serves the repositories DIR/OWNER/NAME."""

    daemon_threads = True

    def __init__(self, root: Path, delay: float = 0.0, log_file: Path | None = None, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.root, self.delay, self.log_file = root, delay, log_file
        self.log: list[Request] = []
        self.answers: dict[str, deque[str]] = defaultdict(deque)
        self.always: dict[str, str] = {}
        self.token = ""  # if set, requests without it get 401
        self.at_once = self.most_at_once = 0
        self.stopped, self.lock = threading.Event(), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def requests_for(self, repo: str) -> int:
        return sum(request.repo == repo for request in self.log)

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that were killed."""


class Handler(BaseHTTPRequestHandler):
    server: GitServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        repo = "/".join(path.split("/")[1:3])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        with server.lock:
            request = Request(time.monotonic(), repo, self.command, self.headers.get("Authorization", ""))
            server.log.append(request)
            if server.log_file:
                with open(server.log_file, "a", encoding="utf-8") as file:
                    file.write(f"{self.command} {self.path}\n")
            answers = server.answers[repo]
            answer = answers.popleft() if answers else server.always.get(repo, "")
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.delay)
            if server.token and request.authorization != server.token:
                answer = "401"
            self.misbehave(answer, path, query, body)
        finally:
            with server.lock:
                server.at_once -= 1

    def misbehave(self, answer: str, path: str, query: str, body: bytes) -> None:
        """Answer truthfully to "", else with an HTML page and status 200 ("page"), half of the real
        answer to a POST ("half"), nothing until the server stops ("hang"), or an HTTP status
        ("404", "429 Retry-After: 2")."""
        if answer == "hang":
            self.server.stopped.wait()
            self.close_connection = True
        elif answer == "page":
            self.reply(200, [("Content-Type", "text/html; charset=utf-8")], PAGE)
        elif answer[:3].isdigit():
            status, _, header = answer.partition(" ")
            name, _, value = header.partition(": ")
            headers = [(name, value)] if name else []
            if status == "401":
                headers.append(("WWW-Authenticate", 'Basic realm="GitHub"'))
            self.reply(int(status), headers, b"no\n")
        else:
            status_code, headers, content = self.backend(path, query, body)
            if answer == "half" and self.command == "POST":
                self.reply(status_code, headers, content, sent=len(content) // 2)
            else:
                self.reply(status_code, headers, content)

    def reply(self, status: int, headers: list[tuple[str, str]], content: bytes, sent: int | None = None) -> None:
        with suppress(OSError):  # the client may be gone
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])
            self.close_connection = sent is not None

    def backend(self, path: str, query: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The real answer: git http-backend as a CGI program."""
        env = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_ADDR": "127.0.0.1",
        }
        done = subprocess.run(["git", "http-backend"], input=body, capture_output=True, env=env)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = [tuple(line.split(": ", 1)) for line in head.decode().split("\r\n")]
        status = next((value for name, value in headers if name == "Status"), "200")
        return int(status.split()[0]), [header for header in headers if header[0] != "Status"], content

    def log_message(self, format: str, *args) -> None:
        """Keep stderr quiet; `log` has the requests."""


@contextmanager
def serve(root: Path, delay: float = 0.0) -> Iterator[GitServer]:
    """A running server."""
    with GitServer(root, delay) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="directory of repositories, OWNER/NAME")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--log", type=Path, help="file that gets one line per request")
    args = parser.parse_args()
    with GitServer(args.root.resolve(), args.delay, args.log) as server:
        print(server.url, flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
