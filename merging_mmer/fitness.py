"""Which multimodal classes can be experts: what a class does beside putting features among the embeddings.

Enters: an expert's class on the meta device, and its config. Leaves: nothing, or ValueError that says what was found,
why it does not fit and what to do. An expert's tokens run through the base's own LLM, with its attention, cache and
positions; the features of the towers stand at their placeholders, and nothing else reaches the LLM. So a class fits
when its forward hands embeddings and nothing else to a language model that exists without it. What a forward does is
read from its source, so a class that is not known yet is judged like the others. Invariant: a class that computes
something which the merged model would leave out is refused.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_mmer.towers_mmer import OWN_FEATURES, language_model_name

# what every language model takes, and the merged model hands on
_HANDED = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "cache_position",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip
_POSITIONS = re.compile(r"torch\.arange\([^()]*\)( \+ [a-z_]+)?|position_ids\.unsqueeze\(0\)")
_EMBEDDINGS = re.compile(r"self\.(\w+\.)?\w+\(.*\)|inputs_embeds\.masked_scatter\(.*\)")
_CROSS = re.compile(r"cross_?attn|cross_?attention|encoder_attn")


@dataclass
class Forward:
    """What a multimodal class hands to its language model: `arguments` (name -> expression), `values`, all that is
    assigned before (target, value), and `scattered`, what is put among the embeddings."""

    arguments: dict[str, str] = field(default_factory=dict)
    values: list[tuple[str, ast.expr]] = field(default_factory=list)
    scattered: list[ast.expr] = field(default_factory=list)
    called: bool = False

    @classmethod
    def of(cls, core: nn.Module, child: str) -> "Forward":
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(core).forward)))
        except OSError as error:
            raise ValueError(
                f"{type(core).__name__}: what its forward does cannot be read ({error}), so it cannot be judged as an "
                "expert. Install its code as source files"
            ) from error
        made = cls()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{child}":
                made.called = True
                made.arguments.update({k.arg: ast.unparse(k.value) for k in node.keywords if k.arg is not None})
                made.arguments.update({ast.unparse(value): "without its name" for value in node.args})
            elif isinstance(node, ast.Assign):
                made.values += [(ast.unparse(target), node.value) for target in node.targets]
            elif isinstance(node, ast.AugAssign):
                made.values.append((ast.unparse(node.target), ast.BinOp(node.target, node.op, node.value)))
            elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
                made.values.append((ast.unparse(node.target), node.value))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "inputs_embeds.masked_scatter":
                made.scattered.append(node.args[1])
        return made

    def written(self, name: str, plain: re.Pattern) -> str | None:
        """What is written to `name` that `plain` does not cover."""
        for target, node in self.values:
            value = ast.unparse(node)
            if target.partition("[")[0] == name and (target != name or not plain.fullmatch(value)):
                return f"{target} = {value}"
        return None

    def calculated(self, name: str) -> str | None:
        """What is written to `name` and is no call."""
        for target, node in self.values:
            if target == name and not isinstance(node, ast.Call):
                return f"{target} = {ast.unparse(node)}"
        return None

    def changed_features(self) -> str | None:
        """The first value that picks some of the features or calculates with them, on the way from what
        `get_<modality>_features` gives to what is put among the embeddings."""
        wanted, seen = list(self.scattered), {"inputs_embeds", "mm_encoder_outputs", "self", "torch"}
        while wanted:
            node = wanted.pop()
            parts = list(ast.walk(node))
            picks = [part.slice for part in parts if isinstance(part, ast.Subscript)]
            calculated = any(isinstance(part, ast.BinOp) for part in parts)
            if calculated or any(not _constant(pick) for pick in picks) or "last_hidden_state" in ast.unparse(node):
                return ast.unparse(node)
            for name in {part.id for part in parts if isinstance(part, ast.Name)} - seen:
                seen.add(name)
                wanted += [value for target, value in self.values if target == name]
        return None


def _constant(node: ast.expr) -> bool:
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


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
    def handed(self) -> set[str]:
        """What the language model gets beyond what every language model takes."""
        return set(self.forward.arguments) - _HANDED


def _encoder_decoder(found: Candidate) -> str | None:
    if getattr(found.config, "is_encoder_decoder", False) or getattr(found.text, "is_encoder_decoder", False):
        return "an encoder and a decoder"
    return None


def _cross_attention(found: Candidate) -> str | None:
    layers = [name for name, _ in found.llm.named_modules() if _CROSS.search(name.rpartition(".")[2])]
    layers += sorted(name for name in found.handed if name.startswith(("cross_attention", "encoder_hidden")))
    return f"cross-attention ({layers[0]})" if layers else None


def _experts(found: Candidate) -> str | None:
    named = [name for name, _ in found.llm.named_modules() if name.rpartition(".")[2] == "experts"]
    return f"a mixture of experts ({named[0]})" if named else None


def _rotary_axes(found: Candidate) -> str | None:
    ropes = getattr(found.text, "rope_parameters", None) or {}
    if "mrope_section" in str(ropes) or hasattr(found.core, "get_rope_index"):
        return "rotary positions over several axes (mrope)"
    return None


def _per_layer_embeddings(found: Candidate) -> str | None:
    handed = [name for name in found.handed if re.search(r"per_layer|\bple_|_ple\b", name)]
    if getattr(found.text, "hidden_size_per_layer_input", None) or handed:
        return "embeddings for each layer, which are looked up by token id"
    return None


def _deep_features(found: Candidate) -> str | None:
    handed = [name for name in found.handed if "deepstack" in name or "visual_pos_masks" in name]
    return f"features that enter at several layers ({handed[0]})" if handed else None


def _one_class(found: Candidate) -> str | None:
    return "its language model and the rest in one class" if found.child is None else None


def _own_mask(found: Candidate) -> str | None:
    given = found.forward.arguments.get("attention_mask", "attention_mask")
    if given != "attention_mask" or found.forward.written("attention_mask", re.compile("attention_mask")):
        return f"an attention mask of its own ({given})"
    return None


def _own_positions(found: Candidate) -> str | None:
    given = found.forward.arguments.get("position_ids", "position_ids")
    if given != "position_ids":
        return f"positions of its own ({given})"
    written = found.forward.written("position_ids", _POSITIONS)
    return f"positions of its own ({written})" if written else None


def _own_embeddings(found: Candidate) -> str | None:
    given = found.forward.arguments.get("inputs_embeds", "inputs_embeds")
    written = found.forward.written("inputs_embeds", _EMBEDDINGS) or found.forward.calculated("inputs_embeds")
    if given != "inputs_embeds" or written:
        return f"other things among its embeddings than the features of media ({written or given})"
    return None


def _changed_features(found: Candidate) -> str | None:
    """Features of a class that are asked for in its own way (OWN_FEATURES) are right, whatever its forward does."""
    if any(kind == found.config.model_type for kind, _ in OWN_FEATURES):
        return None
    asking = [name for name in dir(type(found.core)) if re.fullmatch(r"get_(image|video|audio)_features", name)]
    for name in asking:
        if "input_ids" in inspect.signature(getattr(type(found.core), name)).parameters:
            return f"features that depend on the text around them ({name} takes input_ids)"
    if changed := found.forward.changed_features():
        return f"features that are changed before they are put in their places ({changed})"
    return None


def _own_arguments(found: Candidate) -> str | None:
    if not found.forward.called:
        return f"a forward that does not call its language model ({found.child}) itself"
    return f"{sorted(found.handed)} handed to its language model" if found.handed else None


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
_OTHER_EXPERT = "Use an expert whose class puts its features at placeholders (LLaVA, InternVL, Idefics3, Voxtral …)"
# in the order in which they are looked for: (what is found, why it does not fit, what to do)
RULES: dict[str, tuple[Callable[[Candidate], str | None], str, str]] = {
    "encoder-decoder": (
        _encoder_decoder,
        "The merged model is one causal language model",
        _OTHER_EXPERT,
    ),
    "cross-attention": (
        _cross_attention,
        "Its media do not stand among the tokens, and the base has no such layers to be merged with",
        _OTHER_EXPERT,
    ),
    "mixture of experts": (
        _experts,
        _NO_ROUTES,
        "Use experts of a dense base",
    ),
    "mrope": (
        _rotary_axes,
        "Positions are joint over all experts and counted along one axis",
        "Use an expert with positions along one axis (LLaVA-OneVision, InternVL, Idefics3 …)",
    ),
    "per-layer embeddings": (
        _per_layer_embeddings,
        "Features have no token id, and routes no such tables",
        _OTHER_EXPERT,
    ),
    "deep features": (
        _deep_features,
        "Features enter once, among the embeddings",
        _OTHER_EXPERT,
    ),
    "one class": (
        _one_class,
        "A tower is the class without its language model, and the language model is merged by the base's names",
        "Use a checkpoint whose class keeps the two apart",
    ),
    "attention mask": (
        _own_mask,
        "Attention is the base's own and joint over all experts; which tokens see each other would differ",
        _OTHER_EXPERT,
    ),
    "positions": (
        _own_positions,
        "Positions are joint over all experts and counted from 0",
        _OTHER_EXPERT,
    ),
    "other embeddings": (
        _own_embeddings,
        "Only features at placeholders reach the merged language model",
        _OTHER_EXPERT,
    ),
    "changed features": (
        _changed_features,
        "Features are asked of the class's get_<modality>_features and put in their places as they are",
        _OTHER_EXPERT,
    ),
    "other arguments": (
        _own_arguments,
        "Only embeddings reach the merged language model",
        _OTHER_EXPERT,
    ),
    "no bare language model": (
        _no_bare_class,
        "The merged model is built on a causal language model of its own, which the expert was tuned from",
        "Use an expert whose language model stands in transformers by itself (llama, qwen2, mistral, granite …)",
    ),
    "other layers": (
        _other_layers,
        _NO_ROUTES,
        "Use experts of a base made of attention and linears",
    ),
}


def misfit(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, str] | None:
    """(rule, what was found) of the first rule of `RULES` that speaks against the class, or None."""
    candidate = Candidate(model, config)
    for rule, (look, _, _) in RULES.items():
        if found := look(candidate):
            return rule, found
    return None


def check_fitness(name: str, model: PreTrainedModel, config: PreTrainedConfig):
    """Raises ValueError where an expert of this class would compute something else in a merged model."""
    found = misfit(model, config)
    if found is not None:
        rule, what = found
        _, why, instead = RULES[rule]
        raise ValueError(f"expert {name!r}: {type(model).__name__} has {what}. {why}. {instead}")


__all__ = ["RULES", "check_fitness", "misfit"]
