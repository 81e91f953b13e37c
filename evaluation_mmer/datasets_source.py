"""Rows of a dataset by the `datasets` library, which is imported when a task asks for one.

Enters: a Hub id or a folder, with config, split and revision. Leaves: rows; pictures and sounds as the bytes that the
dataset holds, read later as every other file is. Invariant: nothing is decoded here, so rows have a digest.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class DatasetSource(BaseModel):
    """dataset: a Hub id, or a folder relative to the tasks' file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    config: str | None = None
    split: str = "test"
    revision: str | None = None

    @property
    def named(self) -> str:
        return f"{self.dataset} ({', '.join(part for part in (self.config, self.split) if part)})"


def dataset_rows(source: DatasetSource, folder: Path, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dataset and place, row), in order. Raises ValueError where the library or the dataset is not to be had."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{where}: data: {source.named} needs the library `datasets`: pip install datasets, or give a JSONL file"
        ) from error
    here = folder / source.dataset
    name = str(here) if here.is_dir() else source.dataset
    try:
        data = datasets.load_dataset(name, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{where}: data: {source.named} cannot be loaded: {error}") from error
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            data = data.cast_column(column, type(feature)(decode=False))
    for place, row in enumerate(data):
        yield f"{source.named}[{place}]", row


__all__ = ["DatasetSource", "dataset_rows"]
