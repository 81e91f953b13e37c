"""Sentence embeddings by a model of transformers: the mean of the last hidden states, of length 1.

Enters: texts, and the source of a sentence-transformers model that is an encoder, mean pooling and no more
(all-MiniLM-L6-v2, all-mpnet-base-v2 and most others). Leaves: float32 (texts, dimensions). Invariant: padding does not
count, and a model that pools in another way is refused, not pooled by its mean.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from merging_mmer.checkpoints import fetch

_BATCH = 64
_POOLED, _PARTS = "1_Pooling/config.json", "modules.json"
_KNOWN_PARTS = ("Transformer", "Pooling", "Normalize")


def embed(texts: Sequence[str], source: str, batch_size: int = _BATCH) -> np.ndarray:
    """Raises ValueError for a model that is not pooled by its mean."""
    folder = fetch(source)
    longest = _check_parts(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        given = tokenizer(
            [texts[place] for place in places], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        found[places] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return found


def _check_parts(folder: Path) -> int | None:
    """The most tokens that the model reads, where it says so."""
    pooling = _json(folder / _POOLED, {"pooling_mode_mean_tokens": True})
    modes = sorted(name for name, used in pooling.items() if name.startswith("pooling_mode_") and used is True)
    if (named := pooling.get("pooling_mode", "mean")) != "mean" or modes not in ([], ["pooling_mode_mean_tokens"]):
        raise ValueError(
            f"{folder / _POOLED}: found {modes or named}, expected the mean of all tokens: give another model"
        )
    parts = [str(part.get("type", "")).rpartition(".")[2] for part in _json(folder / _PARTS, [])]
    if strangers := [part for part in parts if part not in _KNOWN_PARTS]:
        raise ValueError(
            f"{folder / _PARTS}: found {strangers}, expected {list(_KNOWN_PARTS)} alone. Give another embedding model"
        )
    return _json(folder / "sentence_bert_config.json", {}).get("max_seq_length")


def _json(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else absent


__all__ = ["embed"]
