"""Who is asked: a merged model, or one of the originals it was made from, each through its own processor and template.

Enters: items. Leaves: prompts, and model inputs: ids and masks (batch, sequence), left padded, with the media's
tensors. Invariant: media are read in one way for all subjects, so that all see the same pixels, samples and points;
what is made of them, and the words around, are each subject's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modeling_mmer.modeling_mmer import MMERForConditionalGeneration
from processing_mmer.chat_templates_mmer import template_owner, text_forms
from processing_mmer.expert_processors_mmer import ExpertProcessor
from processing_mmer.media_mmer import ARGUMENTS, read_audio, read_image, read_video
from processing_mmer.point_clouds_mmer import read_point_cloud
from processing_mmer.processing_mmer import MMERProcessor

from .tasks import Item, Medium, Task

# the columns that have one entry a token
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "route_ids")


def expert_of(task: Task, modality: str, processor: MMERProcessor) -> str:
    """Who encodes a modality of a task. Raises ValueError where nobody does."""
    name = task.expert or processor.default_experts.get(modality)
    if name is None or modality not in processor.experts[name].placeholders:
        takes = {own.name: own.modalities for own in processor.experts.values()}
        raise ValueError(
            f"{task.where}: task {task.name!r} has {modality} media, which "
            f"{f'its expert {name!r} does not take' if name else 'no expert takes'}; this model has {takes}"
        )
    return name


class Subject(ABC):
    """A model and what makes its inputs. `name` is what messages and results call it."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        tokenizer.padding_side = "left"  # behind a prompt the answer begins
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @abstractmethod
    def prompts(self, items: Sequence[Item]) -> list[str]:
        """The prompts as text, a placeholder for each medium."""

    @abstractmethod
    def inputs(self, items: Sequence[Item]) -> dict[str, Any]:
        """What the model takes, where it is."""

    def reader(self, item: Item) -> Any:
        """The tokenizer that reads an item's prompt."""
        return self.tokenizer

    def decode(self, tokens: torch.Tensor) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def placed(self, inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Where the model is; floats in `dtype`, if that is given."""
        found = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                found[name] = value.to(self.model.device)
                if dtype is not None and value.is_floating_point():
                    found[name] = found[name].to(dtype)
        return found


class MergedSubject(Subject):
    """A merged model, asked on one route for one task."""

    def __init__(self, model: MMERForConditionalGeneration, processor: MMERProcessor, task: Task, route: str):
        super().__init__("merged model", model, processor.tokenizer)
        self.processor, self.task, self.route = processor, task, route

    def experts_of(self, items: Sequence[Item]) -> set[str]:
        return {expert_of(self.task, modality, self.processor) for item in items for modality in item.modalities}

    def _chats(self, items: Sequence[Item]) -> list[list[dict[str, Any]]]:
        chats = []
        for item in items:
            blocks: list[dict[str, Any]] = [
                {
                    "type": medium.modality,
                    medium.modality: medium.value(),
                    "expert": expert_of(self.task, medium.modality, self.processor),
                }
                for medium in item.media
            ]
            chats.append([{"role": "user", "content": [*blocks, {"type": "text", "text": item.text}]}])
        return chats

    def prompts(self, items: Sequence[Item]) -> list[str]:
        return self.processor.apply_chat_template(
            self._chats(items), add_generation_prompt=True, text_route=self.route
        )

    def inputs(self, items: Sequence[Item]) -> dict[str, Any]:
        made = self.processor.apply_chat_template(
            self._chats(items), tokenize=True, return_dict=True, add_generation_prompt=True, text_route=self.route
        )
        return self.placed(made)

    def reader(self, item: Item) -> Any:
        owner = template_owner(self.route, self.experts_of([item]), list(self.processor.experts))
        own = self.processor.experts[owner] if owner else None
        return own.processor.tokenizer if own and own.reading else self.tokenizer


class OriginalSubject(Subject):
    """An original expert, or the base, whose processor is a tokenizer alone.

    own: what the merged folder knows of this expert's processor: how it wants its media laid out. None for the base.
    """

    def __init__(self, name: str, model: Any, processor: Any, own: ExpertProcessor | None):
        super().__init__(name, model, getattr(processor, "tokenizer", processor))
        self.processor, self.own = processor, own
        template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.template = template.get("default") if isinstance(template, dict) else template
        if self.template is None:
            raise ValueError(
                f"the original of {name!r} has no chat template, so how it was asked is not known. Save one with its "
                "processor (processor.chat_template), or leave --against out"
            )

    def prompts(self, items: Sequence[Item]) -> list[str]:
        _, takes_blocks = text_forms(self.template, tuple(sorted(self.tokenizer.special_tokens_map.items())))
        texts = []
        for item in items:
            if item.media and not takes_blocks:
                raise ValueError(
                    f"the chat template of the original of {self.name!r} takes no blocks, so where its media stand is "
                    "not known: save one that does with its processor, or leave --against out"
                )
            blocks = [*({"type": kind} for kind in item.modalities), {"type": "text", "text": item.text}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": blocks if takes_blocks else item.text}],
                chat_template=self.template, add_generation_prompt=True, tokenize=False,
            )  # fmt: skip
            texts.append(text)
        return texts

    def inputs(self, items: Sequence[Item]) -> dict[str, Any]:
        texts, bos = self.prompts(items), self.tokenizer.bos_token
        words: dict[str, Any] = {"padding": True}
        if self.own is None or (bos and texts[0].startswith(bos)):
            words["add_special_tokens"] = False  # the template writes them
        if self.own is None:
            return self.placed(self.tokenizer(texts, return_tensors="pt", **words))
        media: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for modality in dict.fromkeys(kind for item in items for kind in item.modalities):
            groups = [[m for m in item.media if m.modality == modality] for item in items]
            media[ARGUMENTS[modality]], given = self._read(modality, groups)
            if given:
                settings[f"{ARGUMENTS[modality]}_kwargs"] = given
        made = self.processor(text=texts, return_tensors="pt", text_kwargs=words, **media, **settings)
        # ours read points as they are; transformers' classes want floats in their own dtype
        return self.placed(made, None if "point_cloud" in self.own.modalities else self.model.dtype)

    def _read(self, modality: str, groups: list[list[Medium]]) -> tuple[list[Any], dict[str, Any]]:
        """(media as the processor takes them, settings for them), read as the merged model's processor reads them."""
        own, flat = self.own, [medium for group in groups for medium in group]
        assert own is not None
        if modality == "image":
            nested = [[read_image(medium.value()) for medium in group] for group in groups]
            return ([image for group in nested for image in group] if own.takes_pages else nested), {}
        if modality == "audio":
            rate = own.sampling_rate
            return [read_audio(medium.value(), rate) for medium in flat], {"sampling_rate": rate}
        if modality == "point_cloud":
            return [read_point_cloud(medium.value()) for medium in flat], {}
        videos = getattr(own.processor, "video_processor", None)
        count, fps = (getattr(videos, name, None) for name in ("num_frames", "fps"))
        last = getattr(videos, "include_last", False)
        read = [read_video(medium.value(), count, fps, last) for medium in flat]
        return [frames for frames, _ in read], {
            "do_sample_frames": False, "video_metadata": [known for _, known in read],
        }  # fmt: skip


__all__ = ["TOKEN_COLUMNS", "MergedSubject", "OriginalSubject", "Subject", "expert_of"]
