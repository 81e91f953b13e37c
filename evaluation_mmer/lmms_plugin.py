"""A merged folder as a model of lmms-eval (`lmms-eval --model mmer --model_args pretrained=out/`).

Enters: lmms-eval's requests, each with a conversation of text, pictures, clips and sounds. Leaves: greedy or sampled
answers, in the requests' order. lmms-eval finds the class through the entry point `lmms_eval.models`; nothing else
imports this file. Invariant: a conversation takes the route, template and media reading that `apply_chat_template` of
the folder's own processor gives it.
"""

import json
import os
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from configuration_mmer.routes_mmer import AUTO
from modeling_mmer.modeling_mmer import MMERForConditionalGeneration
from processing_mmer.processing_mmer import MMERProcessor

MANIFEST = ModelManifest(model_id="mmer", chat_class_path="evaluation_mmer.lmms_plugin.MMER")
_MOST_TOKENS = 256  # where a task does not say
_PASSED_ON = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")


class MMER(lmms):
    """pretrained: a merged folder or Hub id. text_route: as in the processor. batch_size: conversations at once."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        text_route: str = AUTO,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("WORLD_SIZE is above 1, expected one process: start lmms-eval without accelerate launch")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = MMERForConditionalGeneration.from_pretrained(pretrained, dtype=dtype)
        self.model = model.to(device).eval()
        self.processor = MMERProcessor.from_pretrained(pretrained, config=self.model.config.text_config)
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self.text_route, self.batch_size = text_route, int(batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(place)
        with tqdm(total=len(requests), desc="mmer") as bar:
            for places in alike.values():
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    settings = dict(requests[batch[0]].args[2])
                    written = self._answer([self._conversation(requests[place]) for place in batch], settings)
                    for place, answer in zip(batch, written, strict=True):
                        answers[place] = answer
                        self.cache_hook.add_partial("generate_until", (requests[place].args[0], settings), answer)
                    bar.update(len(batch))
        return answers

    def _conversation(self, request: Any) -> list[dict[str, Any]]:
        _, messages_of, _, place, task, split = request.args
        return ChatMessages(messages=messages_of(self.task_dict[task][split][place])).to_hf_messages()

    def _answer(self, chats: list[list[dict[str, Any]]], settings: dict[str, Any]) -> list[str]:
        inputs = self.processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, add_generation_prompt=True, text_route=self.text_route
        ).to(self.device)
        given = {name: settings[name] for name in _PASSED_ON if settings.get(name) is not None}
        given.setdefault("max_new_tokens", _MOST_TOKENS)
        if not given.get("temperature"):  # 0 is how tasks ask for greedy answers
            given = {name: given[name] for name in ("max_new_tokens", "num_beams") if name in given}
            given["do_sample"] = False
        pad = self.processor.tokenizer.pad_token_id
        tokens = self.model.generate(**inputs, pad_token_id=pad, **given)[:, inputs["input_ids"].shape[1] :]
        ends = settings.get("until") or []
        ends = [ends] if isinstance(ends, str) else ends
        return [_before(text, ends) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise ValueError("lmms-eval asks conversations for text alone; for likelihoods use `mmer evaluate` or lm-eval")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise ValueError("conversations of several rounds are not asked; expected a task with output generate_until")


def _before(text: str, ends: list[str]) -> str:
    for end in filter(None, ends):
        text = text.split(end)[0]
    return text.strip()


__all__ = ["MANIFEST", "MMER"]
