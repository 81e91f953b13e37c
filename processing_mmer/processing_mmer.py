"""MMERProcessor: text and media of any expert to the tensors that the merged model takes.

Enters: text, or chats with content blocks, and images, videos, sounds, point clouds. Leaves: `input_ids`,
`attention_mask`, `mm_token_type_ids` (0 text, 1 image, 2 video, 3 audio, 4 point cloud) and `route_ids`, all (batch,
sequence), `text_route` (batch,), and each expert's own tensors as "<expert>.<name>". Invariant: a conversation with
one expert's media gives the tokens and tensors that the expert's own processor gives; a sample in a batch gives what
it gives alone.
"""

import copy
from typing import Any

import torch
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData

from configuration_mmer.export_mmer import HubCodeMixin
from configuration_mmer.routes_mmer import AUTO, MODALITIES, ROUTE_NAMES, route_tokens

from .chat_templates_mmer import template_owner
from .conversations_mmer import ConversationProcessor
from .encoding_mmer import as_rows, as_tensors, encode_media, encode_spots, sort_settings
from .expert_processors_mmer import ExpertProcessor
from .media_mmer import ARGUMENTS, Media, sort_media
from .tokens_mmer import Spot, check_stand_ins, find_spots, pad_rows, tokenize, write_stand_ins

_ROW_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "route_ids")
_PADDING = ("padding", "pad_to_multiple_of", "padding_side", "add_special_tokens")


class MMERProcessor(HubCodeMixin, ConversationProcessor):
    r"""
    Args:
        tokenizer: the merged tokenizer.
        experts: the experts in route order, as `ExpertProcessor`s or as what `ExpertProcessor.to_dict` makes of them.
        default_experts: modality -> the expert that encodes it when none is named; the first with it when absent.
        text_route: "auto", "base", "merged" or an expert's name: the route of text where a call does not say.
        chat_template: the base's template, or its templates by name ("default", "tool_use", …).
        expert_templates: the experts' own, under the expert's name, further ones under "<expert>.<template's name>".
            They lie in processor_config.json: a template file of its own can be missing from a cache without a word,
            and then prompts would change.

    Raises:
        ValueError: where names, modalities, placeholders or routes contradict one another.
    """

    return_mm_token_type_ids = True

    def __init__(
        self,
        tokenizer=None,
        experts=None,
        default_experts=None,
        text_route=AUTO,
        chat_template=None,
        expert_templates=None,
    ):
        if tokenizer is None:
            raise ValueError("MMERProcessor needs the merged tokenizer")
        if chat_template is None:
            chat_template = tokenizer.chat_template
        if isinstance(chat_template, dict) and set(chat_template) == {"default"}:
            chat_template = chat_template["default"]
        self.expert_templates: dict[str, str] = dict(expert_templates or {})
        self.experts: dict[str, ExpertProcessor] = {}
        for entry in experts or []:
            name = entry.name if isinstance(entry, ExpertProcessor) else entry["name"]
            if name in self.experts or name in (AUTO, *ROUTE_NAMES, "default", "tool_use"):
                raise ValueError(f"experts: {name!r} is there twice or is a reserved name")
            if not isinstance(entry, ExpertProcessor):
                entry = ExpertProcessor.from_dict(entry, tokenizer, self.expert_templates.get(name))
            self.experts[name] = entry
        self.default_experts = {
            **{modality: name for name in reversed(self.experts) for modality in self.experts[name].modalities},
            **(default_experts or {}),
        }
        for modality, name in self.default_experts.items():
            self._expert_for(modality, name, "default_experts")
        self.text_route = text_route
        self._check_route(text_route)
        for modality in MODALITIES:
            if modality in self.default_experts:
                own = self.experts[self.default_experts[modality]]
                setattr(self, f"{modality}_token", own.written(modality))
                setattr(self, f"{modality}_token_id", own.placeholders[modality]["id"])
        self._added_tokens = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        super().__init__(tokenizer, chat_template=chat_template)
        # the tokenizer alone is what text-generation uses
        tokenizer.chat_template = chat_template

    # what it is made of

    @property
    def placeholder_experts(self) -> dict[int, int]:
        """Token id at which features stand -> index of the expert."""
        return {
            entry["id"]: index
            for index, own in enumerate(self.experts.values())
            for entry in own.placeholders.values()
        }

    def _default_part(self, modality: str, *names: str) -> Any:
        if modality in self.default_experts:
            processor = self.experts[self.default_experts[modality]].processor
            for name in names:
                if getattr(processor, name, None) is not None:
                    return getattr(processor, name)
        raise AttributeError(f"{type(self).__name__} has no {names[0]}: it has {self._modalities_in_words()}")

    @property
    def image_processor(self) -> Any:  # type: ignore[override]
        return self._default_part("image", "image_processor")

    @property
    def video_processor(self) -> Any:  # type: ignore[override]
        return self._default_part("video", "video_processor", "image_processor")

    @property
    def feature_extractor(self) -> Any:  # type: ignore[override]
        """The default audio expert's. Pipelines want its `padding_side` to be the tokenizer's; it works as ever."""
        own = self._default_part("audio", "feature_extractor", "audio_processor")
        view = copy.copy(own)
        view.__class__ = type(
            type(own).__name__, (type(own),), {"__call__": lambda _, *args, **kwargs: own(*args, **kwargs)}
        )
        view.padding_side = self.tokenizer.padding_side
        return view

    @property
    def model_input_names(self) -> list[str]:
        text = list(self.tokenizer.model_input_names)
        media = [
            f"{name}.{key}"
            for name, own in self.experts.items()
            for key in own.processor.model_input_names
            if key not in text and key != "mm_token_type_ids"
        ]
        return list(dict.fromkeys([*text, *_ROW_KEYS, "text_route", *media]))

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "processor_class": type(self).__name__,
            "experts": [own.to_dict() for own in self.experts.values()],
            "default_experts": self.default_experts,
            "text_route": self.text_route,
            "expert_templates": self.expert_templates,
        }
        if getattr(self, "auto_map", None):
            values["auto_map"] = self.auto_map
        return values

    # text and media to tensors

    def __call__(  # type: ignore[override]
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        point_clouds=None,
        experts: dict[str, str] | None = None,
        text_route: str | list[str] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Text with placeholders and their media, in the order of the placeholders: flat, or one list per text.

        An expert's placeholder says who encodes a medium. `experts` (modality -> name) hands what stands at a default
        expert's placeholder to another one. `text_route`: one name, or one per text. Text settings of transformers
        (padding, default True; truncation; add_special_tokens; return_tensors, default "pt") and those of the experts'
        own processors are taken flat or in text_kwargs, images_kwargs, videos_kwargs, audio_kwargs. Without text the
        default experts' tensors alone come out.

        Raises ValueError where media, placeholders and experts do not fit together, and for files that cannot be read.
        """
        given = {"image": images, "video": videos, "audio": audio, "point_cloud": point_clouds}
        texts = [text] if isinstance(text, str) else text
        if texts is not None and not (isinstance(texts, (list, tuple)) and all(isinstance(one, str) for one in texts)):
            raise ValueError(f"text: found {type(text).__name__}, expected a string or a list of strings")
        if texts is not None and not texts:
            raise ValueError("text: found an empty list, expected at least one string")
        samples = None if texts is None else len(texts)
        media = {
            modality: sort_media(modality, value, samples)
            for modality, value in given.items()
            if value is not None and not (isinstance(value, (list, tuple)) and not value)
        }
        return self._process(None if texts is None else list(texts), media, self._chosen(experts), text_route, kwargs)

    def _process(
        self,
        texts: list[str] | None,
        media: dict[str, Media],
        chosen: dict[str, str],
        text_route: str | list[str] | None,
        kwargs: dict[str, Any],
        add_special_tokens: list[bool] | None = None,
    ) -> BatchFeature:
        words, settings = sort_settings(kwargs)
        tensor_type = words.pop("return_tensors", "pt")
        for modality in media:
            self._expert_for(modality, chosen.get(modality), ARGUMENTS[modality])
        if texts is None:
            return self._media_alone(media, chosen, settings, tensor_type)
        routes = self._routes(text_route, len(texts))
        spots = find_spots(texts, self.experts, marked=bool(words.get("sanitize_control_tokens")))
        for spot in spots:
            if spot.expert == self.default_experts[spot.modality]:
                spot.expert = chosen.get(spot.modality, spot.expert)
        tensors = encode_spots(self.experts, spots, media, len(texts), settings)
        texts, offsets = write_stand_ins(texts, spots)
        flags = add_special_tokens or [words.get("add_special_tokens", True)] * len(texts)
        unpadded = {name: value for name, value in words.items() if name not in _PADDING}
        tokenizers = self._readers(routes, spots)
        columns = tokenize(tokenizers, texts, flags, {"return_token_type_ids": False, **unpadded})
        check_stand_ins(columns["input_ids"], self.experts, spots)
        text_routes = self._add_columns(columns, routes)
        columns = self._pad(columns, text_routes, words)
        values = as_rows(columns, tensor_type)
        values["text_route"] = (
            text_routes
            if tensor_type is None
            else as_tensors({"text_route": torch.tensor(text_routes)}, tensor_type)["text_route"]
        )
        values.update(as_tensors(tensors, tensor_type))
        if kwargs.get("return_text_replacement_offsets"):
            values["text_replacement_offsets"] = offsets
        return BatchFeature(values)

    def _readers(self, routes: list[str], spots: list[Spot]) -> list[Any]:
        """Each sample's tokenizer: an expert's own way of reading for the prompts that it alone answers."""
        readers = []
        for sample, route in enumerate(routes):
            owner = template_owner(route, {spot.expert for spot in spots if spot.sample == sample}, list(self.experts))
            own = self.experts[owner] if owner else None
            readers.append(own.processor.tokenizer if own and own.reading else self.tokenizer)
        return readers

    def _media_alone(self, media: dict[str, Media], chosen: dict[str, str], settings: dict[str, Any], tensor_type):
        if not media:
            raise ValueError("nothing to process: give text, media, or both")
        tensors: dict[str, Any] = {}
        for modality, given in media.items():
            own = self._expert_for(modality, chosen.get(modality), ARGUMENTS[modality])
            tensors.update(encode_media(own, modality, [given.items], False, settings)[0])
        return BatchFeature(as_tensors(tensors, tensor_type))

    def create_mm_token_type_ids(self, input_ids: list[list[int]]) -> list[list[int]]:
        """0 text, 1 image, 2 video, 3 audio, 4 point cloud, for each token of each row."""
        kinds = {
            entry["id"]: MODALITIES.index(modality) + 1
            for own in self.experts.values()
            for modality, entry in own.placeholders.items()
        }
        return [[kinds.get(int(token), 0) for token in row] for row in input_ids]

    def _add_columns(self, columns: dict[str, list[list[Any]]], routes: list[str]) -> list[int]:
        """Adds the modality and the route of each token; gives the route of each sample's text."""
        columns["mm_token_type_ids"] = self.create_mm_token_type_ids(columns["input_ids"])
        columns["route_ids"] = []
        text_routes = []
        for row, route in zip(columns["input_ids"], routes):
            # an empty text has no token to look at, but a route all the same
            ids = torch.tensor([row or [-1]])
            route_ids, of_text = route_tokens(ids, self.placeholder_experts, list(self.experts), route)
            columns["route_ids"].append(route_ids[0].tolist()[: len(row)])
            text_routes.append(int(of_text))
        return text_routes

    def _pad(
        self, columns: dict[str, list[list[Any]]], text_routes: list[int], words: dict[str, Any]
    ) -> dict[str, Any]:
        count = len(text_routes)
        fills: dict[str, list[Any]] = {name: [0] * count for name in columns}
        fills.update(input_ids=[self.tokenizer.pad_token_id] * count, route_ids=text_routes)
        fills.update(offset_mapping=[(0, 0)] * count, special_tokens_mask=[1] * count)
        padded = pad_rows(columns, fills, words, words.get("padding_side") or self.tokenizer.padding_side)
        if any(None in row for row in padded["input_ids"]):
            raise ValueError("texts of unequal lengths need a pad token: set processor.tokenizer.pad_token")
        return padded

    def _get_num_multimodal_tokens(self, **sizes) -> MultiModalData:
        """Placeholder tokens of media of given sizes, by the default experts, as transformers asks for them."""
        counts = MultiModalData()
        for modality, argument in (("image", "image_sizes"), ("video", "video_sizes"), ("audio", "audio_lengths")):
            if sizes.get(argument) is None or modality not in self.default_experts:
                continue
            processor: Any = self.experts[self.default_experts[modality]].processor
            made = processor._get_num_multimodal_tokens(**{argument: sizes[argument]})
            for name in ("num_image_tokens", "num_video_tokens", "num_audio_tokens", "num_image_patches"):
                if name in made:
                    setattr(counts, name, made[name])
        return counts


__all__ = ["MMERProcessor"]
