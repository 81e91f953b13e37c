"""Which multimodal classes can be experts: what a class does beside putting features among the embeddings.

Enters: an expert's class on the meta device, and its config. Leaves: nothing, or ValueError that says what was found,
why it does not fit and what to do. An expert's tokens run through the base's own LLM, with its attention, cache and
positions; the features of the towers stand at their placeholders, and nothing else reaches the LLM. So a class fits
when its forward hands embeddings and nothing else to a language model that exists without it. What a forward does is
read from its source, so a class that is not known yet is judged like the others. Invariant: tokens, embeddings, masks,
positions, cache, features and other arguments come to the language model, in the source of the base model's forward,
by the forms that are listed here and in forward_source.py and that the merged model has too; any other form is
refused, harmless or not. Not seen is what the forward does through what it calls (get_placeholder_mask, decorators,
hooks), what it writes through a second name of the same tensor, and what becomes of the language model's output (a
change of states or logits).
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from modeling_mmer.towers_mmer import OWN_FEATURES, language_model_name

from .forward_source import SHAPED, SPREAD, Forward

# what every language model takes, and the merged model hands on
_HANDED = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "cache_position",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip
_CROSS = re.compile(r"cross_?attn|cross_?attention|encoder_attn")


@dataclass
class Candidate:
    """A class on the meta device, seen from the side of the language model inside it."""

    model: PreTrainedModel
    config: PreTrainedConfig

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @cached_property
    def core(self) -> Any:
        return self.model.base_model

    @cached_property
    def child(self) -> str | None:
        """The attribute that holds the language model; None where there is none apart from the whole."""
        if self.core is self.model or self.core.get_decoder() is self.core:
            return None
        try:
            return language_model_name(self.core)
        except ValueError:
            return None

    @cached_property
    def llm(self) -> nn.Module:
        return self.core.get_decoder() if self.child is None else getattr(self.core, self.child)

    @cached_property
    def forward(self) -> Forward:
        return Forward() if self.child is None else Forward.of(self.core, self.child)

    @cached_property
    def handed(self) -> list[str]:
        """What the language model gets beyond what every language model takes."""
        return sorted({name for name, _ in self.forward.arguments} - _HANDED)


def _encoder_decoder(found: Candidate) -> str | None:
    pair = any(getattr(config, "is_encoder_decoder", False) for config in (found.config, found.text))
    return "an encoder and a decoder" if pair else None


def _cross_attention(found: Candidate) -> str | None:
    layers = [name for name, _ in found.llm.named_modules() if _CROSS.search(name.rpartition(".")[2])]
    layers += [name for name in found.handed if name.startswith(("cross_attention", "encoder_hidden"))]
    return f"cross-attention ({layers[0]})" if layers else None


def _experts(found: Candidate) -> str | None:
    named = [name for name, _ in found.llm.named_modules() if name.rpartition(".")[2] == "experts"]
    return f"a mixture of experts ({named[0]})" if named else None


def _rotary_axes(found: Candidate) -> str | None:
    ropes = getattr(found.text, "rope_parameters", None) or {}
    several = "mrope_section" in str(ropes) or hasattr(found.core, "get_rope_index")
    return "rotary positions over several axes (mrope)" if several else None


def _per_layer_embeddings(found: Candidate) -> str | None:
    handed = [name for name in found.handed if re.search(r"per_layer|\bple_|_ple\b", name)]
    own = getattr(found.text, "hidden_size_per_layer_input", None) or handed
    return "embeddings for each layer, which are looked up by token id" if own else None


def _deep_features(found: Candidate) -> str | None:
    handed = [name for name in found.handed if "deepstack" in name or "visual_pos_masks" in name]
    return f"features that enter at several layers ({handed[0]})" if handed else None


def _classifier(found: Candidate) -> str | None:
    """ShieldGemma 2 is a Gemma 3 for transformers' generating classes, and its own class reads two logits of it."""
    kind, known = type(found.config), AutoModelForImageClassification._model_mapping
    return f"a head that picks a class ({getattr(known[kind], '__name__', known[kind])})" if kind in known else None


def _one_class(found: Candidate) -> str | None:
    return "its language model and the rest in one class" if found.child is None else None


def _own_mask(found: Candidate) -> str | None:
    own = found.forward.own("attention_mask", "cache", "past_key_values")
    if found.forward.in_blocks and getattr(found.text, "use_bidirectional_attention", False):
        own = "use_bidirectional_attention, by which the base alone lets all tokens see each other"
    return f"an attention mask of its own ({own})" if own else None


def _own_positions(found: Candidate) -> str | None:
    own = found.forward.own("position_ids", "past_seen_tokens", "cache_length", "seq_len")
    return f"positions of its own ({own})" if own else None


def _own_embeddings(found: Candidate) -> str | None:
    forward = found.forward
    if own := forward.own("inputs_embeds", "input_ids", "llm_input_ids"):
        return f"other things among its embeddings than the features of media ({own})"
    places = forward.changed(forward.masks + forward.emptied(), forward.places, SPREAD)
    return f"features that stand elsewhere than at their placeholders ({places})" if places else None


