"""The media of a task's rows: found, checked, and told apart by their bytes.

Enters: a row, and which of its columns hold which modality. Leaves: `Medium`s in the order of the columns. Invariant:
a file that a row names is there when the row is loaded, not only when its turn comes.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from merging_mmer.input_hashes import sha256

_REMOTE = ("http://", "https://", "data:")
_SHOWN = 80


@dataclass(frozen=True)
class Medium:
    """source: a path or URL, or what a dataset holds: its `encoded` bytes, decoded when they are asked for."""

    modality: str
    source: str
    encoded: bytes | None = field(default=None, repr=False)

    @cached_property
    def digest(self) -> str:
        if self.encoded is not None:
            return hashlib.sha256(self.encoded).hexdigest()
        if self.source.startswith(_REMOTE):
            return hashlib.sha256(self.source.encode()).hexdigest()
        return sha256(Path(self.source))

    def value(self) -> Any:
        """What a content block holds: a path or URL, a PIL image, or samples with their rate."""
        if self.encoded is None:
            return self.source
        if self.modality == "image":
            from PIL import Image

            return Image.open(io.BytesIO(self.encoded)).convert("RGB")
        import soundfile

        wave, rate = soundfile.read(io.BytesIO(self.encoded), dtype="float32", always_2d=True)
        return {"array": wave.mean(axis=1), "sampling_rate": rate}


def media_of(
    row: Mapping[str, Any], columns: Mapping[Any, str], folder: Path, where: str, demanded: Any = None
) -> Iterator[Medium]:
    """A row's media: one source or a list in each column. `demanded`: the task names its columns, so each must be
    there; a column that holds null is a row without that medium.
    """
    for modality, column in columns.items():
        if column not in row:
            if demanded:
                raise ValueError(f"{where}: has no {column!r} for its {modality}, only {sorted(row)}")
            continue
        value = row[column]
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            yield _medium(modality, column, one, folder, where)


def _medium(modality: str, column: str, given: Any, folder: Path, where: str) -> Medium:
    if isinstance(given, dict) and given.get("bytes") is not None:  # a column of `datasets` that is not decoded
        if modality not in ("image", "audio"):
            raise ValueError(f"{where}: {column}: found bytes, expected the path of a file for {modality} media")
        return Medium(modality, str(given.get("path") or column), given["bytes"])
    source = given.get("path") if isinstance(given, dict) else given
    if not isinstance(source, str) or not source:
        raise ValueError(f"{where}: {column}: found {repr(given)[:_SHOWN]}, expected the path of a file, or a list")
    if source.startswith(_REMOTE):
        return Medium(modality, source)
    path = folder / source
    if not path.is_file():
        raise ValueError(
            f"{where}: {column}: there is no file {path}; expected a {modality}, its path relative to {folder}"
        )
    return Medium(modality, str(path))


__all__ = ["Medium", "media_of"]
