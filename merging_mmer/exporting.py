"""`mmer export`: one route of a merged folder as a stock checkpoint, for programs that know nothing of routes.

Enters: a merged folder and the name of a route. Leaves: a folder that transformers loads without code of ours. `base`
and `merged` become the base's causal LM. An expert becomes its own class, its language model with

    θ̂ᵢ = θ₀ + sᵢ⊙mᵢ⊙τ* + BᵢAᵢ

and its own norms, biases and rows of added tokens, its tower unchanged; processor, chat template and generation
config lie beside it. Invariant: weights have the bits that the routed model multiplies with, so on the route's own
tokens logits differ from its by nothing, or by the rounding of a product over another number of rows: the added rows
lie behind the vocabulary here and apart there. A class that does not scale its logits as its language model's own
class does (Aya Vision, Granite Speech) goes on not to; that is a positive factor, and greedy tokens stay.

The ids and texts of added tokens: `exported_tokens.py`. Placeholders, which no route writes, are in
`suppress_tokens` of generation_config.json.
"""

import copy
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from configuration_mmer.composed_config_mmer import ComposedConfig
from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE, ROUTE_NAMES
from processing_mmer.expert_processors_mmer import ExpertProcessor

from .checkpoints import DTYPES, Checkpoint
from .exported_tokens import ExportedTokens
from .folder_checks import MergedFolder
from .naming import HEAD, NamedCheckpoint, class_on_meta, listing, split_names, stored_name
from .shards import ShardWriter, size_in_bytes
from .source_checks import routed_matrix
from .stored import open_folder, read_processor, rewriting


