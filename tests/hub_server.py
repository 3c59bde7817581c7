"""A hub on loopback, as much of it as `huggingface_hub` needs to upload a folder, and to download models and data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        self.store = ""
        """Where large files lie: for the client another host."""
        self.published: dict[tuple[str, str], dict[str, bytes]] = {}
        """By repository (``models/me/tiny``, ``datasets/me/rows``) and commit."""
        self.refs: dict[tuple[str, str], str] = {}
        """Commits, by repository and branch or tag."""
        self.gated: set[str] = set()
        self.read: dict[str, int] = {}
        """Bytes that were sent of each file."""
        self.wrong: set[str] = set()
        """Files that are sent with one bit turned over."""
        self.break_off: set[str] = set()
        """Files whose connection ends after half of what was asked for, once each."""
        self.stall: set[str] = set()
        """Files that stop in the middle, until the hub is gone."""
        self.gone = threading.Event()

    def publish(self, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Give ``models/me/tiny`` these files at a branch or tag; returns the commit."""
        told = json.dumps(sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items()))
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.published[name, commit] = files
        self.refs[name, revision] = commit
        return commit

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.refs.get((name, revision), revision)
        return (commit, self.published[name, commit]) if (name, commit) in self.published else None

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


LARGE = (".safetensors", ".parquet", ".bin")


def about(path: str, content: bytes) -> dict[str, Any]:
    """What the hub says of a file; of a large one its SHA-256, in the words of Git LFS."""
    git = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
    entry = {"type": "file", "path": path, "rfilename": path, "oid": git, "blobId": git, "size": len(content)}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 134}
    return entry


API = re.compile(r"/api/((?:models|datasets)/[^/]+/[^/?]+)(?:/(revision|tree)/([^/?]+))?(?:\?.*)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")
CONTENT = re.compile(r"/content/((?:models|datasets)/[^/]+/[^/]+)/([0-9a-f]{40})/(.+)")


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

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            if found := API.fullmatch(self.path):
                return self.say(found[1], found[2], found[3] or "main")
            if found := RESOLVE.fullmatch(self.path):
                return self.resolve(f"{found[1] or 'models/'}{found[2]}", found[3], found[4])
            if found := CONTENT.fullmatch(self.path):
                return self.send(found[3], hub.published[found[1], found[2]][found[3]], {})
            self.answer(404, {"error": self.path})

        def say(self, name: str, what: str | None, revision: str) -> None:
            if not any(known == name for known, _ in hub.published):
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if not (found := hub.find(name, revision)):
                return self.answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            entries = [about(path, content) for path, content in sorted(found[1].items())]
            if what == "tree":
                return self.answer(200, entries)
            self.answer(200, {"id": name.partition("/")[2], "sha": found[0], "siblings": entries, "private": False})

        def resolve(self, name: str, revision: str, path: str) -> None:
            """A small file itself; of a large one where it lies, as the hub sends to its store."""
            found = hub.find(name, revision)
            if not found or path not in found[1]:
                commit = {"X_Repo_Commit": found[0]} if found else {}
                return self.answer(404, {"error": path}, X_Error_Code="EntryNotFound", **commit)
            if name in hub.gated:
                return self.answer(403, {"error": f"Access to {name} is restricted"}, X_Error_Code="GatedRepo")
            entry = about(path, found[1][path])
            if "lfs" not in entry:
                return self.send(path, found[1][path], {"X_Repo_Commit": found[0], "ETag": f'"{entry["oid"]}"'})
            self.answer(
                302,
                b"",
                X_Repo_Commit=found[0],
                X_Linked_Etag=f'"{entry["lfs"]["sha256"]}"',
                X_Linked_Size=str(entry["size"]),
                Location=f"{hub.store}/content/{name}/{found[0]}/{path}",
            )

        def send(self, path: str, content: bytes, headers: dict[str, str]) -> None:
            """A file, or what is left of it from the start of a range."""
            if path in hub.wrong:
                content = bytes([content[0] ^ 1]) + content[1:]
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(asked[1]) if asked else 0
            rest = content[start:]
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            for name, value in {"Content-Length": str(len(rest)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "HEAD":
                return
            halved = path in hub.break_off or path in hub.stall
            now = rest[: len(rest) // 2] if halved else rest
            with suppress(ConnectionError):  # a client that has died
                self.wfile.write(now)
            hub.read[path] = hub.read.get(path, 0) + len(now)
            if path in hub.stall:
                self.wfile.flush()
                hub.gone.wait()
            if halved:
                hub.break_off.discard(path)
                self.close_connection = True

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
    hub.store = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.gone.set()
        server.shutdown()
        server.server_close()
        thread.join()
