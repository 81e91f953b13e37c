"""The originals of a merged folder, as anyone would load them: each expert by its own class and processor, the base.

Enters: a recipe, which says where they are. Leaves: an `OriginalSubject` for one of them. A checkpoint of transformers
is loaded by its class, a LoRA on it by PEFT; what PEFT cannot place (an adapter that was trained on the bare LLM) and
checkpoints of other code are put into their class tensor by tensor, as the merge read them. Invariant: nothing of the
merged folder's weights is in an original.
"""

import copy
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers.initialization import no_init_weights

from merging_mmer.base import Base
from merging_mmer.checkpoints import Checkpoint
from merging_mmer.experts import Expert, open_expert
from merging_mmer.input_hashes import sha256
from merging_mmer.lora import ADAPTER_FILES
from merging_mmer.pretrained import CONFIG, GENERATION, PROCESSOR_PARTS, TOKENIZER_PARTS, naming
from merging_mmer.recipe import Recipe
from processing_mmer.processing_mmer import MMERProcessor

from .subjects import OriginalSubject

BASE = "base"  # what answered text before there were experts


def settings_files(folders: Iterable[Path]) -> list[Path]:
    """What an answer depends on beside the weights: configs, tokenizer, processor, template."""
    names = {CONFIG, GENERATION, *TOKENIZER_PARTS, *PROCESSOR_PARTS}
    return sorted(folder / name for folder in folders for name in names if (folder / name).is_file())


class Originals:
    """Opens one original at a time; `recipe` is the merged folder's, or one that says where they are now."""

    def __init__(self, recipe: Recipe, processor: MMERProcessor, trust_remote_code: bool = False):
        self.recipe, self.processor, self.trust = recipe, processor, trust_remote_code
        self._experts: dict[str, Expert] = {}

    @cached_property
    def base(self) -> Base:
        return Base(self.recipe.base, self.trust)

    def _open(self, name: str) -> Base | Expert:
        if name == BASE:
            return self.base
        if name not in self.recipe.experts:
            raise ValueError(f"the recipe has no expert {name!r}, only {list(self.recipe.experts)}: give another")
        if name not in self._experts:
            self._experts[name] = open_expert(name, self.recipe.experts[name], self.base, self.trust)
        return self._experts[name]

    def open(self, names: Iterable[str]):
        """Open these. Raises ValueError for one that is not to be had."""
        for name in names:
            self._open(name)

    def source(self, name: str) -> str:
        """A Hub id as the recipe has it; of folders their names alone."""
        expert = None if name == BASE else self.recipe.experts[name]
        sources = [self.recipe.base] if expert is None else [expert.model, expert.lora, expert.tower]
        return " + ".join(Path(one).name if Path(one).is_dir() else one for one in sources if one)

    def hashes(self, name: str) -> list[str]:
        """sha256 of the files that make it what it is."""
        files = self._open(name).files()
        return [sha256(file) for file in (*files, *settings_files({file.parent for file in files}))]

    def load(self, name: str, dtype: torch.dtype | str, device: str) -> OriginalSubject:
        opened = self._open(name)
        if isinstance(opened, Base):
            kind, tokenizer = type(opened.weights.model), opened.load_tokenizer(self.trust)
            with naming(opened.folder):
                model: Any = kind.from_pretrained(opened.folder, dtype=dtype)
            return OriginalSubject(name, model.to(device), tokenizer, None)
        processor = opened.load_processor(self.trust)
        model = _stock(opened, dtype)
        if model is None:
            model = _filled(opened, dtype)
            _with_rows(model, 1 + max(processor.tokenizer.get_vocab().values()))
        return OriginalSubject(name, model.to(device), processor, self.processor.experts[name])


def _stock(expert: Expert, dtype: torch.dtype | str) -> Any:
    """By transformers and PEFT; None where they do not know its layout or cannot place its adapter."""
    if expert.reading is not None or not expert.has_llm:
        return None
    beside = expert.adapter_folder == expert.tower_folder  # transformers loads such an adapter with the weights
    with naming(expert.tower_folder):
        model: Any = type(expert.weights.model).from_pretrained(expert.tower_folder, dtype=dtype)
    if expert.adapter is None or beside:
        return model
    assert expert.adapter_folder is not None
    with naming(expert.adapter_folder):
        tuned = PeftModel.from_pretrained(model, expert.adapter_folder)
    placed = get_peft_model_state_dict(tuned)
    return tuned if set(placed) == set(Checkpoint(expert.adapter_folder, ADAPTER_FILES).keys()) else None


def _filled(expert: Expert, dtype: torch.dtype | str) -> Any:
    """Its class with the tensors that the merge read, LoRAs folded in."""
    meta = expert.weights.model
    kept = expert.stored(expert.base.embedding).dtype if dtype == "auto" else dtype
    with no_init_weights():
        model: Any = type(meta)._from_config(copy.deepcopy(meta.config), dtype=kept)
    own = model.state_dict()
    with torch.no_grad():
        for name in expert.base.names:
            own[expert.llm[name]].copy_(expert.exact_tensor(name))
        for name, full in expert.tower.items():
            own[full].copy_(expert.tower_tensor(name))
    model.tie_weights()
    return model


def _with_rows(model: Any, tokens: int):
    """Rows for tokens that stand where features go and have none: they are read, and never written."""
    rows = len(model.get_input_embeddings().weight)
    if tokens > rows:
        model.resize_token_embeddings(tokens, mean_resizing=False)
        model.generation_config.suppress_tokens = list(range(rows, tokens))


__all__ = ["BASE", "Originals", "settings_files"]