def export_route(
    folder: str | Path,
    route: str,
    out: str | Path,
    dtype: str | None = None,
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
    llm_only: bool = False,
    progress: bool = True,
) -> Path:
    """Write `route` ("base", "merged", an expert's name) of a merged folder as a stock checkpoint; returns its folder.

    dtype: of all floats; as they are stored when absent. llm_only: an expert's language model alone, as a causal LM.
    Raises ValueError for a folder that is not merged, an unknown route, an expert that has no class in transformers
    (unless `llm_only`) and for an `out` that holds something (unless `overwrite`); nothing is left behind then.
    """
    size_in_bytes(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {list(DTYPES)}")
    merged, target = open_folder(folder), Path(os.path.abspath(out)).resolve()
    _check_target(merged.folder.resolve(), target, overwrite)
    export = _Export(merged, route, llm_only, None if dtype is None else DTYPES[dtype])
    with rewriting(target) as unfinished:
        writer = ShardWriter(unfinished, max_shard_size)
        for name, tensor in tqdm(export.tensors(), desc="Exporting", unit="tensor", disable=not progress):
            writer.add(name, tensor)
        writer.close()
        export.write_words(unfinished)
        written = NamedCheckpoint(Checkpoint(unfinished), class_on_meta(export.config, export.multimodal))
        if written.missing:
            raise ValueError(
                f"{type(export.model).__name__} would not find {listing(written.missing)} in what was written, "
                "expected every tensor. Export this route with llm_only (--llm-only)"
            )
    return target


def _check_target(merged: Path, target: Path, overwrite: bool):
    if target == merged or target in merged.parents or merged in target.parents:
        raise ValueError(f"{target} is, holds or lies in the merged folder {merged}. Give a folder beside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise ValueError(f"{target} is not empty. Give another folder, or overwrite=True (--overwrite)")
        if not (target / "config.json").is_file():
            raise ValueError(f"{target} has no config.json, expected a checkpoint to replace. Give another folder")


class _Export:
    def __init__(self, merged: MergedFolder, route: str, llm_only: bool, dtype: torch.dtype | None):
        names = merged.config.expert_names
        if route not in (*ROUTE_NAMES, *names):
            raise ValueError(f"route is {route!r}, expected one of {[*ROUTE_NAMES, *names]}")
        self.merged, self.name, self.dtype = merged, route, dtype
        self.expert = route if route in names else None
        self.multimodal = self.expert is not None and not llm_only
        known = {"base": BASE_ROUTE, "merged": MERGED_ROUTE}
        self.route = known[route] if self.expert is None else FIRST_EXPERT_ROUTE + names.index(route)
        self._check_class()
        self.words = ExportedTokens(merged.config, read_processor(merged), self.route)
        self.own = None if self.expert is None else self.words.processor.experts[self.expert]
        self.tokenizer, self.vocabulary = self.words.tokenizer, self.words.vocabulary
        self.config = self._config()
        self.model: PreTrainedModel = class_on_meta(self.config, self.multimodal)

    def _check_class(self):
        if not self.multimodal:
            return
        advice = f"Export its language model alone, as a causal LM, with llm_only (--llm-only): route {self.name!r}"
        kind = self.merged.config.experts[self.name]["config"]["model_type"]
        if kind == ComposedConfig.model_type:
            raise ValueError(
                f"expert {self.name!r} is of another code base, its tower is of ours; expected a class of "
                f"transformers, that others can load. {advice}"
            )
        try:
            class_on_meta(self.merged.config.expert_config(self.name), multimodal=True)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"expert {self.name!r} has model_type {kind!r} ({error}), expected a class of transformers. {advice}"
            ) from error

    @property
    def _placeholders(self) -> list[int]:
        every = self.merged.config.placeholder_experts()
        return sorted(self.words.ids[place] for place in every if place in self.words.ids)

    # config

    def _config(self) -> PreTrainedConfig:
        text = copy.deepcopy(self.merged.config.text_config)
        rows = max([text.vocab_size, *(place + 1 for place in self.words.ids.values())])
        dtype = self.dtype or self.merged.dtype
        if self.multimodal:
            config = self.merged.config.expert_config(self.name)
            own = config.get_text_config()
            self._number_anew(config)
            # what a class reads of the two may be either
            for part in (config, own):
                part.tie_word_embeddings = text.tie_word_embeddings
                part.dtype = dtype
            own.vocab_size = rows
        else:
            config = text
            config.vocab_size, config.dtype = rows, dtype
        vars(config).pop("auto_map", None)
        config.architectures = [type(class_on_meta(config, self.multimodal)).__name__]
        return config

    def _number_anew(self, config: PreTrainedConfig):
        """Ids of added tokens in an expert's config. Raises ValueError for one whose token cannot be known."""
        own, known = self.own, self.vocabulary
        assert own is not None
        places: dict[int, int] = {}
        for modality, entry in own.placeholders.items():
            for key in (f"{modality}_token_id", f"{modality}_token_index"):
                if isinstance(before := getattr(config, key, None), int):
                    places[before] = self.words.ids.get(entry["id"], entry["id"])
                    break
        unmoved = all(before == after for before, after in places.items())
        words = self.words.renamed({**own.special_tokens, **own.tokens})
        last = max([self.words.base_tokens - 1, *self.words.ids.values()])
        rows = config.get_text_config().vocab_size  # of the expert's own matrix: an id behind it was never read
        for part in {id(one): one for one in (config, config.get_text_config())}.values():
            for key, value in list(vars(part).items()):
                stem = key.removesuffix("_id").removesuffix("_index")
                if not key.endswith(("_token_id", "_token_index")) or not isinstance(value, int):
                    continue
                if value in places:
                    setattr(part, key, places[value])
                elif value < self.words.base_tokens or value >= rows or (unmoved and value <= last):
                    continue
                elif words.get(stem) in known:
                    setattr(part, key, known[words[stem]])
                else:
                    raise ValueError(
                        f"expert {self.name!r}: its config has {key} {value}, an added token whose text the folder "
                        "does not hold, expected one that its processor names. Export its language model alone with "
                        "llm_only (--llm-only)"
                    )

    # tensors

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the files, tensor), one at a time, as save_pretrained of the class would name them."""
        llm, tower = split_names(self.model)
        tied = set(self.model.all_tied_weights_keys)
        for name, full in llm.items():
            if full not in tied:
                yield from self._saved(full, self._language_model(name))
        for name, full in tower.items():
            if full not in tied:
                yield from self._saved(full, self.merged.checkpoint.tensor(f"model.experts.{self.name}.{name}"))

    def _saved(self, full: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        yield from revert_weight_conversion(self.model, {full: tensor}).items()

    def _language_model(self, name: str) -> torch.Tensor:
        """A tensor of the route, by the base's name."""
        if name == f"{HEAD}.weight" and self.merged.config.text_config.tie_word_embeddings:
            name = self._embedding
        tensor = self._route_tensor(name)
        if name == self._embedding:
            return self._with_rows(tensor, "model.added_embeddings.weight")
        if name == f"{HEAD}.weight":
            return self._with_rows(tensor, "added_head.weight")
        return tensor

    @cached_property
    def _embedding(self) -> str:
        """The base's name of the embedding."""
        weight = self.model.get_input_embeddings().weight
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        llm, _ = split_names(self.model)
        return next(name for name, full in llm.items() if parameters.get(full) is weight and name != f"{HEAD}.weight")

    def _route_tensor(self, name: str) -> torch.Tensor:
        config, read, stored = self.merged.config, self.merged.checkpoint.tensor, stored_name(name)
        module, _, leaf = name.rpartition(".")
        prefix = stored.removesuffix(f".{leaf}")
        if self.route != BASE_ROUTE and leaf == "weight" and module in config.delta_modules:
            matrix = routed_matrix(self.merged, prefix)
            with torch.no_grad():
                return matrix.route_weight(self.route)
        if self.route != BASE_ROUTE and name in config.expert_tensors:
            if self.expert is None:
                return read(f"{prefix}.merged_{leaf}")
            return read(f"{prefix}.expert_{leaf}")[self.route - FIRST_EXPERT_ROUTE]
        return read(stored)

    def _with_rows(self, matrix: torch.Tensor, stored: str) -> torch.Tensor:
        """`matrix` with the rows of the route's added tokens at their exported ids."""
        rows = self.config.get_text_config().vocab_size
        if not self.words.ids:
            return matrix
        made = torch.cat([matrix, matrix.new_zeros(rows - len(matrix), matrix.shape[1])])
        added, table = self.merged.checkpoint.tensor(stored), self.merged.config.added_rows()[self.route]
        for token, row in zip(self.merged.config.added_tokens, table, strict=True):
            if token["id"] in self.words.ids:
                made[self.words.ids[token["id"]]] = added[row].to(made.dtype)
        return made

    # beside the tensors

    def write_words(self, folder: Path):
        self.config.save_pretrained(folder)
        path = self.merged.folder / "generation_config.json"
        text = self.config.get_text_config()
        special = {key: getattr(text, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = GenerationConfig.from_pretrained(path.parent) if path.is_file() else GenerationConfig(**special)
        if self._placeholders:
            generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), *self._placeholders})
        generation.save_pretrained(folder)
        (self._processor() if self.multimodal else self.tokenizer).save_pretrained(folder)
        again = type(self.tokenizer).from_pretrained(folder)
        known = again.get_vocab()
        if known != self.vocabulary or max(known.values()) >= text.vocab_size:
            raise ValueError(
                f"the tokenizer of route {self.name!r} is read back with other ids than it was written with, expected "
                "the same. Export route 'merged', whose ids are those of the folder"
            )

    def _processor(self) -> Any:
        """The expert's own processor, with the exported ids."""
        assert self.own is not None
        known, values = self.vocabulary, self.words.renamed(self.own.to_dict())
        values.pop("reading", None)  # the tokenizer reads so already
        for entry in values["placeholders"].values():
            entry["id"] = known[entry["token"]]
        processor = ExpertProcessor.from_dict(values, self.tokenizer, self.words.templates().get("default")).processor
        processor.tokenizer = self.tokenizer  # a view of it forgets what it was built with
        if self.words.templates():
            processor.chat_template = self.tokenizer.chat_template
        return processor


__all__ = ["export_route"]
