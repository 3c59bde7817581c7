"""A model hub on loopback, as much of it as `huggingface_hub` needs to upload a folder and to download it again."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


class Hub:
    """What the server holds, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        """By SHA-256: what came by Git LFS."""
        self.commits: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.refuse_uploads = False
        self.address = ""

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    """A hub that knows one user, ``TOKEN``; repositories can be made below the owner ``me`` alone."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, status: int, content: Any = None, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            body, path = self.body(), self.path
            hub.asked.append(f"POST {path}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            name = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
            if name not in hub.repositories:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if "/preupload/" in path:
                asked = json.loads(body)["files"]
                mode = {True: "lfs", False: "regular"}
                files = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")]} for f in asked]
                return self.answer(200, {"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
            if path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                up = [{"upload": {"href": f"{hub.address}/lfs/{o['oid']}", "header": {}}} for o in objects]
                found = [{"oid": o["oid"], "size": o["size"], "actions": a} for o, a in zip(objects, up)]
                return self.answer(200, {"transfer": "basic", "objects": found})
            if "/commit/" in path:
                hub.commit(name, [json.loads(line) for line in body.splitlines()])
                oid = f"{len(hub.commits):040x}"
                return self.answer(
                    200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.address}/{name}/commit/{oid}"}
                )
            self.answer(404, {"error": path})

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            address = {"url": f"{hub.address}/{name}"}
            if not name.startswith("me/"):
                return self.answer(403, {"error": f"You don't have the rights to create a model under {name}"})
            if name in hub.repositories:
                return self.answer(409, {"error": "You already created this model repo", **address})
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repositories[name], hub.private[name] = {}, private
            self.answer(200, address)

        def do_PUT(self) -> None:
            hub.asked.append(f"PUT {self.path}")
            body = self.body()
            if hub.refuse_uploads:
                return self.answer(403, {"error": "no room"})
            oid = self.path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                return self.answer(400, {"error": "other bytes than announced"})
            hub.large[oid] = body
            self.answer(200)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
