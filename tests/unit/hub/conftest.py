"""A small Hub over real HTTP: repositories in memory, and misbehaviour on request."""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest

TOKEN = "hf_" + "s3cret" * 5


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """`repos[id]` is a list of commits, each `{path: bytes}`. `trouble` takes a queue of `(pattern, what)`.

    `what` is a status code, `"disconnect"` or `"stall"`; each entry spoils one request whose path matches.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.messages: list[str] = []
        self.private: dict[str, Any] = {}
        self.branches: set[str] = {"main"}
        self.blobs: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.trouble: list[tuple[str, int | str]] = []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1]

    def pick_trouble(self, path: str) -> int | str | None:
        for index, (pattern, what) in enumerate(self.trouble):
            if re.search(pattern, path):
                del self.trouble[index]
                return what
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def dispatch(self) -> None:
        parsed = urlparse(self.path)
        path, query, body = unquote(parsed.path), parse_qs(parsed.query), self.body()
        self.server.calls[path] += 1
        trouble = self.server.pick_trouble(path)
        if trouble == "disconnect":
            self.close_connection = True
            self.connection.close()
            return
        if trouble == "stall":
            self.server.released.wait(20)
            self.close_connection = True
            return
        if isinstance(trouble, int):
            self.refuse(trouble, "Trouble")
            return
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None) or (
            path.startswith("/api") and "Authorization" not in self.headers
        ):
            self.refuse(401, "Unauthorized")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/_blobs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.server.blobs[found[1]] = body
            self.answer({})
        elif re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            self.lfs(json.loads(body)["objects"])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/([^/]+))?(?:/(.*))?)?", path):
            self.model(found[1], found[2], found[3], found[4], query, body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[3])
        else:
            self.refuse(404, "EntryNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = dispatch

    def create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{repo}", "name": repo, "id": "1"}
        if repo in self.server.repos:
            self.answer(answer, 409)
            return
        self.server.repos[repo] = [{}]
        self.server.private[repo] = wanted.get("private", wanted.get("visibility") == "private")
        self.answer(answer)

    def lfs(self, objects: list[dict[str, Any]]) -> None:
        def plan(wanted: dict[str, Any]) -> dict[str, Any]:
            known = wanted["oid"] in self.server.blobs
            upload = {"upload": {"href": f"{self.server.url}/_blobs/{wanted['oid']}"}}
            return {"oid": wanted["oid"], "size": wanted["size"], **({} if known else {"actions": upload})}

        self.answer({"transfer": "basic", "objects": [plan(wanted) for wanted in objects]})

    def model(self, repo: str, action: str | None, revision: Any, rest: Any, query: Any, body: bytes) -> None:
        if repo not in self.server.repos:
            self.refuse(404, "RepoNotFound")
            return
        if action == "branch":
            self.server.branches.add(revision)
            self.answer({})
            return
        if (
            revision is not None
            and revision not in self.server.branches
            and not re.fullmatch(r"[0-9a-f]{40}", revision)
        ):
            self.refuse(404, "RevisionNotFound")
            return
        files = self.server.files(repo)
        if action == "preupload":
            self.answer({"files": [self.preupload(entry, files) for entry in json.loads(body)["files"]]})
        elif action == "commit":
            self.commit(repo, files, body)
        elif action == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
                for name, content in sorted(files.items())
                if name.startswith(rest or "")
            ]
            if rest and not entries:
                self.refuse(404, "EntryNotFound")
            else:
                self.answer(entries)
        else:
            siblings = [{"rfilename": name} for name in sorted(files)]
            self.answer({"_id": "1", "id": repo, "sha": self.commit_id(repo), "siblings": siblings, "tags": []})

    def preupload(self, entry: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        path = entry["path"]
        large = entry["size"] > 100_000 or path.endswith((".safetensors", ".bin", ".pt"))
        return {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": git_id(files[path]) if path in files else None,
        }

    def commit(self, repo: str, files: dict[str, bytes], body: bytes) -> None:
        changed = dict(files)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.messages.append(value["summary"])
            elif entry["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                changed[value["path"]] = self.server.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                changed.pop(value["path"])
        self.server.repos[repo].append(changed)
        oid = self.commit_id(repo)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    def commit_id(self, repo: str) -> str:
        return hashlib.sha1(f"{repo}{len(self.server.repos[repo])}".encode()).hexdigest()

    def resolve(self, repo: str, path: str) -> None:
        content = self.server.repos.get(repo, [{}])[-1].get(path)
        if content is None:
            self.refuse(404, "EntryNotFound")
        else:
            self.answer(content, ETag=f'"{git_id(content)}"', X_Repo_Commit=self.commit_id(repo))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a running `FakeHub` that `huggingface_hub` talks to."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server = FakeHub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))
    close_session()
    yield server
    # An attempt that the queue gave up on is still at it; it must not outlive its server.
    server.trouble.clear()
    server.released.set()
    for thread in threading.enumerate():
        if thread.name == "hub-call":
            thread.join(10)
    server.shutdown()
    server.server_close()
    close_session()
