"""The Hub form: the shipped files, flat, beside the weights.

transformers loads remote code from one flat folder, and only through imports that start with one dot. So a file whose
name ends in `_mmer.py` is copied flat, and `from <room>.<file> import` becomes `from .<file> import`; nothing else
changes. Invariant: what was loaded from the Hub writes itself back the same way, without the rooms being installed.
"""

import re
from pathlib import Path

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
    """`save_pretrained` that writes the flat code and the full `auto_map`; `push_to_hub` of transformers goes through
    it.
    """

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        if push_to_hub:
            # transformers notes the files' times before our code is written, and would leave it behind
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            upload = {key: kwargs.pop(key) for key in _UPLOAD_ARGUMENTS if key in kwargs}
            saved = self.save_pretrained(save_directory, **kwargs)
            self.push_to_hub(repo_id, **upload)
            return saved
        write_hub_code(save_directory)
        config = getattr(self, "config", None)
        if config is None:
            self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        else:
            config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, **kwargs)


_UPLOAD_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
