"""A small Hugging Face Hub in this process, for tests: what huggingface_hub 2.4 and transformers 5.23 ask of it.

It holds repositories of models, and of Spaces ("spaces/org/name"), as the real one does: commits that never change,
branches and pull requests that point at them, files stored `regular` or as LFS. It speaks the real one's routes,
headers and error codes, and wants the real one's token for every write. Xet is not spoken: clients run with
HF_HUB_DISABLE_XET=1.

    with LocalHub() as hub:
        subprocess.run(command, env={**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, ...})
        assert "config.json" in hub.files("org/model")

`hub.fail("GET", r"resolve/.*safetensors", 500)` answers the next matching request with an error; status None cuts the
connection in the middle of the true answer (what was asked is done by then); see `Fault`. Clients order faults by
POST /faults. `hub.log` has every request as (method, path), in order; `hub.ranges` (path, Range) of parts asked for.
"""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .hub_storage import (
    Answer,
    Fault,
    Refusal,
    Repository,
    Request,
    StoredFile,
    apply_step,
    front_matter,
    part_of,
)

# the values of a group are unquoted after the match, so a revision "refs%2Fpr%2F1" is one part of a path
_NAME = r"[\w.-]+/[\w.-]+"
_REPO = rf"(?P<repo>(?:spaces/)?{_NAME})"
_REVISION = r"(?P<revision>[^/]+)"
_API = rf"/api/(?P<repo>(?:models|spaces)/{_NAME})"
ROUTES = (
    ("POST", r"/faults", "order"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    ("GET", _API, "model_info"),
    ("GET", rf"{_API}/revision/{_REVISION}", "model_info"),
    ("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"{_API}/refs", "list_refs"),
    ("GET", rf"{_API}/commits/{_REVISION}", "list_commits"),
    ("POST", rf"{_API}/paths-info/{_REVISION}", "paths_info"),
    ("POST", rf"{_API}/branch/{_REVISION}", "create_branch"),
    ("POST", rf"{_API}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"{_API}/commit/{_REVISION}", "commit"),
)
# these change nothing, and the real Hub answers them to anybody
_ANYBODY = {"validate_yaml", "paths_info"}


class LocalHub:
    """A Hub at `url` while the context lasts.

    `lfs(repo, path)` says which files are stored as LFS. `token` is the one token that may write, and that may read
    private repositories.
    """

    def __init__(self, lfs: Callable[[str, str], bool] = lambda repo, path: False, token: str = "dummy"):
        self.lfs, self.token = lfs, token
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS contents by their sha256
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, str]] = []
        self.over = threading.Event()
        self._lock = threading.RLock()
        self._closed = False

    def __enter__(self) -> "LocalHub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # large files lie at another host, where clients take no token: the same server by its other name
        self.storage = f"http://localhost:{self._server.server_port}/lfs"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """From here on nothing answers at `url`; what the repositories hold can still be read."""
        if not self._closed:
            self._closed = True
            self.over.set()
            self._server.shutdown()
            self._server.server_close()

    # what tests ask

    def files(self, repo: str, revision: str = "main") -> dict[str, StoredFile]:
        repository = self.repos[repo]
        return repository.commits[repository.resolve(revision)].files

    def titles(self, repo: str, revision: str = "main") -> list[str]:
        """The titles of its commits, oldest first."""
        repository = self.repos[repo]
        return [repository.commits[oid].title for oid in reversed(repository.history(repository.resolve(revision)))]

    def put(self, repo: str, folder: Path, title: str = "by hand", ref: str = "main") -> str:
        """Make a repository, new or known, hold the files of a folder, in one commit on `ref`; the commit's id."""
        repository = self.repos.setdefault(repo, Repository())
        contents = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        files = {name: StoredFile(path.read_bytes(), self.lfs(repo, name)) for name, path in contents.items()}
        self.objects |= {stored.sha256: stored.content for stored in files.values() if stored.lfs}
        parent = repository.refs.get(ref, repository.refs["main"])
        return repository.add(files, title, ref, parent)

    def fail(self, method: str, path: str, status: int | None, code: str | None = None, **when: Any) -> Fault:
        fault = Fault(method, path, status, code, **when)
        self.faults.append(fault)
        return fault

    # one request

    def answer(self, request: Request) -> tuple[Answer, Fault | None]:
        """The answer, and the fault that cuts the connection in the middle of it."""
        with self._lock:
            self.log.append((request.method, request.path))
            if request.headers.get("Range"):
                self.ranges.append((request.path, request.headers["Range"]))
            fault = self._fault(request.method, request.path, early=False)
            try:
                if fault is not None and fault.status is not None:
                    raise Refusal(fault.status, "a fault that the test asked for", fault.code)
                return self._route(request), fault
            except Refusal as refusal:
                return refusal.answer, fault if fault is not None and fault.status is None else None

    def cuts_early(self, method: str, path: str) -> bool:
        with self._lock:
            fault = self._fault(method, path, early=True)
            if fault is not None:
                self.log.append((method, path))
            return fault is not None

    def _fault(self, method: str, path: str, early: bool) -> Fault | None:
        return next((fault for fault in self.faults if fault.early == early and fault.strikes(method, path)), None)

    def _order(self, request: Request) -> Answer:
        """The faults from here on, in place of all before."""
        self.faults.clear()
        for wanted in request.json():
            self.fail(**wanted)
        return Answer({})

    def _route(self, request: Request) -> Answer:
        asked = "GET" if request.method == "HEAD" else request.method
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match is None or method != asked:
                continue
            parts: dict[str, Any] = {
                key: unquote(value) for key, value in match.groupdict().items() if value is not None
            }
            known = self._knows(request)
            # an LFS object is reached by an address that the Hub itself gave out
            if asked != "GET" and not known and name not in {*_ANYBODY, "lfs_put"}:
                raise Refusal(401, "Invalid username or password.")
            if "repo" in parts:
                parts["repo"] = self._repository(parts["repo"].removeprefix("models/"), known)
            return getattr(self, f"_{name}")(request, **parts)
        raise Refusal(404, f"no route for {request.method} {request.path}")

    def _knows(self, request: Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.token}"

    def _repository(self, repo: str, known: bool) -> Repository:
        repository = self.repos.get(repo)
        if repository is None or (repository.private and not known):
            # it does not tell strangers which of the two it is
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        return repository

    def _name(self, repository: Repository) -> str:
        return next(name for name, one in self.repos.items() if one is repository)

    # users and repositories

    def _whoami(self, request: Request) -> Answer:
        if not self._knows(request):
            raise Refusal(401, "Invalid credentials in Authorization header")
        organisations = [{"name": "org", "type": "org"}]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Answer({"name": "tester", "type": "user", "orgs": organisations, "auth": token})

    def _validate_yaml(self, request: Request) -> Answer:
        try:
            front_matter(request.json()["content"])
        except yaml.YAMLError as error:
            return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return Answer({"errors": [], "warnings": []})

    def _wanted_name(self, request: Request) -> str:
        wanted = request.json()
        kind = "spaces/" if wanted.get("type") == "space" else ""
        return f"{kind}{wanted.get('organization') or 'tester'}/{wanted['name']}"

    def _create_repo(self, request: Request) -> Answer:
        name = self._wanted_name(request)
        there = name in self.repos
        if not there:
            wanted = request.json()
            if name.startswith("spaces/") and not wanted.get("sdk"):
                raise Refusal(400, "a Space needs an sdk")
            self.repos[name] = Repository(wanted.get("private") is True or wanted.get("visibility") == "private")
        body = {"url": f"{self.url}/{name}", "name": name, "id": name}
        return Answer({"error": "You already created this model repo", **body}, 409) if there else Answer(body)

    def _delete_repo(self, request: Request) -> Answer:
        self._repository(self._wanted_name(request), known=True)
        del self.repos[self._wanted_name(request)]
        return Answer({})

    # reading

    def _model_info(self, request: Request, repo: Repository, revision: str = "main") -> Answer:
        oid = repo.resolve(revision)
        files = repo.commits[oid].files
        name = self._name(repo).removeprefix("spaces/")
        card = front_matter(files["README.md"].content.decode()) if "README.md" in files else {}
        return Answer(
            {
                **{"_id": oid[:24], "id": name, "modelId": name, "author": name.split("/")[0], "sha": oid},
                **{"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0},
                "tags": card.get("tags") or [],
                "siblings": [{"rfilename": path} for path in sorted(files)],
                "cardData": card,
                **{key: card[key] for key in ("pipeline_tag", "library_name") if key in card},
            }
        )

    def _tree(self, request: Request, repo: Repository, revision: str, path: str = "") -> Answer:
        files = repo.commits[repo.resolve(revision)].files
        start = f"{path.rstrip('/')}/" if path else ""
        under = {name: stored for name, stored in sorted(files.items()) if name.startswith(start)}
        if path and not under:
            raise Refusal(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        folders = {name.rpartition("/")[0] for name in under if "/" in name[len(start) :]}
        if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            folders = {start + name[len(start) :].split("/")[0] for name in folders}
            under = {name: stored for name, stored in under.items() if "/" not in name[len(start) :]}
        entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        return Answer(entries + [stored.entry(name) for name, stored in under.items()])

    def _paths_info(self, request: Request, repo: Repository, revision: str) -> Answer:
        files = repo.commits[repo.resolve(revision)].files
        asked = parse_qs(request.data.decode())["paths"]
        return Answer([files[path].entry(path) for path in asked if path in files])

    def _list_refs(self, request: Request, repo: Repository) -> Answer:
        kinds: dict[str, list[dict[str, str]]] = {"branches": [], "pullRequests": [], "converts": [], "tags": []}
        for name, oid in repo.refs.items():
            pull = name.startswith("refs/pr/")
            ref = {"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": oid}
            kinds["pullRequests" if pull else "branches"].append(ref)
        return Answer(kinds)

    def _list_commits(self, request: Request, repo: Repository, revision: str) -> Answer:
        shared = {"message": "", "authors": [{"user": "tester"}], "date": "2026-01-01T00:00:00.000Z"}
        oids = repo.history(repo.resolve(revision))
        return Answer([{"id": oid, "title": repo.commits[oid].title, **shared} for oid in oids])

    def _resolve(self, request: Request, repo: Repository, revision: str, path: str) -> Answer:
        oid = repo.resolve(revision)
        stored = repo.commits[oid].files.get(path)
        if stored is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        if not stored.lfs:
            headers = {"X-Repo-Commit": oid, "ETag": f'"{stored.oid}"'}
            return part_of(request, stored.content, headers)
        # the Hub itself says what the file is, and where it lies
        linked = {"X-Linked-ETag": f'"{stored.sha256}"', "X-Linked-Size": len(stored.content)}
        return Answer(
            b"", 302, {"X-Repo-Commit": oid, "Location": f"{self.storage}/{stored.sha256}", "ETag": '"-"', **linked}
        )

    def _lfs_get(self, request: Request, oid: str) -> Answer:
        if oid not in self.objects:
            raise Refusal(404, "no such object")
        return part_of(request, self.objects[oid], {"ETag": f'"{oid}"'})

    # writing

    def _create_branch(self, request: Request, repo: Repository, revision: str) -> Answer:
        if revision in repo.refs:
            raise Refusal(409, f"Reference already exists: {revision}")
        start = request.json().get("startingPoint", "main") if request.data else "main"
        repo.refs[revision] = repo.resolve(start)
        return Answer({}, 201)

    def _preupload(self, request: Request, repo: Repository, revision: str) -> Answer:
        there = repo.commits[repo.resolve(revision)].files

        def settle(path: str) -> dict[str, Any]:
            mode = "lfs" if self.lfs(self._name(repo), path) else "regular"
            known = {"oid": there[path].sha256 if there[path].lfs else there[path].oid} if path in there else {}
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}

        return Answer({"files": [settle(one["path"]) for one in request.json()["files"]]})

    def _lfs_batch(self, request: Request, repo: Repository) -> Answer:
        objects = [dict(one) for one in request.json()["objects"]]
        for one in objects:
            if one["oid"] not in self.objects:
                one["actions"] = {"upload": {"href": f"{self.storage}/{one['oid']}"}}
        return Answer({"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.data).hexdigest() != oid:
            raise Refusal(400, "the content is not what its name says")
        self.objects[oid] = request.data
        return Answer()

    def _commit(self, request: Request, repo: Repository, revision: str) -> Answer:
        parent = repo.resolve(revision)
        files, title = dict(repo.commits[parent].files), ""
        for line in request.data.splitlines():
            step = json.loads(line)
            if step["key"] == "header":
                title = step["value"]["summary"]
            else:
                apply_step(files, step["key"], step["value"], self.objects)
        extra = {}
        if request.query.get("create_pr", ["0"])[0] in ("1", "true"):
            number = repo.next_pull_request()
            revision = f"refs/pr/{number}"
            extra = {"pullRequestUrl": f"{self.url}/{self._name(repo)}/discussions/{number}"}
        oid = repo.add(files, title, revision, parent)
        url = f"{self.url}/{self._name(repo)}/commit/{oid}"
        return Answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": "", **extra})


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing on stderr: what was asked stands in `hub.log`."""

    def _handle(self):
        url = urlsplit(self.path)
        if self.hub.cuts_early(self.command, url.path):
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self._cut()
        data = self._data()
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, data)
        answer, fault = self.hub.answer(request)
        body = answer.encoded()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **answer.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault is not None else body)
        if fault is not None:
            self.wfile.flush()
            fault.struck.set()
            if fault.hold:
                self.hub.over.wait()
            self._cut()

    def _cut(self):
        self.close_connection = True
        # whoever was killed while it waited is gone already
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _data(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
