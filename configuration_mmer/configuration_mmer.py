"""MMERConfig: what a merged model is.

Holds the base LLM's own config, the experts by name in a fixed order (their own configs, modalities and placeholder
tokens), which tensors of the LLM carry deltas or per-expert copies, how the experts' parameters are recovered, and
which route text takes. It is cross-checked when it is built, and survives JSON unchanged.
"""

import copy
from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import modeling_auto

from .composed_config_mmer import ComposedConfig
from .routes_mmer import AUTO, MODALITIES, ROUTE_NAMES

DECOUPLING_KINDS = ("paper", "mask", "exact", "none")
# layers whose masks can let the tokens of one medium see each other
MASKED_LAYERS = ("full_attention", "sliding_attention")
SCALE_KINDS = ("row", "tensor", "none")


class MMERConfig(PreTrainedConfig):
    r"""
    Args:
        text_config: the base LLM's own config, unchanged.
        experts: name -> {"config": the expert's own config as a dict,
            "placeholders": {modality: {"token": str, "id": int}}}, and "bidirectional": [modalities] where the tokens
            of one medium see each other (Gemma 3's pictures): a run of that placeholder. Absent: all attention is
            causal.
        expert_names: the experts in the order of the masks: route 2 + i is the i-th. JSON files of transformers sort
            their keys, so the order stands by itself; it is that of `experts` when absent.
        default_experts: modality -> the expert that encodes it when none is asked for. Filled with the first expert of
            each modality when absent.
        delta_modules: LLM modules whose weight has a merged vector, relative to the LLM ("layers.0.self_attn.q_proj",
            "embed_tokens") or "lm_head".
        expert_tensors: LLM tensors of which each expert keeps its own copy ("layers.0.input_layernorm.weight",
            "layers.0.self_attn.q_proj.bias").
        decoupling: {"kind": "paper" | "mask" | "exact" | "none", "scale": "row" | "tensor" | "none", "rank": int}.
            `paper` is the mask alone, `exact` the correction alone (no mask), `none` a static merge.
        added_tokens: [{"token": str, "id": int, "experts": [names]}], the tokens that the base does not have. Row j
            of the second, small embedding matrix belongs to entry j. Where experts tuned one token apart, the entry
            has "rows", {expert: the row that its route reads}, and row j is the mean of them; it stays as
            it was where an expert joins or leaves later. An entry without experts holds the id of a token that left
            with its expert; nobody writes it.
        text_route: "auto" (base without media, the expert when all media are its own, else merged), "base", "merged"
            or an expert's name.

    Raises:
        ValueError: where the parts contradict one another; the message names the field, what was found, what is
            allowed.
    """

    model_type = "mmer"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}
    keys_to_ignore_at_inference = ["past_key_values"]

    # its own class is settled by transformers: a dict or a config goes in, the config stays
    text_config: Any = None
    experts: dict[str, Any] = field(default_factory=dict)
    expert_names: list[str] = field(default_factory=list)
    default_experts: dict[str, str] = field(default_factory=dict)
    delta_modules: list[str] = field(default_factory=list)
    expert_tensors: list[str] = field(default_factory=list)
    decoupling: dict[str, Any] = field(default_factory=dict)
    added_tokens: list[dict[str, Any]] = field(default_factory=list)
    text_route: str = AUTO
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.expert_names = list(self.expert_names or self.experts)
        if sorted(self.expert_names) != sorted(self.experts):
            raise ValueError(f"expert_names: found {self.expert_names}, but experts are {sorted(self.experts)}")
        self.experts = {name: self.experts[name] for name in self.expert_names}
        self.decoupling = {"kind": "mask", "scale": "row", "rank": 0, **self.decoupling}
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        self._check_experts()
        self._check_attention()
        self._check_defaults()
        self._check_decoupling()
        self._check_tokens()

    # what the rooms ask of it

    @property
    def vocab_size(self) -> int:
        """Width of the logits: the base's rows, and those of the added tokens that lie behind them."""
        return max([self.text_config.vocab_size, *(token["id"] + 1 for token in self.added_tokens)])

    def added_rows(self) -> list[list[int]]:
        """(routes, added tokens): the row of the small matrix that a route reads for each added token."""
        joint = list(range(len(self.added_tokens)))
        own = [
            [token.get("rows", {}).get(name, place) for place, token in enumerate(self.added_tokens)]
            for name in self.experts
        ]
        return [joint, joint, *own]

    @property
    def num_added_rows(self) -> int:
        return 1 + max(max(rows, default=-1) for rows in self.added_rows())

    @property
    def num_routes(self) -> int:
        return len(ROUTE_NAMES) + len(self.experts)

    def modalities(self, expert: str) -> list[str]:
        return list(self.experts[expert]["placeholders"])

    def expert_config(self, expert: str) -> PreTrainedConfig:
        """The expert's own config, as its class wants it."""
        values = copy.deepcopy(self.experts[expert]["config"])
        model_type = values.pop("model_type")
        if model_type == ComposedConfig.model_type:
            return ComposedConfig(**values)
        return AutoConfig.for_model(model_type, **values)

    def placeholder_experts(self) -> dict[int, int]:
        """Token id of a placeholder -> index of the expert whose features stand there."""
        return {
            entry["id"]: index
            for index, expert in enumerate(self.experts.values())
            for entry in expert["placeholders"].values()
        }

    def bidirectional_tokens(self) -> list[int]:
        """Token ids of the placeholders whose tokens see each other."""
        return [
            expert["placeholders"][modality]["id"]
            for expert in self.experts.values()
            for modality in expert.get("bidirectional", ())
        ]

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The LLM's config as generation sees it: `vocab_size` is the width of the logits, added tokens included."""
        if self.vocab_size == self.text_config.vocab_size:
            return self.text_config
        widened = copy.copy(self.text_config)
        widened.vocab_size = self.vocab_size
        return widened

    # cross-checks

    def _check_experts(self):
        for name, expert in self.experts.items():
            if name in (AUTO, *ROUTE_NAMES) or not name.replace("-", "_").isidentifier():
                raise ValueError(
                    f"experts: {name!r} cannot name an expert: use letters, digits, '_' and '-', "
                    f"and none of {[AUTO, *ROUTE_NAMES]}"
                )
            missing = {"config", "placeholders"} - set(expert)
            if missing:
                raise ValueError(f"experts.{name}: {sorted(missing)} missing, found {sorted(expert)}")
            if "model_type" not in expert["config"]:
                raise ValueError(f"experts.{name}.config: no model_type, so its class cannot be known")
            unknown = set(expert["placeholders"]) - set(MODALITIES)
            if unknown or not expert["placeholders"]:
                found = sorted(expert["placeholders"])
                raise ValueError(f"experts.{name}.placeholders: found {found}, expected some of {list(MODALITIES)}")
        if self.text_route not in (AUTO, *ROUTE_NAMES, *self.experts):
            raise ValueError(
                f"text_route: found {self.text_route!r}, expected one of {[AUTO, *ROUTE_NAMES, *self.experts]}"
            )

    def _check_attention(self):
        for name, expert in self.experts.items():
            found = expert.get("bidirectional", [])
            if not isinstance(found, list) or not set(found) <= set(expert["placeholders"]):
                raise ValueError(
                    f"experts.{name}.bidirectional: found {found!r}, expected a list of modalities of this expert, "
                    f"some of {self.modalities(name)}"
                )
        kinds = set(getattr(self.text_config, "layer_types", None) or []) - set(MASKED_LAYERS)
        if not kinds and getattr(self.text_config, "attention_chunk_size", None) is not None:
            kinds = {"chunked_attention"}
        if kinds and self.bidirectional_tokens():
            raise ValueError(
                f"experts: tokens of one medium see each other, but the base has layers of {sorted(kinds)}. Use a "
                f"base whose layers are of {list(MASKED_LAYERS)}"
            )

    def _check_defaults(self):
        first: dict[str, str] = {}
        for name in self.experts:
            for modality in self.modalities(name):
                first.setdefault(modality, name)
        self.default_experts = {**first, **self.default_experts}
        for modality, name in self.default_experts.items():
            if name not in self.experts or modality not in self.experts[name]["placeholders"]:
                raise ValueError(f"default_experts.{modality}: {name!r} is not an expert with that modality")

    def _check_decoupling(self):
        kind, scale, rank = (self.decoupling[key] for key in ("kind", "scale", "rank"))
        extra = set(self.decoupling) - {"kind", "scale", "rank"}
        if extra:
            raise ValueError(f"decoupling: unknown {sorted(extra)}, expected kind, scale and rank")
        if kind not in DECOUPLING_KINDS:
            raise ValueError(f"decoupling.kind: found {kind!r}, expected one of {list(DECOUPLING_KINDS)}")
        if scale not in SCALE_KINDS:
            raise ValueError(f"decoupling.scale: found {scale!r}, expected one of {list(SCALE_KINDS)}")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"decoupling.rank: found {rank!r}, expected a whole number of 0 or more")
        if kind == "paper" and (scale != "none" or rank != 0):
            raise ValueError(f"decoupling: kind 'paper' is the mask alone, but scale is {scale!r} and rank {rank}")
        for where in ("delta_modules", "expert_tensors"):
            names = getattr(self, where)
            if len(set(names)) != len(names):
                raise ValueError(f"{where}: {sorted({n for n in names if names.count(n) > 1})} named more than once")

    def _check_tokens(self):
        ids = [entry["id"] for expert in self.experts.values() for entry in expert["placeholders"].values()]
        if len(set(ids)) != len(ids):
            raise ValueError(f"experts: placeholder ids {ids} are not distinct, so a token's expert would be unclear")
        added = [token["id"] for token in self.added_tokens]
        if len(set(added)) != len(added):
            raise ValueError(f"added_tokens: ids {added} are not distinct")
        for token in self.added_tokens:
            unknown = set(token["experts"]) - set(self.experts)
            if unknown:
                raise ValueError(
                    f"added_tokens: {token['token']!r} belongs to {sorted(unknown)}, which are no experts"
                )
            if strangers := set(token.get("rows", {})) - set(token["experts"]):
                raise ValueError(
                    f"added_tokens: {token['token']!r} has rows for {sorted(strangers)}, but belongs to "
                    f"{token['experts']}"
                )
        rows = {row for token in self.added_tokens for row in token.get("rows", {}).values()}
        if rows != set(range(len(added), len(added) + len(rows))):
            raise ValueError(
                f"added_tokens: rows {sorted(rows)} of experts' own, expected those from {len(added)} on without a gap"
            )
        homeless = [i for i in ids if i not in added and i >= self.text_config.vocab_size]
        if homeless:
            raise ValueError(
                f"experts: placeholder ids {homeless} lie behind the vocabulary and are not in added_tokens"
            )


# `transformers serve` and the any-to-any pipeline know a multimodal class by this table of names alone: without its
# line the one looks for the class in transformers itself, and the other logs an error
_CLASSES = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
_CLASSES.setdefault(MMERConfig.model_type, "MMERForConditionalGeneration")

__all__ = ["MMERConfig"]
