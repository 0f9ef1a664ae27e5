"""A local stand-in for the API of Hugging Face's hub, for its real client to write and read."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_write"
READ_ONLY = "hf_read"


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        sha = hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()
        self.refs[branch] = sha
        self.commits[sha] = content
        return sha


@dataclass
class Hub:
    """The repositories, the LFS store, and what was asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fails: int | None = None  # the status of every answer, if any

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        return self.repos.setdefault(name, Repo(private=False)).commit(branch, files)


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        try:
            if self.hub.fails:
                raise Refused(self.hub.fails)
            answer, headers = self._answer(path, body)
            status = 200
        except Refused as refused:
            answer, headers, status = b"{}", refused.headers, refused.status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _answer(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                came = method(self, *found.groups(), body)
                return came if isinstance(came, tuple) else (json.dumps(came).encode(), {})
        raise Refused(404)

    def _find(self, name: str, writes: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._token):
            raise Refused(401 if not self._token else 404, "RepoNotFound")
        if writes and self._token != TOKEN:
            raise Refused(403, message="You need write access")
        return repo

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._find(name)
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        if self._token not in (TOKEN, READ_ONLY):
            raise Refused(401, message="Invalid username or password.")
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name not in self.hub.repos and self._token != TOKEN:
            raise Refused(403, message="You don't have the rights")
        private = asked.get("visibility") == "private"
        repo = self.hub.repos.setdefault(name, Repo(private))
        if not repo.commits:
            repo.commit("main", {".gitattributes": b""})
        return {"url": f"{self.hub.url}/{name}"}

    def info(self, name: str, revision: str | None, _: bytes) -> Any:
        sha, files = self._commit(name, revision or "main")
        siblings = [{"rfilename": each} for each in files]
        private = self._find(name).private
        return {"id": name, "modelId": name, "sha": sha, "private": private, "siblings": siblings}

    def tree(self, name: str, revision: str, _: bytes) -> Any:
        _, files = self._commit(name, revision)
        return [
            {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
            for k, v in files.items()
        ]

    def branch(self, name: str, branch: str, _: bytes) -> Any:
        repo = self._find(name, writes=True)
        if branch in repo.refs:
            raise Refused(409)
        repo.refs[branch] = repo.refs["main"]
        return {}

    def validate(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        if "license: nonsense" in content:
            raise Refused(400)
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, _: str, body: bytes) -> Any:
        self._find(name, writes=True)
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs"
                if each["path"].endswith((".safetensors", ".onnx"))
                else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        return {"files": modes}

    def batch(self, name: str, body: bytes) -> Any:
        self._find(name, writes=True)
        objects = []
        for each in json.loads(body)["objects"]:
            places = {"upload": f"/lfs/{each['oid']}", "verify": "/verify"}
            actions = {kind: {"href": f"{self.hub.url}{place}"} for kind, place in places.items()}
            objects.append({**each, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def put(self, oid: str, body: bytes) -> Any:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.lfs[oid] = body
        return {}

    def verify(self, body: bytes) -> Any:
        asked = json.loads(body)
        assert len(self.hub.lfs[asked["oid"]]) == asked["size"]
        return {}

    def commit(self, name: str, branch: str, body: bytes) -> Any:
        repo, files = self._find(name, writes=True), {}
        if branch not in repo.refs:
            raise Refused(404, "RevisionNotFound")
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        sha = repo.commit(branch, files)
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}

    def resolve(self, name: str, revision: str, file: str, _: bytes) -> Any:
        sha, files = self._commit(name, revision)
        if file not in files:
            raise Refused(404, "EntryNotFound")
        content = files[file]
        return content, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}


_REPO = r"([^/]+/[^/]+?)"
_API = rf"/api/models/{_REPO}"
ROUTES: list[tuple[str, Callable[..., Any]]] = [
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate),
    (rf"GET {_API}(?:/revision/(.+))?", Handler.info),
    (rf"GET {_API}/tree/(.+)", Handler.tree),
    (rf"POST {_API}/branch/(.+)", Handler.branch),
    (rf"POST {_API}/preupload/(.+)", Handler.preupload),
    (rf"POST {_API}/commit/(.+)", Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.put),
    ("POST /verify", Handler.verify),
    (rf"(?:HEAD|GET) /{_REPO}/resolve/([^/]+|refs/pr/\d+)/(.+)", Handler.resolve),
]


@contextmanager
def served(patch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """A hub that the client in this process uses, with a cache of its own."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
    }.items():
        patch.setattr(constants, name, value)
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setenv("HF_TOKEN", TOKEN)
    close_session()
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()
