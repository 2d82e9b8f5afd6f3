"""A Hub on this machine: the part of the Hugging Face Hub's HTTP interface that publishing and loading a model need.

with Hub() as hub:
    environment = hub.environment(tmp_path)       # for a process that is to take it for the Hub
    hub.sent                                      # [(file or object, bytes)] of all contents received, in order
    hub.lose = "/commit/"                         # requests for such a path are cut off before they are answered …
    hub.broken = "/preupload/"                    # … or answered by an error of the server
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_token_of_me"
LICENSES = ("apache-2.0", "mit", "other")
TASKS = ("text-generation", "fill-mask", "text-classification", "feature-extraction")


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, Any]] = {}  # private; branches: name → [(commit, message, {path: content})]
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.sent: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.lose: str | None = None
        self.broken: str | None = None

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        removed = ("HF_HUB_OFFLINE", "HF_TOKEN")
        kept = {name: value for name, value in os.environ.items() if name not in removed}
        own = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return kept | own | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        for name, commits in self.repos[repo_id]["branches"].items():
            for commit, _, files in reversed(commits):
                if revision in (name, commit):
                    return files
        raise LookupError(revision)

    def commits(self, repo_id: str, revision: str = "main") -> list[tuple[str, str, dict[str, bytes]]]:
        return next(
            commits
            for name, commits in self.repos[repo_id]["branches"].items()
            if revision == name or any(revision == commit for commit, *_ in commits)
        )

    def commit(self, repo_id: str, branch: str, message: str, files: dict[str, bytes]) -> str:
        commits = self.repos[repo_id]["branches"].setdefault(branch, [])
        oid = hashlib.sha1(f"{repo_id} {branch} {len(commits)}".encode()).hexdigest()
        commits.append((oid, message, files))
        return oid


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def oid_of(path: str, content: bytes) -> str:
    """As git has it: of a large file its sha256, of another the blob's sha1."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {path}")
        if self.server.lose is not None and self.server.lose in path:
            self.close_connection = True  # no answer, as when the network fails
            return
        if self.server.broken is not None and self.server.broken in path:
            return self.refuse(507, "", "Insufficient storage")
        for method, pattern, route in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                is_open = method in ("GET", "HEAD") or path.startswith("/objects/") or path == "/api/validate-yaml"
                if not is_open and not self.is_allowed():
                    return self.refuse(401, "Unauthorized", "Invalid username or password.")
                repo_id = match.groupdict().get("repo")
                if repo_id is not None and repo_id not in self.server.repos:
                    return self.refuse(404, "RepoNotFound", "Repository not found")
                if repo_id is not None and self.server.repos[repo_id]["private"] and not self.is_allowed():
                    return self.refuse(401, "RepoNotFound", "Repository not found")
                try:
                    return route(self, body, **match.groupdict())
                except LookupError:
                    return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return self.refuse(404, "EntryNotFound", f"no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def is_allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # Accounts and repositories

    def whoami(self, body: bytes) -> None:
        if not self.is_allowed():
            return self.refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
        return self.answer({"type": "user", "name": "me", "fullname": "Me", "orgs": []})

    def create_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        if not repo_id.startswith("me/"):
            return self.refuse(403, "Forbidden", f"You don't have the rights to create a model under {repo_id}")
        url = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        self.server.repos[repo_id] = {"private": asked.get("visibility") == "private", "branches": {}}
        self.server.commit(repo_id, "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(url)

    def create_branch(self, body: bytes, repo: str, revision: str) -> None:
        if revision in self.server.repos[repo]["branches"]:
            return self.refuse(409, "Conflict", "Reference already exists")
        self.server.commit(repo, revision, "initial commit", dict(self.server.files(repo)))
        return self.answer({})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        files = [{"rfilename": path} for path in self.server.files(repo, revision)]
        sha = self.server.commits(repo, revision)[-1][0]
        private = self.server.repos[repo]["private"]
        self.answer({"_id": "1", "id": repo, "modelId": repo, "sha": sha, "private": private, "siblings": files})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.server.files(repo, revision)
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)}
            for path, content in files.items()
        ]
        self.answer(entries)

    def no_folder(self, body: bytes, repo: str) -> None:
        self.refuse(404, "EntryNotFound", "no such folder")

    # Uploads

    def validate_card(self, body: bytes) -> None:
        """The metadata's form, and the values that the Hub has lists of."""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if match is None:
            return self.answer({"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []})
        data = yaml.safe_load(match.group(1))
        errors = [
            f'"{key}" must be one of {known}'
            for key, known in (("license", LICENSES), ("pipeline_tag", TASKS))
            if key in data and data[key] not in known
        ]
        errors += [
            f'"{key}" holds {value!r}, no id'
            for key in ("datasets", "base_model")
            for value in ([data[key]] if isinstance(data.get(key), str) else data.get(key, []))
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", value)
        ]
        for model in data.get("model-index", []):
            for result in model["results"]:
                names = (result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"])
                numbers = [metric["value"] for metric in result["metrics"]]
                if not all(names) or not all(isinstance(number, float) for number in numbers):
                    errors.append(f'"model-index": {result}')
        messages = [{"message": message} for message in errors]
        return self.answer({"errors": messages, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        there = self.server.files(repo, revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            oid = {"oid": oid_of(path, there[path])} if path in there else {}
            mode = "lfs" if is_large(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer({"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        answers = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.server.objects:
                wanted["actions"] = {"upload": {"href": f"{self.server.endpoint}/objects/{wanted['oid']}"}}
            answers.append(wanted)
        self.answer({"transfer": "basic", "objects": answers})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.server.sent.append((oid, len(body)))
        self.answer({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files, message = dict(self.server.files(repo, revision)), ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    self.server.sent.append((value["path"], len(files[value["path"]])))
                case "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise NotImplementedError(other)
        oid = self.server.commit(repo, revision, message, files)
        self.answer({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    # Downloads

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        files = self.server.files(repo, revision)
        commit = self.server.commits(repo, revision)[-1][0]
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(b"Entry not found", 404, headers | message)
        return self.answer(files[path], 200, headers | {"ETag": f'"{oid_of(path, files[path])}"'})


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("POST", f"/api/models/{REPO}/branch/{REVISION}", Handler.create_branch),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", Handler.tree),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]+)", Handler.upload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
