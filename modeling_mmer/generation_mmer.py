"""`generate` for routed models.

Enters: what the processor gives. The media are encoded once, before the loop, into `media_embeds` (batch, sequence,
hidden), the routes are settled once into `route_ids` (batch, sequence) and `text_route` (batch,), and media whose
tokens see each other into `block_sequence_ids` (batch, sequence). All have the batch in front, so beams and several
return sequences repeat them with the ids, and every step cuts its window out of them by position. Invariant: a sample
in a batch, a chunk or a beam computes what it computes alone.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, ROUTE_NAMES, named_route

from .attention_mmer import OUTSIDE, media_blocks, whole_blocks
from .cache_mmer import CACHE, one_cache
from .route_plan_mmer import RoutePlan
from .routed_weights_mmer import OWN_PARTS, Kept, RoutedWeight

_OURS = ("route_ids", "text_route", "base_only", "media_embeds", "block_sequence_ids")


class NoPlaceholders(LogitsProcessor):
    """No media follow what is generated, so no token may be written that stands for some: `ids`, on every route but
    the base's. text_route: (batch,); scores may have several rows a sample, one behind the other.
    """

    def __init__(self, ids: list[int], text_route: torch.Tensor):
        self.ids, self.text_route = ids, text_route

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        routes = self.text_route.to(scores.device).repeat_interleave(len(scores) // len(self.text_route))
        ids = torch.tensor(self.ids, device=scores.device)
        hidden = scores[:, ids].masked_fill((routes != BASE_ROUTE).unsqueeze(-1), -torch.inf)
        return scores.index_copy(-1, ids, hidden)


class MMERGenerationMixin(GenerationMixin):
    # what PreTrainedModel brings
    model: Any
    config: Any
    modules: Any
    named_parameters: Any
    named_buffers: Any
    check_left: Any
    _left: tuple[int, ...] | None
    _asked_routes: tuple[int, ...] = ()
    _room: int | None = None

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):  # type: ignore[override]
        """As GenerationMixin.generate, and: `text_route`, one of auto, base, merged, an expert's name, or one name a
        sample.

        Raises ValueError where placeholders, media and experts do not fit together, before anything is generated, and
        where a chunk of the prompt would end inside a medium whose tokens see each other.
        """
        input_ids = kwargs.get("input_ids", inputs)
        media = self.model.media_inputs(kwargs)
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            if kwargs.get("media_embeds") is None and (media or self._has_placeholders(input_ids)):
                kwargs["media_embeds"] = self.model.embed_media(input_ids, media)
            tokens = self.config.bidirectional_tokens()
            if tokens and kwargs.get("media_embeds") is not None and kwargs.get("block_sequence_ids") is None:
                kwargs["block_sequence_ids"] = media_blocks(input_ids, tokens)
            self._settle_routes(input_ids, kwargs)
        elif media:
            raise ValueError(f"media of {sorted(media)} need input_ids: their placeholders say where features go")
        return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        """As the stock one, but a draft model may have the base's vocabulary: ids of text are the same in both."""
        draft = generation_mode_kwargs.get("assistant_model")
        if draft is not None and draft.config.get_text_config().vocab_size == self.config.text_config.vocab_size:
            generation_mode_kwargs = {k: v for k, v in generation_mode_kwargs.items() if k != "assistant_model"}
        super()._validate_generation_mode(  # type: ignore[misc]
            generation_mode, generation_config, generation_mode_kwargs
        )

    def _get_candidate_generator(self, generation_config, input_ids, *args, **kwargs):
        """As the stock one; a draft model that knows no routes is not told of them.

        Raises ValueError where such a draft cannot follow: media in the prompt, and sampling on a route whose
        distribution has more entries than the draft's.
        """
        draft, told = kwargs.get("assistant_model"), kwargs.get("model_kwargs", {})
        if draft is not None and not isinstance(draft, MMERGenerationMixin):
            wider = self.config.vocab_size > draft.config.get_text_config().vocab_size
            if told.get("media_embeds") is not None:
                raise ValueError("the prompt has media, which the draft model cannot take: draft for text alone")
            if generation_config.do_sample and wider and not told.get("base_only"):
                raise ValueError(
                    "sampling with a draft of the base's vocabulary, but this route has more tokens: expected "
                    'do_sample=False, or text_route="base"'
                )
            kwargs["model_kwargs"] = {name: value for name, value in told.items() if name not in _OURS}
        return super()._get_candidate_generator(generation_config, input_ids, *args, **kwargs)  # type: ignore[misc]

    def _has_placeholders(self, input_ids: torch.Tensor) -> bool:
        return any(bool((input_ids == token_id).any()) for token_id in self.config.placeholder_experts())

    def _settle_routes(self, input_ids: torch.Tensor, kwargs: dict):
        """Put `route_ids` and `text_route` as tensors into `kwargs`, as long as the attention mask, and keep the
        routes.
        """
        route_ids, text_route = kwargs.get("route_ids"), kwargs.get("text_route")
        if route_ids is None or not isinstance(text_route, torch.Tensor):
            if text_route is None:
                cache = one_cache(kwargs.get("cache"), kwargs.get("past_key_values"))
                text_route = getattr(cache, "mmer_text_route", None)
            route_ids, text_route = self.model.routes(input_ids, text_route)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape[-1] > input_ids.shape[1]:
            # only the new tokens of a conversation whose beginning is in the cache
            before = mask.shape[-1] - input_ids.shape[1]
            route_ids = torch.cat([text_route.unsqueeze(-1).expand(-1, before), route_ids], dim=-1)
            if kwargs.get("media_embeds") is not None:
                kwargs["media_embeds"] = nn.functional.pad(kwargs["media_embeds"], (0, 0, before, 0))
            if (blocks := kwargs.get("block_sequence_ids")) is not None and blocks.shape[1] == input_ids.shape[1]:
                kwargs["block_sequence_ids"] = nn.functional.pad(blocks, (before, 0), value=OUTSIDE)
        # looked at on the host in every step: they are few numbers, and no step is to wait for the device
        route_ids, text_route = route_ids.to("cpu"), text_route.to("cpu")
        self.check_left({*route_ids.unique().tolist(), *text_route.unique().tolist()})
        kwargs["route_ids"], kwargs["text_route"] = route_ids, text_route
        # settled for all steps: one step of a mixed conversation may well have only base tokens
        kwargs["base_only"] = bool((route_ids == BASE_ROUTE).all())
        rows = self.config.text_config.vocab_size  # placeholders behind them nobody can write anyway
        placeholders = [token_id for token_id in self.config.placeholder_experts() if token_id < rows]
        if placeholders and not kwargs["base_only"]:
            given = kwargs.get("logits_processor") or []
            kwargs["logits_processor"] = LogitsProcessorList([*given, NoPlaceholders(placeholders, text_route)])
        self._hold(text_route.unique().tolist())

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        cache=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        route_ids=None,
        text_route=None,
        media_embeds=None,
        block_sequence_ids=None,
        **kwargs,
    ):
        cache = one_cache(cache, past_key_values)
        model_inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if text_route is None and block_sequence_ids is None:
            return model_inputs
        ids = model_inputs.get("input_ids")
        length = (model_inputs["inputs_embeds"] if ids is None else ids).shape[1]
        # where these ids stand in the sequence; generate drops an attention mask of ones, so the cache has to tell
        start = 0 if cache is None else int(cache.get_seq_length())
        if block_sequence_ids is not None and start < block_sequence_ids.shape[1]:
            blocks = whole_blocks(block_sequence_ids, start, start + length)
            if (blocks != OUTSIDE).any():
                # forward makes the masks, also those that were made above for a static cache
                model_inputs.update(block_sequence_ids=blocks, attention_mask=attention_mask)
        if text_route is None:
            return model_inputs
        device = (model_inputs["inputs_embeds"] if ids is None else ids).device
        model_inputs["route_plan"] = _window(route_ids, start, start + length, text_route, device)
        if media_embeds is not None and start < media_embeds.shape[1]:
            media = media_embeds[:, start : start + length]
            model_inputs["media_embeds"] = nn.functional.pad(media, (0, 0, 0, length - media.shape[1]))
        return model_inputs

    def compute_transition_scores(self, sequences, scores, beam_indices=None, normalize_logits=False):
        # text alone is scored over the base's vocabulary, without the columns of the added tokens
        missing = self.config.vocab_size - scores[0].shape[-1]
        scores = tuple(nn.functional.pad(step, (0, missing), value=-torch.inf) for step in scores)
        return super().compute_transition_scores(  # type: ignore[misc]
            sequences, scores, beam_indices, normalize_logits
        )

    # weights at hand

    def keep_routes(self, routes: Iterable[str], max_memory: int | str | None = None):
        """Hold the weights of these routes (`merged`, experts' names) instead of making them in every forward.

        Costs one copy of the routed weights a route; with `max_memory` (bytes, or a size such as "4GB") no more than
        that: the routes and layers named first are held, the rest is made as before. The routes of the latest
        `generate` are held besides; `keep_routes([])` lets all go. Results do not change by a bit. Raises ValueError
        for an unknown route and for a size that is none.
        """
        asked = tuple(named_route(name, self.config.expert_names) for name in dict.fromkeys(routes))
        self.check_left(asked)
        self._asked_routes = asked
        self._room = None if max_memory is None else size_in_bytes(max_memory)
        self._hold(())

    def _hold(self, generating: Iterable[int]):
        """Hold what was asked for, as far as there is room, and the routes that are generated with."""
        routed = [module for module in self.modules() if isinstance(module, RoutedWeight)]
        wanted: dict[RoutedWeight, set[int]] = {module: set(generating) for module in routed}
        left, there = self._room, set[tuple[int, int]]()
        for route in self._asked_routes:
            for module in routed:
                if left is not None and route != BASE_ROUTE and (key := (id(module.weight), route)) not in there:
                    left -= module.route_bytes()
                    if left < 0:
                        break
                    there.add(key)
                wanted[module].add(route)
        held: dict[tuple[int, int], Kept] = {}
        for module, routes in wanted.items():
            module.keep_(sorted(routes), held)

    def memory_footprint_by_route(self) -> dict[str, int]:
        """Bytes that are resident, by what they are there for; their sum is all there is.

        `base`: what the base LLM has; `merged`: τ* and the merged norms and biases; an expert's name: its tower,
        masks, scales, corrections and own small tensors; `kept <route>`: the weights held for it.
        """
        experts = self.config.expert_names
        there = [n for r, n in enumerate(experts, FIRST_EXPERT_ROUTE) if self._left is None or r in self._left]
        sizes: dict[str, int] = {name: 0 for name in (*ROUTE_NAMES, *experts)}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            leaf = name.rpartition(".")[2]
            if name.startswith("model.experts."):
                sizes[name.split(".")[2]] += tensor.nbytes
            elif leaf in OWN_PARTS or leaf.startswith("expert_"):
                own = there if leaf in OWN_PARTS else experts
                for expert in own:
                    sizes[expert] += tensor.nbytes // len(own)
            else:
                sizes["merged" if leaf == "delta" or leaf.startswith("merged_") else "base"] += tensor.nbytes
        routed = [module for module in self.modules() if isinstance(module, RoutedWeight)]
        for route, name in enumerate((*ROUTE_NAMES, *experts)):
            held = [module._kept[route].weight for module in routed if route in module._kept]
            if held:
                sizes[f"kept {name}"] = sum({id(weight): weight.nbytes for weight in held}.values())
        return sizes


def size_in_bytes(size: int | str) -> int:
    """4GB, 500MB, 1GiB … or bytes -> bytes. Raises ValueError for anything else."""
    if isinstance(size, int) and size >= 0:
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", size.strip()) if isinstance(size, str) else None
    if found is None:
        raise ValueError(f"max_memory is {size!r}: expected a number of bytes, or a size such as 4GB or 500MiB")
    number, letter, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter or " "))


def _window(
    route_ids: torch.Tensor, start: int, end: int, text_route: torch.Tensor, device: torch.device
) -> RoutePlan:
    """The plan of the positions from `start` to `end`; those behind the prompt were generated and take the sample's
    text route. route_ids and text_route are on the host.
    """
    known = route_ids[:, start:end]
    behind = end - start - known.shape[1]
    known = torch.cat([known, text_route.unsqueeze(-1).expand(-1, behind)], dim=-1)
    plan = RoutePlan(known, text_route).to(device)
    plan.held = True  # `_settle_routes` has seen to it
    return plan
