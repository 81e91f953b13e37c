"""What the Hub of local_hub.py holds: repositories, their commits and files; what it is asked, and what it answers."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    data: bytes

    def json(self) -> Any:
        return json.loads(self.data)


@dataclass
class Fault:
    """What happens to the `times` matching requests after the first `skip`. Status None: the connection is cut.

    hold: it is not cut, but nothing comes behind the first half. early: it is cut when half of what the client sends
    has come. `struck` is set when half of an answer was sent.
    """

    method: str
    path: str
    status: int | None
    code: str | None = None
    skip: int = 0
    times: int = 1
    hold: bool = False
    early: bool = False
    struck: threading.Event = field(default_factory=threading.Event)

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path) or not self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Answer:
    body: Any = b""
    status: int = 200
    headers: dict[str, Any] = field(default_factory=dict)

    def encoded(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Refusal(Exception):
    """An error answer of the Hub; `code` goes into X-Error-Code, which is what clients tell errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: Any):
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer = Answer({"error": message}, status, {**named, **headers})


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    files: dict[str, StoredFile]
    title: str
    parent: str | None


class Repository:
    """Commits by id, and the branches ("main") and pull requests ("refs/pr/1") that point at them."""

    def __init__(self, private: bool = False):
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.add({}, "initial commit", "main", None)

    def add(self, files: dict[str, StoredFile], title: str, ref: str, parent: str | None) -> str:
        listing = [(path, stored.oid) for path, stored in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([title, ref, parent, listing, len(self.commits)]).encode()).hexdigest()
        self.commits[oid] = Commit(files, title, parent)
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def history(self, oid: str | None) -> list[str]:
        found = []
        while oid is not None:
            found.append(oid)
            oid = self.commits[oid].parent
        return found

    def next_pull_request(self) -> int:
        return 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)


def apply_step(files: dict[str, StoredFile], key: str, value: dict[str, Any], objects: dict[str, bytes]):
    """One line of a commit; `objects` are the uploaded LFS contents by sha256."""
    path = value["path"]
    if key == "file":
        files[path] = StoredFile(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in objects:
            raise Refusal(400, f"{path}: its content was not uploaded")
        files[path] = StoredFile(objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
        if not gone:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Refusal(400, f"a commit with {key!r} is not understood")


def part_of(request: Request, content: bytes, headers: dict[str, Any]) -> Answer:
    """The content, or the range of it that was asked for."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if match is None:
        return Answer(content, 200, headers)
    first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
    if first >= len(content):
        raise Refusal(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
    return Answer(content[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a README.md: {} when there is none. Raises yaml.YAMLError."""
    match = re.match(r"---\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    return (yaml.safe_load(match[1]) or {}) if match else {}
