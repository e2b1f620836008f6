"""A local server that speaks as much of the Hub's API as an upload needs."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_aTokenThatMayWrite"


@dataclass
class Hub:
    """What the server knows: objects by digest, files of commits, and how it misbehaves.

    `refused` maps a part of a path to the status and message that requests for it get.
    `most_uploads` is how many objects it takes before it breaks connections.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    most_uploads: int = 1000
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *args) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, content: dict, status: int = 200, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        hub, content = self.hub, self.body()
        if len(hub.objects) >= hub.most_uploads:
            self.close_connection = True
            self.connection.close()
            return
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        hub.objects[digest] = content
        hub.requests.append(f"PUT {digest}")
        self.answer({})

    def do_POST(self) -> None:
        hub, content, path = self.hub, self.body(), self.path.partition("?")[0]
        hub.requests.append(f"POST {path}")
        for part, (status, message) in hub.refused.items():
            if part in path:
                return self.answer({"error": message}, status, **{"X-Error-Message": message})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            known = bool(hub.created)
            hub.created.append(json.loads(content))
            url = {"url": f"{hub.address}/me/model"}
            return (
                self.answer({"error": "You already created this model repo", **url}, 409) if known else self.answer(url)
            )
        if path.startswith("/api/models/me/model/branch/"):
            return self.answer({})
        if "/preupload/" in path:
            return self.answer({"files": [self.mode(file) for file in json.loads(content)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self.action(wanted) for wanted in json.loads(content)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        assert "/commit/" in path, path
        lines = [json.loads(line) for line in content.splitlines()]
        self.commit(path.rpartition("/")[2], lines)
        self.answer({"commitUrl": f"{hub.address}/me/model/commit/1234", "commitOid": "1234"})

    @staticmethod
    def mode(file: dict) -> dict:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def action(self, wanted: dict) -> dict:
        if wanted["oid"] in self.hub.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.address}/objects/{wanted['oid']}"}}}

    def commit(self, branch: str, lines: list[dict]) -> None:
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
        self.hub.commits.append(branch)


def start() -> tuple[Hub, ThreadingHTTPServer]:
    """A running server and what it knows; `shutdown` ends it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub, server
