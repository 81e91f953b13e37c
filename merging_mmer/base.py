"""The base LLM, opened lazily: a bare causal LLM, or the language model of a multimodal checkpoint.

Enters: the base's source. Leaves: `Base`, θ₀ tensor by tensor under the names relative to the `AutoModel` of the LLM
("layers.0.self_attn.q_proj.weight", "lm_head.weight"), with the LLM's own config. Invariants: names, shapes and config
are those of the bare LLM, whichever checkpoint it comes from; a multimodal class whose text is not what that LLM
computes is refused; its tower is never read, and `notes` says that it is left out.
"""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import Checkpoint, fetch
from .fitness import RULES, misfit
from .head_check import check_head
from .layouts import find_layout
from .naming import HEAD, NamedCheckpoint, class_on_meta, delta_module_names, listing, split_names
from .pretrained import CONFIG, at_most, check_generation, load_config, most_tensors, naming, read_json
from .pretrained import load_tokenizer as read_tokenizer

_HEAD = f"{HEAD}.weight"


class Base:
    """θ₀. `names` are the tensors of the LLM relative to its `AutoModel`, without a head that is the embedding.

    Raises ValueError for a checkpoint that is no base, with what was found. `weights` holds the checkpoint under the
    names of its own class, `config` is the LLM's, `notes` what a user should know of how it was read.
    """

    def __init__(self, source: str, trust_remote_code: bool = False):
        self.source, self.folder = source, fetch(source)
        self.notes: list[str] = []
        if (layout := find_layout(self.folder)) is not None:
            raise ValueError(
                f"{self.folder}: this is a checkpoint of the layout {layout.name!r}, expected a language model or a "
                "multimodal checkpoint as transformers writes it. Give the LLM that it was tuned from, or what "
                "transformers' own script made of it, as base"
            )
        config = load_config(self.folder, trust_remote_code)
        check_generation(self.folder)
        checkpoint = Checkpoint(self.folder)
        with naming(self.folder / CONFIG), at_most(most_tensors(checkpoint.keys())):
            model = self._class_of(config, trust_remote_code)
        self.weights = NamedCheckpoint(checkpoint, model)
        self.full_names, tower = split_names(model)
        multimodal = bool(tower) or config.get_text_config() is not config
        self.config: PreTrainedConfig = self._text_config(config) if multimodal else config
        with naming(self.folder / CONFIG), at_most(most_tensors(checkpoint.keys())):
            bare = class_on_meta(self.config, False, trust_remote_code) if multimodal else model
        modules = delta_module_names(bare)
        self.delta_weights = {f"{name}.weight" for name in modules}
        self.embedding = next(f"{n}.weight" for n, module in modules.items() if module is bare.get_input_embeddings())
        self._bare = {full: name for name, full in split_names(bare)[0].items()}
        if multimodal:
            self._take_language_model(model, bare, sorted({name.split(".")[0] for name in tower}))
        if missing := set(self.full_names.values()) & self.weights.missing:
            raise ValueError(f"{checkpoint.named()}: the base lacks {listing(missing)}, which its {CONFIG} asks for")
        with naming(self.folder / CONFIG):
            check_head(bare, self.config)
        self.tied = bool(self.config.tie_word_embeddings)
        head = self.full_names.pop(_HEAD, None) if self.tied else None
        self._tied_head = head
        self.relative = {full: name for name, full in self.full_names.items()}
        self.shapes = {name: tuple(self.weights.meta[full].shape) for name, full in self.full_names.items()}

    def _class_of(self, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
        """The class of the checkpoint: multimodal where transformers has such a one for a config of several parts."""
        if config.get_text_config() is config:
            return class_on_meta(config, False, trust_remote_code)
        try:
            model = class_on_meta(config, True, trust_remote_code)
        except ValueError:
            model = class_on_meta(config, False, trust_remote_code)
        if (found := misfit(model, config)) is not None:
            raise ValueError(
                f"{self.folder}: {type(model).__name__} has {found[1]}, so its text is not what its language model "
                f"alone computes. {RULES[found[0]][1]}. Give a language model that stands by itself as base"
            )
        return model

    def _text_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The language model's config, with what the checkpoint says of it beside."""
        text = config.get_text_config()
        if text is config:
            raise ValueError(
                f"{self.folder}: its class has a tower, but its config ({config.model_type!r}) has none of the "
                "language model's own, so that cannot be taken alone. Give the bare LLM as base"
            )
        text = copy.deepcopy(text)
        text.dtype = text.dtype or config.dtype
        generation = (self.folder / "generation_config.json").is_file()
        if not generation and getattr(config, "eos_token_id", None) is not None:
            # without one, generation is told by the config when to stop, and by the whole model's first
            text.eos_token_id = config.eos_token_id
        return text

    def _take_language_model(self, model: PreTrainedModel, bare: PreTrainedModel, tower: list[str]):
        """Hold the multimodal class's names, head and ties against the bare LLM's."""
        kinds = f"{type(model).__name__} and {type(bare).__name__}"
        ours, theirs = set(self.full_names), set(self._bare.values())
        if ours != theirs:
            raise ValueError(
                f"{self.folder}: the language models in {kinds} name their tensors differently. Only the first: "
                f"{listing(ours - theirs) or 'none'}; only the second: {listing(theirs - ours) or 'none'}. Give the "
                "bare LLM as base"
            )
        head, embedding = self.full_names.get(_HEAD), self.full_names[self.embedding]
        tied = head in model.all_tied_weights_keys
        if head is not None and not tied and self.config.tie_word_embeddings:
            # not every class declares that it ties; such checkpoints have the head once, or twice alike
            self.weights.alias(head, embedding)
            both = {head, embedding} <= set(self.weights.sources)
            tied = both and torch.equal(self.weights.tensor(head), self.weights.tensor(embedding))
        self.config.tie_word_embeddings = tied
        try:
            check_head(model, self.config)
        except ValueError as error:
            raise ValueError(
                f"{self.folder}: the text of {kinds} differs: {error}, such as a bare LLM of model_type "
                f"{self.config.model_type!r}"
            ) from error
        self.notes.append(
            f"the base is the language model in a {type(model).__name__}, alone: {', '.join(tower)} of that "
            "checkpoint are left out"
        )

    def untie(self):
        """Keep the head apart from the embedding, with the same values: an expert has a head of its own."""
        if not self.tied or self._tied_head is None:
            return
        name, self.tied = _HEAD, False
        self.full_names[name], self.relative[self._tied_head] = self._tied_head, name
        self.shapes[name] = self.shapes[self.embedding]
        self.config = copy.deepcopy(self.config)
        self.config.tie_word_embeddings = False

    @property
    def names(self) -> list[str]:
        return list(self.full_names)

    @property
    def vocabulary_names(self) -> tuple[str, ...]:
        return (self.embedding,) if self.tied else (self.embedding, _HEAD)

    def tensor(self, name: str) -> torch.Tensor:
        return self.weights.tensor(self.full_names[name])

    def relative_name(self, path: str) -> str | None:
        """A name in the checkpoint's class, old or new, or in the bare LLM's -> the relative one; None for others."""
        full, pattern = self.weights.rename(path)
        if pattern is not None:
            return None
        if full.startswith(f"{HEAD}."):
            return full
        return self.relative.get(full) or self._bare.get(path)

    def load_tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """The folder's tokenizer, with the chat template that older multimodal checkpoints keep for the processor."""
        tokenizer = read_tokenizer(self.folder, trust_remote_code)
        beside = self.folder / "chat_template.json"
        if tokenizer.chat_template is None and beside.is_file():
            with naming(beside):
                tokenizer.chat_template = read_json(beside)["chat_template"]
        return tokenizer

    def files(self) -> list[Path]:
        """Every file that was read of it, weights first."""
        return [*self.weights.checkpoint.files, self.folder / "config.json"]


__all__ = ["Base"]
