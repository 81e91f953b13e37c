"""The Hub form: the shipped files, flat, beside the weights.

transformers loads remote code from one flat folder, and only through imports that start with one dot. So a file whose
name ends in `_mmer.py` is copied flat, and `from <room>.<file> import` becomes `from .<file> import`; nothing else
changes. Invariant: what was loaded from the Hub writes itself back the same way, without the rooms being installed.
"""

import inspect
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOMS = ("configuration_mmer", "processing_mmer", "modeling_mmer")
AUTO_MAP = {
    "AutoConfig": "configuration_mmer.MMERConfig",
    "AutoModel": "modeling_mmer.MMERForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_mmer.MMERForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_mmer.MMERForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_mmer.MMERForConditionalGeneration",
    "AutoProcessor": "processing_mmer.MMERProcessor",
}
_ROOM_IMPORT = re.compile(rf"^(\s*)from (?:{'|'.join(ROOMS)})\.(\w+) import", re.MULTILINE)


def shipped_files() -> list[Path]:
    """The source files that travel, whether this is a checkout, an installed package or already a flat copy."""
    here = Path(__file__).resolve().parent
    if here.name in ROOMS:
        return sorted(path for room in ROOMS for path in (here.parent / room).glob("*_mmer.py"))
    return sorted(here.glob("*_mmer.py"))


def write_hub_code(folder: str | Path) -> list[Path]:
    """Write the shipped files flat into `folder` and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source in shipped_files():
        target = folder / source.name
        target.write_text(_ROOM_IMPORT.sub(r"\1from .\2 import", source.read_text(encoding="utf-8")), encoding="utf-8")
        written.append(target)
    return written


class HubCodeMixin:
    """`save_pretrained` also writes the flat code and the full `auto_map`, and `push_to_hub` uploads all of it.

    The upload is one commit of what was saved and of nothing else that lies in the folder. A model card that the Hub
    has stays; without one the folder's own goes up, or a short one. Weights of an earlier push under other names go
    in the same commit: transformers would load a stale `model.safetensors` before any shards.
    """

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; with `push_to_hub` it takes the arguments of that too, and `repo_id`."""
        save = super().save_pretrained  # type: ignore[misc]
        given = dict(inspect.signature(save).bind(save_directory, *args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        folder = Path(given.pop("save_directory"))
        if given.pop("push_to_hub", False):
            upload = {key: given.pop(key) for key in _UPLOAD_ARGUMENTS if key in given}
            return self._save_and_upload(folder, given, **{"repo_id": folder.resolve().name, **upload})[0]
        write_hub_code(folder)
        config = getattr(self, "config", None)
        if config is None:
            self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
            # set on what came from the Hub; with it transformers writes an auto_map into tokenizer_config.json too
            self._auto_class = None
        else:
            config.auto_map = dict(AUTO_MAP)
        return save(folder, **given)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | str | None = None,
    ):
        """Arguments and result (huggingface_hub's CommitInfo) as in transformers."""
        values = locals()
        upload = {key: values[key] for key in _UPLOAD_ARGUMENTS}
        with TemporaryDirectory() as folder:
            return self._save_and_upload(Path(folder), {"max_shard_size": max_shard_size}, **upload)[1]

    def _save_and_upload(
        self, folder, save, repo_id, private=None, token=None, revision=None, create_pr=False, tags=None, **words
    ):
        """What `save_pretrained(folder, **save)` returned, and the commit; None on a process that does not write."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        on_this_rank = getattr(self, "should_save_on_this_rank", bool)
        if not on_this_rank(save.get("is_main_process", True)):
            return self.save_pretrained(folder, **save), None
        api = HfApi(token=token)
        # before the work of saving: who may not write shall learn it now
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = _times(folder)
        saved = self.save_pretrained(folder, **save)
        written = {path for path, time in _times(folder).items() if before.get(path) != time} - {"README.md"}
        there = api.list_repo_files(repo_id, revision=revision)
        operations: list[Any] = [CommitOperationAdd(path, folder / path) for path in sorted(written)]
        if any(_WEIGHTS.fullmatch(path) for path in written):
            stale = [path for path in there if _WEIGHTS.fullmatch(path) and path not in written]
            operations += [CommitOperationDelete(path) for path in stale]
        tags = [*(getattr(self, "model_tags", None) or []), *([tags] if isinstance(tags, str) else tags or [])]
        card = folder / "README.md"
        if "README.md" in there and tags:
            card = Path(api.hf_hub_download(repo_id, "README.md", revision=revision))
        if "README.md" not in there or tags:
            operations.append(CommitOperationAdd("README.md", _card(card, repo_id, tags).encode()))
        message = words.get("commit_message") or f"Upload {'model' if hasattr(self, 'config') else 'processor'}"
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            commit_description=words.get("commit_description"),
            revision=revision,
            create_pr=create_pr,
        )
        return saved, commit


_UPLOAD_ARGUMENTS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags",
)  # fmt: skip
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_CARD = """\
---
library_name: transformers
pipeline_tag: any-to-any
tags:
- mmer
---

# {repo_id}

A multimodal model merged by [MMER](https://arxiv.org/abs/2505.17110). Its code lies beside its weights.

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
```
"""


def _times(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path -> (time of the last change in ns, bytes), of every file under `folder`."""
    facts = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in facts.items()}


def _card(path: Path, repo_id: str, tags: list[str]) -> str:
    from huggingface_hub import ModelCard

    text = path.read_text(encoding="utf-8") if path.is_file() else _CARD.format(repo_id=repo_id)
    if not tags:
        return text
    card: Any = ModelCard(text)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    return str(card)
