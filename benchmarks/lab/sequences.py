"""Training sequences of a lab expert: in go LabItems and the tower, out come batches of embeddings with targets.

The encoder is frozen, so what it feeds the connector is computed once per item (`Features`). All prompts of an expert
share their first tokens (system prompt, start of the user turn): the LLM reads these once a step, not once a sample.
Sequences are padded on the right, which under a causal mask needs no attention mask.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedModel

from evaluation_mmer.lab.datasets import LabItem
from evaluation_mmer.lab.experts import processor_inputs
from evaluation_mmer.lab.layouts import LAYOUTS
from modeling_mmer.cache_mmer import CACHE

IGNORE = -100


class Caught(Exception):
    """Ends a forward once the connector's input is known."""


def connector_input(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model's own class hands its connector for these inputs: (items, tokens, width); frames are items."""
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        caught.append(args[0])
        raise Caught

    handle = projector_of(model).register_forward_pre_hook(catch)
    training = model.training
    model.eval()  # the encoder is frozen, its statistics too
    with torch.no_grad(), contextlib.suppress(Caught):
        model(**inputs)
    model.train(training)
    handle.remove()
    return caught[0]


@dataclass
class Batch:
    """`ids`, `targets`: (batch, length) after the shared prefix; `media`: the connector's inputs, (tokens, width)."""

    ids: torch.Tensor
    targets: torch.Tensor
    media: torch.Tensor


class Features:
    """Token ids and connector inputs of items, computed `chunk` at a time when first asked for, then kept."""

    def __init__(
        self, model: PreTrainedModel, processor: Any, items: Sequence[LabItem], media_id: int, chunk: int = 32
    ):
        self.model, self.processor, self.items, self.media_id, self.chunk = model, processor, items, media_id, chunk
        self.known: dict[int, tuple[list[int], torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def encode(self, start: int) -> None:
        items = self.items[start : start + self.chunk]
        inputs = processor_inputs(self.processor, items)
        features = connector_input(self.model, inputs)
        if len(features) != len(items):  # the frames of one clip behind one another
            features = features.reshape(len(items), -1, features.shape[-1])
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
            prompt = ids[mask.bool()].tolist()
            heard = prompt.count(self.media_id) if "input_features" in inputs else features.shape[1]
            kept = features[row, :heard].to(torch.float16)
            self.known[start + row] = (prompt, kept)

    def __getitem__(self, index: int) -> tuple[list[int], torch.Tensor, str]:
        if index not in self.known:
            self.encode(index - index % self.chunk)
        prompt, features = self.known[index]
        return prompt, features, self.items[index].answer

    def batch(self, indices: Sequence[int], prefix: int) -> Batch:
        tokenizer = self.processor.tokenizer
        rows, targets, media = [], [], []
        for index in indices:
            prompt, features, answer = self[index]
            reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rows.append(prompt[prefix:] + reply[:-1])
            targets.append([IGNORE] * (len(prompt) - prefix - 1) + reply)
            media.append(features)
        length = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows])
        aims = torch.tensor([row + [IGNORE] * (length - len(row)) for row in targets])
        return Batch(ids, aims, torch.cat(media).float())


def shared_prefix(prompt: Sequence[int], first_added_id: int) -> list[int]:
    """The tokens before the first one that the expert added."""
    return list(prompt[: next(at for at, token in enumerate(prompt) if token >= first_added_id)])


def answer_logits(model: PreTrainedModel, added: torch.Tensor, prefix: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits (answer tokens of the batch, vocabulary), where `batch.targets` is not IGNORE."""
    inner: Any = model.get_submodule("model")
    table = inner.get_input_embeddings()
    base_rows = table.num_embeddings - len(added)
    context = getattr(inner.language_model(inputs_embeds=table(prefix[None]), use_cache=True), CACHE)
    context.batch_repeat_interleave(len(batch.ids))

    embeds = table(batch.ids)
    soft = batch.ids >= base_rows
    embeds = embeds.masked_scatter(soft[..., None], added[batch.ids[soft] - base_rows].to(embeds.dtype))
    media = batch.ids == media_token(model)
    projected = project(model, batch.media, len(batch.ids))
    embeds = embeds.masked_scatter(media[..., None], projected.to(embeds.dtype))
    hidden = inner.language_model(inputs_embeds=embeds, use_cache=True, **{CACHE: context}).last_hidden_state
    return model.get_output_embeddings()(hidden[batch.targets != IGNORE])  # 2-D: a 3-D input copies the vocabulary


def project(model: Any, media: torch.Tensor, items: int) -> torch.Tensor:
    """The connector's inputs (tokens, width) -> what stands at the placeholders (placeholders, hidden)."""
    projected = projector_of(model)(media)
    if not isinstance(model, LlavaOnevisionForConditionalGeneration):
        return projected
    inner, hidden = model.model, projected.shape[-1]
    side = inner.config.vision_config.image_size // inner.config.vision_config.patch_size
    pooled = inner.apply_pooling(projected.reshape(-1, side * side, hidden)).reshape(items, -1, hidden)
    newline = inner.image_newline.expand(items, 1, hidden).to(pooled.dtype)
    return torch.cat([pooled, newline], 1).reshape(-1, hidden)


def projector_of(model: Any) -> nn.Module:
    layout = next(layout for layout in LAYOUTS.values() if isinstance(model, layout.model))
    return model.model.get_submodule(layout.projector)


def media_token(model: PreTrainedModel) -> int:
    config: Any = model.config
    names = ("video_token_id", "audio_token_id", "point_cloud_token_id", "image_token_id", "audio_token_index")
    return int(next(getattr(config, name) for name in names if getattr(config, name, None) is not None))
