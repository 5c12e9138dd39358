"""A stand-in for the file API of the Hugging Face Hub, on the loopback: as much as a commit and a snapshot
need.

It keeps files in memory, one commit after the other. It answers what `huggingface_hub` asks (repository,
pre-upload, commit, revision, file metadata, file contents) and says of every file that it goes up inline; the
large-file storage of the real Hub is not imitated. `break_after` closes the connection in the middle of the
n-th download.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubStandIn(ThreadingHTTPServer):
    """Use as a context manager; `.url` is the endpoint."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.requests: list[str] = []
        self.break_after: int | None = None
        self.models: set[str] = set()
        """Names of model repositories that exist; there is nothing in them."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body = self.body()
        path = self.path.partition("?")[0]
        self.server.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            content = json.loads(body)
            name = "/".join(part for part in (content.get("organization"), content["name"]) if part)
            name = name if "/" in name else f"someone/{name}"
            if name in self.server.files:
                self.reply({"error": "exists", "url": f"{self.server.url}/datasets/{name}"}, 409)
                return
            self.server.files[name] = {}
            self.server.commits[name] = "0" * 40
            self.reply({"url": f"{self.server.url}/datasets/{name}", "name": name, "id": name})
            return
        if path == "/api/validate-yaml":  # the data set card
            self.reply({"errors": [], "warnings": []})
            return
        parts = path.split("/")
        name = "/".join(parts[3:5])
        if parts[5] == "preupload":
            wanted = json.loads(body)["files"]
            self.reply(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted
                    ]
                }
            )
            return
        assert parts[5] == "commit", path
        files = dict(self.server.files[name])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.server.files[name] = files
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.server.commits[name] = commit
        self.reply(
            {
                "commitUrl": f"{self.server.url}/datasets/{name}/commit/{commit}",
                "commitOid": commit,
                "success": True,
            }
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        parts = path.split("/")
        if path.startswith("/api/models/"):
            name = "/".join(parts[3:5])
            if name in self.server.models:
                self.reply({"id": name, "siblings": []})
            else:
                self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        if path.startswith("/api/datasets/"):
            name = "/".join(parts[3:5])
            if name not in self.server.files:
                self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return
            files = self.server.files[name]
            if len(parts) > 5 and parts[5] == "tree":
                self.reply(
                    [
                        {"type": "file", "path": f, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for f, data in sorted(files.items())
                    ]
                )
                return
            self.reply(
                {
                    "id": name,
                    "sha": self.server.commits[name],
                    "private": True,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": f} for f in sorted(files)],
                }
            )
            return
        name, file = "/".join(parts[2:4]), "/".join(parts[6:])
        data = self.server.files.get(name, {}).get(file)
        if data is None:
            self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.server.commits[name]}
        if self.command == "GET" and self.server.break_after is not None:
            self.server.break_after -= 1
            if self.server.break_after < 0:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
        start = 0
        if range_header := self.headers.get("Range"):
            start = int(range_header.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(data[start:], 206 if start else 200, headers)