def _changed_features(found: Candidate) -> str | None:
    """Features of a class that are asked for in its own way (OWN_FEATURES) are right, whatever its forward does."""
    if any(kind == found.config.model_type for kind, _ in OWN_FEATURES):
        return None
    asking = [name for name in dir(type(found.core)) if re.fullmatch(r"get_(image|video|audio)_features", name)]
    for name in asking:
        if "input_ids" in inspect.signature(getattr(type(found.core), name)).parameters:
            return f"features that depend on the text around them ({name} takes input_ids)"
    changed = found.forward.changed(found.forward.features, found.forward.asks, SHAPED)
    return f"features that are changed before they are put in their places ({changed})" if changed else None


def _own_arguments(found: Candidate) -> str | None:
    forward = found.forward
    if forward.calls != 1:
        return f"a forward with {forward.calls} calls of its language model ({found.child}) instead of one"
    own = found.handed or [f"{k}={v}" for k, v in forward.arguments if v not in (k, "None", "True", "False")]
    return f"{own} handed to its language model" if own else None


def _no_bare_class(found: Candidate) -> str | None:
    kind = type(found.text)
    remote = "AutoModelForCausalLM" in (getattr(found.config, "auto_map", None) or {})
    if kind not in AutoModelForCausalLM._model_mapping and not remote:
        return f"a language model ({found.text.model_type}) that exists inside this class alone"
    stock = AutoModel._model_mapping[kind] if kind in AutoModel._model_mapping else None
    if stock is not None and not remote and type(found.llm) is not stock:
        return f"a language model of the class {type(found.llm).__name__}, not {getattr(stock, '__name__', stock)}"
    return None


def _other_layers(found: Candidate) -> str | None:
    for path, module in found.llm.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            linear = type(module) is nn.Linear or isinstance(module, nn.Embedding)
            small = name in ("weight", "bias") and parameter.ndim <= 2 and not isinstance(module, nn.Linear)
            if not (linear or small):
                return f"a layer that is no linear, embedding or norm ({path}.{name} of {type(module).__name__})"
    return None


_NO_ROUTES = "Routes are taken token by token by linears, embeddings and norms, and no other layer can follow them"
_OTHER = "Use an expert whose class puts its features at placeholders (LLaVA, InternVL, Idefics3, Voxtral …)"
# in the order in which they are looked for: (what is found, why it does not fit, what to do)
# fmt: off
RULES: dict[str, tuple[Callable[[Candidate], str | None], str, str]] = {
    "encoder-decoder": (_encoder_decoder, "The merged model is one causal language model", _OTHER),
    "cross-attention": (_cross_attention,
        "Its media do not stand among the tokens, and the base has no such layers to be merged with", _OTHER),
    "mixture of experts": (_experts, _NO_ROUTES, "Use experts of a dense base"),
    "mrope": (_rotary_axes, "Positions are joint over all experts and counted along one axis",
        "Use an expert with positions along one axis (LLaVA-OneVision, InternVL, Idefics3 …)"),
    "per-layer embeddings": (_per_layer_embeddings, "Features have no token id, and routes no such tables", _OTHER),
    "deep features": (_deep_features, "Features enter once, among the embeddings", _OTHER),
    "classifier": (_classifier, "The merged model answers in words, by its base's head", _OTHER),
    "one class": (_one_class,
        "A tower is the class without its language model, and the language model is merged by the base's names",
        "Use a checkpoint whose class keeps the two apart"),
    "attention mask": (_own_mask,
        "Attention is the base's own and joint over all experts, and beside it only the tokens of one picture can see "
        "each other, as in Gemma 3; which tokens see each other would differ", _OTHER),
    "positions": (_own_positions, "Positions are joint over all experts and counted from 0", _OTHER),
    "other embeddings": (_own_embeddings, "Only features at placeholders reach the merged language model", _OTHER),
    "changed features": (_changed_features,
        "Features are asked of the class's get_<modality>_features and put in their places as they are", _OTHER),
    "other arguments": (_own_arguments, "Only embeddings reach the merged language model", _OTHER),
    "no bare language model": (_no_bare_class,
        "The merged model is built on a causal language model of its own, which the expert was tuned from",
        "Use an expert whose language model stands in transformers by itself (llama, qwen2, mistral, granite …)"),
    "other layers": (_other_layers, _NO_ROUTES, "Use experts of a base made of attention and linears"),
}
# fmt: on


def misfit(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, str] | None:
    """(rule, what was found) of the first rule of `RULES` that speaks against the class, or None."""
    candidate = Candidate(model, config)
    for rule, (look, _, _) in RULES.items():
        if found := look(candidate):
            return rule, found
    return None


def bidirectional(model: PreTrainedModel, config: PreTrainedConfig) -> list[str]:
    """The modalities whose tokens see each other within one medium, in a class that fits."""
    # the known masks are made of the token types 1, which in transformers' processors are those of images
    return ["image"] if Candidate(model, config).forward.in_blocks else []


def check_fitness(name: str, model: PreTrainedModel, config: PreTrainedConfig):
    """Raises ValueError where an expert of this class would compute something else in a merged model."""
    found = misfit(model, config)
    if found is not None:
        _, why, instead = RULES[found[0]]
        raise ValueError(f"expert {name!r}: {type(model).__name__} has {found[1]}. {why}. {instead}")


__all__ = ["RULES", "bidirectional", "check_fitness", "misfit"]
