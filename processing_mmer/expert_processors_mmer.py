"""An expert's own processor inside a merged model: kept, saved, rebuilt, and asked for tensors and placeholder text.

Enters: one expert's processor, whose tokenizer becomes a view of the merged one. Leaves: the tensors that this
processor makes of media, under its own names, and for each medium the text that stands for it. Invariant: it runs as
it ran alone; only the names of its placeholder tokens may differ.
"""

import copy
import inspect
import json
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .composed_processor_mmer import ComposedProcessor  # noqa: F401  (its class is found by name)
from .media_mmer import ARGUMENTS
from .processor_classes_mmer import class_by_name

_TEXT_OUTPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "text_replacement_offsets",
    "video_metadata",
)


def tokenizer_view(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, str]) -> PreTrainedTokenizerBase:
    """The same tokenizer, with the named tokens (`image_token`, `boi_token`, …) that one expert's processor asks it
    for.

    The vocabulary is shared; what the tokenizer was built with is not, since a processor takes settings from there.
    """
    view = copy.copy(tokenizer)
    view.init_kwargs = {}
    for name, token in tokens.items():
        vars(view)[name] = token
        vars(view)[f"{name}_id"] = tokenizer.convert_tokens_to_ids(token)
    return view


def reading_tokenizer(tokenizer: PreTrainedTokenizerBase, reading: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The same vocabulary, read as an expert's own tokenizer reads it.

    `reading` holds parts of that expert's tokenizer.json (normalizer, pre_tokenizer, post_processor); none means the
    tokenizer itself. Raises ValueError where such parts come for a tokenizer that has no tokenizer.json.
    """
    if not reading:
        return tokenizer
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json, so it cannot take over {sorted(reading)}")
    own: Any = copy.copy(tokenizer)
    merged = own.backend_tokenizer
    own._tokenizer = type(merged).from_str(json.dumps({**json.loads(merged.to_str()), **reading}))
    return own


@dataclass
class ExpertProcessor:
    """One expert's processor.

    placeholders: modality -> {"token", "id"} of the token at which features stand, and "written", what a prompt says
    for one medium where that is another token. tokens: named tokens the processor asks its tokenizer for.
    special_tokens: what its chat template is rendered with. reading: what of its tokenizer reads its prompts in
    another way than the base's (see `reading_tokenizer`); its processor's tokenizer is one that reads so.
    """

    name: str
    processor: ProcessorMixin
    placeholders: dict[str, dict[str, Any]]
    tokens: dict[str, str] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values from which `from_dict` builds an equal one, without tokenizer and template."""
        parts = {}
        for name in self.processor.get_attributes():
            if "tokenizer" not in name:
                part = getattr(self.processor, name)
                parts[name] = {"class": type(part).__name__, "settings": part.to_dict()}
        left_out = {*self.processor.get_attributes(), "processor_class", "auto_map", "chat_template"}
        arguments = {name: value for name, value in self.processor.to_dict().items() if name not in left_out}
        values = {
            "name": self.name,
            "class": type(self.processor).__name__,
            "arguments": arguments,
            "parts": parts,
            "placeholders": self.placeholders,
            "tokens": self.tokens,
            "special_tokens": self.special_tokens,
        }
        if self.reading:
            values["reading"] = self.reading
        return json.loads(json.dumps(values, default=_plain))

    @classmethod
    def from_dict(cls, values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None):
        """Raises ValueError for an unknown class or a missing entry; ImportError where a class needs a package."""
        missing = {"name", "class", "arguments", "parts", "placeholders"} - set(values)
        if missing:
            raise ValueError(f"processor_config.json: an expert without {sorted(missing)}, found {sorted(values)}")
        values = copy.deepcopy(values)
        tokens = values.get("tokens", {})
        parts: dict[str, Any] = {
            name: class_by_name(part["class"]).from_dict(part["settings"])  # type: ignore[attr-defined]
            for name, part in values["parts"].items()
        }
        kind = class_by_name(values["class"])
        reading = values.get("reading", {})
        parts["tokenizer"] = tokenizer_view(reading_tokenizer(tokenizer, reading), tokens)
        if "chat_template" in inspect.signature(kind).parameters:
            parts["chat_template"] = chat_template
        processor = kind(**parts, **values["arguments"])
        special = values.get("special_tokens", {})
        made = cls(values["name"], processor, values["placeholders"], tokens, special, reading)
        for modality in made.modalities:
            made._call_placeholder(modality, made.written(modality))
        return made

    def _call_placeholder(self, modality: str, written: str):
        """Sets the word that the processor replaces, and its id where the processor's id is that word's.

        Some say one word and count another, whose id they hold (Gemma 3, Aya Vision).
        """
        processor, tokenizer = self.processor, self.processor.tokenizer
        before, place = getattr(processor, f"{modality}_token", None), getattr(processor, f"{modality}_token_id", None)
        names = {f"{modality}_token": written}
        if before is None or place in (None, tokenizer.convert_tokens_to_ids(before)):
            names[f"{modality}_token_id"] = tokenizer.convert_tokens_to_ids(written)
        for attribute, value in names.items():
            if hasattr(processor, attribute) and not isinstance(getattr(type(processor), attribute, None), property):
                setattr(processor, attribute, value)

    @property
    def modalities(self) -> list[str]:
        return list(self.placeholders)

    def written(self, modality: str) -> str:
        """What a prompt says where one medium of this expert stands."""
        entry = self.placeholders[modality]
        return entry.get("written", entry["token"])

    @property
    def feature_extractor(self) -> Any:
        return getattr(self.processor, "feature_extractor", getattr(self.processor, "audio_processor", None))

    @property
    def sampling_rate(self) -> int:
        return getattr(self.feature_extractor, "sampling_rate", 16_000)

    @property
    def audio_limit(self) -> int | None:
        """The samples at which this processor may cut a sound; None where it names no such length."""
        own, seconds = self.feature_extractor, getattr(self.processor, "max_audio_len", None)
        if seconds is not None:  # of a processor that takes a sound in pieces as long as its extractor's
            piece = getattr(own, "chunk_length", 1)
            return int(seconds // piece * piece * self.sampling_rate)
        longest = inspect.signature(own).parameters.get("max_length") if callable(own) else None
        samples = getattr(own, "n_samples", longest and longest.default)
        return samples if isinstance(samples, int) else None

    @property
    def takes_pages(self) -> bool:
        """A list of images among its images is one document of several pages (GOT-OCR2)."""
        return hasattr(self.processor, "multi_page")

    def nests_images(self, nested: bool = False) -> bool:
        """Whether each image must come in a list of its own, for a text of its own. `nested`: the caller gave lists.

        A processor with a call of its own, or one that arranges images itself (SmolVLM), may take a flat list for the
        images of one text.
        """
        generic = type(self.processor).__call__ is ProcessorMixin.__call__
        arranges = type(self.processor).prepare_inputs_layout is not ProcessorMixin.prepare_inputs_layout
        return not self.takes_pages and (not generic or (arranges and not nested))

    def encode(
        self, modality: str, groups: list[list[Any]], nested: bool, settings: dict[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """(tensors, texts): the processor's tensors of all media together, and for each medium the text that stands
        for it.

        `groups` holds the media of each sample. `nested` says that the caller gave them per sample: some processors
        (LlavaOnevision) treat the only image of a sample in another way than one of several.
        """
        items = [item for group in groups for item in group]
        generic = type(self.processor).__call__ is ProcessorMixin.__call__
        written = self.written(modality)
        media: list[Any] = items
        texts = [written] * len(items)
        if modality == "image" and self.nests_images(nested):
            media = [[item] for item in items]
        elif modality == "image" and nested and not self.takes_pages:
            media = [group for group in groups if group]
            texts = [written * len(group) for group in media]
        extra: dict[str, Any] = {"return_text_replacement_offsets": True} if generic else {}
        made = self.processor(
            text=texts,
            return_tensors="pt",
            text_kwargs={"padding": True, "add_special_tokens": False},
            **{ARGUMENTS[modality]: media},
            **extra,
            **settings,
        )
        if generic:
            stand_ins = [entry["replacement"] for sample in made["text_replacement_offsets"] for entry in sample]
        else:
            stand_ins = [
                self._text_of(ids[mask.bool()].tolist())
                for ids, mask in zip(made["input_ids"], made["attention_mask"])
            ]
        token = self.placeholders[modality]["token"]
        if any(token not in stand_in for stand_in in stand_ins):
            raise ValueError(
                f"expert {self.name!r}: {type(self.processor).__name__} puts {modality} features at other tokens than "
                f"{token!r}, which is not supported: merge the expert without {modality}; or the medium is too short "
                "to make one feature: give a longer one"
            )
        if len(stand_ins) != len(items):
            raise ValueError(
                f"expert {self.name!r}: {type(self.processor).__name__} wrote {len(stand_ins)} placeholders for "
                f"{len(items)} media of type {modality}"
            )
        return self._tensors(made), stand_ins

    def _tensors(self, made: Any) -> dict[str, Any]:
        return {name: value for name, value in made.items() if name not in _TEXT_OUTPUTS}

    def _text_of(self, ids: list[int]) -> str:
        """The text that the tokenizer turns into exactly `ids`, for processors with a `__call__` of their own."""
        tokenizer = self.processor.tokenizer
        for text in (
            "".join(tokenizer.convert_ids_to_tokens(ids)),
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        ):
            if tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
                return text
        raise ValueError(
            f"expert {self.name!r}: {type(self.processor).__name__} writes a placeholder that no text gives back "
            f"({len(ids)} tokens, first {ids[:4]}); its processor cannot be taken over"
        )


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "value"):
        return value.value
    raise TypeError(f"an expert's processor holds a {type(value).__name__}, which processor_config.json cannot hold")
