"""A stand-in for the Hugging Face hub: the part of its HTTP interface that models go through.

It keeps files in memory, gives every commit a number, wants a token for writing, and takes large
files by the LFS protocol, as the hub does.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Hub(ThreadingHTTPServer):
    """The server and all that it holds."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repos: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit_of(self, name: str) -> str:
        """The number of the one commit there is."""
        content = b"".join(k.encode() + v for k, v in sorted(self.repos[name].items()))
        return hashlib.sha1(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.seen.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if name not in self.server.repos:
            return self.answer({"error": "no"}, 404, X_Error_Code="RepoNotFound")
        files, commit = self.server.repos[name], self.server.commit_of(name)
        if parts[0] == "api" and "tree" in parts:
            tree = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for path, data in files.items()
            ]
            return self.answer(tree)
        if parts[0] == "api":
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": name, "sha": commit, "siblings": siblings, "private": False})
        if parts[-1] not in files:
            return self.answer({"error": "no"}, 404, X_Error_Code="EntryNotFound")
        data = files[parts[-1]]
        etag = hashlib.sha1(data).hexdigest()
        return self.answer(data, ETag=f'"{etag}"', X_Repo_Commit=commit)

    def do_PUT(self) -> None:
        self.server.large[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer()

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        self.server.seen.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer({"error": "who are you?"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            self.server.private[name] = bool(asked.get("private")) or (
                asked.get("visibility") == "private"
            )
            return self.answer({"url": f"{self.server.url}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]})  # fmt: skip
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            return self.answer({"files": [
                {"path": file["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.repos[name][value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                self.server.repos[name][value["path"]] = self.server.large[value["oid"]]
        commit = self.server.commit_of(name)
        address = f"{self.server.url}/{name}/commit/{commit}"
        return self.answer({"success": True, "commitOid": commit, "commitUrl": address})


@contextmanager
def running(token: str) -> Iterator[Hub]:
    """Run a stand-in inside the block."""
    with Hub(token) as hub:
        threading.Thread(
            target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        try:
            yield hub
        finally:
            hub.shutdown()
