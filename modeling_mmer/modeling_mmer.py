"""MMERForConditionalGeneration: several experts and their base in one model.

Enters: token ids, the experts' media tensors under "<expert>.<name>", and the routes (the processor makes all of
them). In order: towers -> features at the placeholders -> routed LLM -> logits. Leaves: logits (batch, positions,
vocabulary). Invariants: with the base route alone the LLM computes what the base's own class computes, bit for bit;
routing depends on the ids and the routes that were passed, never on the state of a cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from configuration_mmer.configuration_mmer import MMERConfig
from configuration_mmer.export_mmer import HubCodeMixin
from configuration_mmer.routes_mmer import BASE_ROUTE

from .adapters_mmer import RouteAdapters
from .attention_mmer import OUTSIDE, block_masks, check_open_ends, media_blocks, open_ends
from .cache_mmer import CACHE, one_cache
from .fewer_routes_mmer import FewerRoutes
from .generation_mmer import MMERGenerationMixin
from .head_scales_mmer import scaled_hidden, scaled_logits
from .loading_mmer import DirectLoading, no_values_on_meta
from .media_features_mmer import MediaFeatures
from .parallel_mmer import RoutedParallelism
from .route_plan_mmer import RoutePlan, RoutePlanning, TextRoute, route_scope
from .routed_weights_mmer import PARTS, RoutedWeight
from .routing_mmer import embed_rows, install_routing, route_weight_of
from .towers_mmer import build_tower, has_media

_ADDED_ROWS = 64


@dataclass
class MMERModelOutputWithPast(BaseModelOutputWithPast):
    """`plan` is the route plan of the tokens of this forward; the head follows it."""

    plan: RoutePlan | None = None


class MMERPreTrainedModel(  # type: ignore[misc]
    FewerRoutes, HubCodeMixin, DirectLoading, RouteAdapters, RoutedParallelism, PreTrainedModel
):
    config: MMERConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "video", "audio", "point_cloud", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    def __init__(self, config: MMERConfig, *inputs, **kwargs):
        # flash attention drops the masks by which the tokens of one medium see each other
        self._supports_flash_attn = not config.bidirectional_tokens()
        super().__init__(config, *inputs, **kwargs)

    def initialize_weights(self):
        # modules inside the LLM are initialised by its own class, which knows nothing of what routing adds to them
        super().initialize_weights()
        for module in self.modules():
            for name, parameter in module._parameters.items():
                ours = name.startswith(("expert_", "merged_")) or (
                    isinstance(module, RoutedWeight) and name in PARTS[1:]
                )
                if ours and parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                    init.zeros_(parameter)


class MMERModel(RoutePlanning, MediaFeatures, MMERPreTrainedModel):  # type: ignore[misc]
    """Towers, embeddings and the routed LLM: everything but the head."""

    def __init__(self, config: MMERConfig):
        super().__init__(config)
        with no_values_on_meta():
            self.language_model = AutoModel.from_config(config.text_config)
            inner = [name for name in config.delta_modules if name != "lm_head"]
            install_routing(self.language_model, inner, config.expert_tensors, len(config.experts), config.decoupling)
            # sdpa is what every class picks by itself where it can; anything else was asked for
            asked = None if config._attn_implementation in (None, "sdpa") else config._attn_implementation
            self.experts = nn.ModuleDict(
                {name: build_tower(config.expert_config(name), asked) for name in config.experts}
            )
        if config.added_tokens:
            self.added_embeddings = nn.Embedding(config.num_added_rows, config.text_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    # media

    def embed_media(self, input_ids: torch.Tensor, media: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
        """(batch, sequence, hidden): the features at their placeholders, zeros elsewhere. One encoder run for all.

        Raises ValueError where placeholders and features do not match in number.
        """
        table = self.get_input_embeddings().weight
        embeds = torch.zeros((*input_ids.shape, table.shape[-1]), dtype=table.dtype, device=input_ids.device)
        for expert, entry in self.config.experts.items():
            for modality, placeholder in entry["placeholders"].items():
                here = input_ids == placeholder["id"]
                inputs = media.get(expert, {})
                count, token = int(here.sum()), placeholder["token"]
                if not has_media(modality, inputs):
                    if count:
                        raise ValueError(
                            f"{count} {token} tokens stand in the text, but no {modality} came with them: "
                            "pass the processor's whole output"
                        )
                    continue
                features = self.get_media_features(expert, modality, **inputs).to(embeds.device, embeds.dtype)
                if count != features.shape[0]:
                    raise ValueError(
                        f"{modality} of expert {expert!r}: {count} {token} tokens in the text, "
                        f"{features.shape[0]} features from its tower"
                    )
                embeds = embeds.masked_scatter(here.unsqueeze(-1), features)
        return embeds

    def embed(
        self, input_ids: torch.Tensor, media_embeds: torch.Tensor | None, plan: RoutePlan, settled: bool = False
    ) -> torch.Tensor:
        """(batch, sequence, hidden): the LLM's rows by route, the added tokens' rows by route, the media's features.

        An id that the base has as padding is a padding row on the base route, as in the base itself. Raises ValueError
        for placeholders without media, unless that is `settled`.
        """
        embeddings = self.get_input_embeddings()
        routes = plan.route_ids.to(input_ids.device)
        base_own = (routes == BASE_ROUTE) & (input_ids < self.config.text_config.vocab_size)
        if not self.config.added_tokens:
            embeds = embeddings(input_ids)
        else:
            ids = torch.tensor([token["id"] for token in self.config.added_tokens], device=input_ids.device)
            match = input_ids.unsqueeze(-1) == ids  # (batch, sequence, added tokens)
            added = match.any(-1) & ~base_own
            embeds = embeddings(input_ids.masked_fill(added, 0))
            # for all tokens, also where none is an added one: to look at that would be to wait for the device
            table = torch.tensor(self.config.added_rows(), device=input_ids.device)
            rows = self.added_embeddings(table[routes, match.to(torch.uint8).argmax(-1)])
            rows = embed_rows(embeddings, rows.flatten(0, 1), input_ids.shape).to(embeds.dtype)
            embeds = torch.where(added.unsqueeze(-1), rows, embeds)
        if settled and media_embeds is None:
            return embeds
        media = torch.zeros_like(input_ids, dtype=torch.bool)
        for token_id in self.config.placeholder_experts():
            media = media | (input_ids == token_id)
        if media_embeds is not None:
            embeds = torch.where(media.unsqueeze(-1), media_embeds.to(embeds.dtype), embeds)
        elif (media & ~base_own).any():
            self.embed_media(input_ids, {})  # raises, naming the placeholder
        return embeds

    # routes

    def _blocks(self, input_ids, media_embeds, blocks, cache) -> torch.Tensor | None:
        """`block_sequence_ids` of media whose tokens see each other, None where there are none."""
        tokens = self.config.bidirectional_tokens()
        if blocks is None and tokens and media_embeds is not None and input_ids is not None:
            blocks = media_blocks(input_ids, tokens)
        if blocks is None or not (blocks != OUTSIDE).any():
            return None
        if input_ids is not None and cache is not None and int(cache.get_seq_length()) > 0:
            check_open_ends(getattr(cache, "mmer_open_ends", None), input_ids, blocks)
        return blocks

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        route_ids: torch.Tensor | None = None,
        text_route: TextRoute | None = None,
        media_embeds: torch.Tensor | None = None,
        block_sequence_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        route_plan: RoutePlan | None = None,
        **kwargs,
    ) -> MMERModelOutputWithPast:
        """
        route_ids: (batch, sequence) int64, text_route: (batch,) int64 or route names; derived from the placeholders
        when absent. route_plan: what `plan_routes` makes of them, in their place. media_embeds: (batch, sequence,
        hidden), features already at their placeholders (`embed_media`). Media tensors come as "<expert>.<name>".
        block_sequence_ids: (batch, sequence) int64, tokens of one number see each other and -1 is causal; taken from
        the placeholders when absent. mm_token_type_ids is accepted because processors make it; routes do not need it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids or inputs_embeds: exactly one of the two")
        cache = one_cache(cache, past_key_values)
        media = self.media_inputs(kwargs)
        if media and media_embeds is None:
            if input_ids is None:
                raise ValueError(f"media of {sorted(media)} need input_ids: their placeholders say where features go")
            media_embeds = self.embed_media(input_ids, media)
        plan, settled = route_plan, route_plan is not None or torch.compiler.is_compiling()
        if plan is None:
            plan = self._plan(input_ids, route_ids, text_route, inputs_embeds, cache, media_embeds)
        blocks = self._blocks(input_ids, media_embeds, block_sequence_ids, cache)
        with route_scope(plan):
            if input_ids is not None:
                inputs_embeds = self.embed(input_ids, media_embeds, plan, settled)
            if blocks is not None:
                llm = self.language_model.config
                attention_mask = block_masks(llm, inputs_embeds, attention_mask, cache, position_ids, blocks)
            outputs = self.language_model(
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                mmer_plan=plan,
                **{CACHE: cache},
                **kwargs,
            )
        if (filled := getattr(outputs, CACHE)) is not None:
            filled.mmer_text_route = plan.text_route
            filled.mmer_open_ends = None if blocks is None or input_ids is None else open_ends(input_ids, blocks)
        return MMERModelOutputWithPast(**outputs, plan=plan)


