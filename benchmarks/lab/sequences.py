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
from transformers import PreTrainedModel

from evaluation_mmer.lab.datasets import LabItem
from evaluation_mmer.lab.experts import processor_inputs

IGNORE = -100


class Caught(Exception):
    """Ends a forward once the connector's input is known."""


def connector_input(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model's own class hands its connector for these inputs: (items, tokens, width)."""
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        caught.append(args[0])
        raise Caught

    handle = model.get_submodule("model.multi_modal_projector").register_forward_pre_hook(catch)
    with torch.no_grad(), contextlib.suppress(Caught):
        model(**inputs)
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
        for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
            prompt = ids[mask.bool()].tolist()
            kept = features[row, : prompt.count(self.media_id)].to(torch.float16)
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
    context = inner.language_model(inputs_embeds=table(prefix[None]), use_cache=True).past_key_values
    context.batch_repeat_interleave(len(batch.ids))

    embeds = table(batch.ids)
    soft = batch.ids >= base_rows
    embeds = embeds.masked_scatter(soft[..., None], added[batch.ids[soft] - base_rows].to(embeds.dtype))
    media = batch.ids == media_token(model)
    projected = inner.multi_modal_projector(batch.media)
    embeds = embeds.masked_scatter(media[..., None], projected.to(embeds.dtype))
    hidden = inner.language_model(inputs_embeds=embeds, past_key_values=context, use_cache=True).last_hidden_state
    return model.get_output_embeddings()(hidden[batch.targets != IGNORE])  # 2-D: a 3-D input copies the vocabulary


def media_token(model: PreTrainedModel) -> int:
    config: Any = model.config
    return int(getattr(config, "image_token_index", None) or config.audio_token_index)