class MMERForConditionalGeneration(MMERPreTrainedModel, MMERGenerationMixin):  # type: ignore[misc]
    """The model that users load: `AutoModel.from_pretrained("org/mmer-…", trust_remote_code=True)`."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MMERConfig):
        super().__init__(config)
        text = config.text_config
        self.model = MMERModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        tied = text.tie_word_embeddings
        if ("embed_tokens" if tied else "lm_head") in config.delta_modules:
            route_weight_of(self.lm_head, len(config.experts), config.decoupling)
        shared = [name for name, value in self.lm_head._parameters.items() if value is not None] if tied else []
        self._tied_weights_keys = {f"lm_head.{name}": f"model.language_model.embed_tokens.{name}" for name in shared}
        if config.added_tokens and not tied:
            self.added_head = nn.Linear(text.hidden_size, config.num_added_rows, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def plan_routes(self, *args, **kwargs) -> RoutePlan:
        """As RoutePlanning.plan_routes."""
        return self.model.plan_routes(*args, **kwargs)

    # logits

    def _logits(self, hidden: torch.Tensor, plan: RoutePlan, base_only: bool) -> torch.Tensor:
        """(batch, positions, hidden) -> (batch, positions, vocabulary). Added tokens a route does not know get -inf.

        The added tokens' columns are left out with `base_only`: even a softmax over more columns rounds differently.
        """
        config, text = self.config, self.config.text_config
        hidden = scaled_hidden(text, hidden)
        with route_scope(plan):
            logits = scaled_logits(text, self.lm_head(hidden))
        if base_only or not config.added_tokens:
            return logits
        added = scaled_logits(text, self._added_products(hidden)).to(logits.dtype)
        routes = plan.route_ids.to(hidden.device)
        added = added.gather(-1, torch.tensor(config.added_rows(), device=hidden.device)[routes])
        known = torch.tensor(self._known_tokens(), device=hidden.device)[routes]
        ids = torch.tensor([token["id"] for token in config.added_tokens], device=hidden.device)
        width = config.vocab_size - logits.shape[-1]
        logits = nn.functional.pad(logits, (0, width), value=-torch.inf)
        # the base may have an added token's id as padding: that column is the base route's alone
        unknown = logits[..., ids].masked_fill((routes != BASE_ROUTE).unsqueeze(-1), -torch.inf)
        return logits.index_copy(-1, ids, torch.where(known, added, unknown))

    def _added_products(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, positions, rows of added tokens). A product over more rows rounds differently, and a token that
        joins later is to leave the others' logits as they are: so all blocks are of one size.
        """
        tied = self.config.text_config.tie_word_embeddings
        weight = (self.model.added_embeddings if tied else self.added_head).weight.to(hidden.dtype)
        blocks = nn.functional.pad(weight, (0, 0, 0, -len(weight) % _ADDED_ROWS)).split(_ADDED_ROWS)
        return torch.cat([nn.functional.linear(hidden, block) for block in blocks], -1)[..., : len(weight)]

    def _known_tokens(self) -> list[list[bool]]:
        """(routes, added tokens): an expert writes its own added tokens, the merged route all that an expert has;
        placeholders nobody.
        """
        config = self.config
        hidden = config.placeholder_experts()
        words = [bool(token["experts"]) and token["id"] not in hidden for token in config.added_tokens]
        experts = [
            [word and name in token["experts"] for word, token in zip(words, config.added_tokens)]
            for name in config.experts
        ]
        return [[False] * len(words), words, *experts]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        route_ids: torch.Tensor | None = None,
        text_route: TextRoute | None = None,
        media_embeds: torch.Tensor | None = None,
        block_sequence_ids: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        base_only: bool | None = None,
        route_plan: RoutePlan | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments as of MMERModel.forward; labels (batch, sequence) with -100 where no loss is taken.

        logits: (batch, positions, config.vocab_size), or (batch, positions, config.text_config.vocab_size), the
        base's own logits, with `base_only`. That is the default for a batch whose tokens all take the base route.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            route_ids=route_ids,
            text_route=text_route,
            media_embeds=media_embeds,
            block_sequence_ids=block_sequence_ids,
            route_plan=route_plan,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        plan = outputs.plan if whole else outputs.plan.keep(kept)
        base_only = outputs.plan.single == BASE_ROUTE if base_only is None else base_only
        logits = self._logits(outputs.last_hidden_state[:, kept, :], plan, base_only)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )
