"""Which multimodal classes can be experts: what a class does beside putting features among the embeddings.

Enters: an expert's class on the meta device, and its config. Leaves: nothing, or ValueError that says what was found,
why it does not fit and what to do. An expert's tokens run through the base's own LLM, with its attention, cache and
positions; the features of the towers stand at their placeholders, and nothing else reaches the LLM. So a class fits
when its forward hands embeddings and nothing else to a language model that exists without it. What a forward does is
read from its source, so a class that is not known yet is judged like the others. Invariant: tokens, embeddings, masks,
positions, cache, features and other arguments come to the language model, in the source of the base model's forward,
by the forms that are listed here and that the merged model has too; any other form is refused, harmless or not. Not
seen is what the forward does through what it calls (get_placeholder_mask, decorators, hooks), what it writes through a
second name of the same tensor, and what becomes of the language model's output (a change of states or logits).
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
_CACHED = r"\w+ = (\w+)\.get_seq_length\(\) if \1 is not None else 0"
_PLACES = r"\(?input_ids == self\.config\.\w+_token_(id|index)\)?"
# all that may be written to the variables that decide over tokens, cache and positions
_PLAIN = {
    "cache": r"cache = DynamicCache\(config=self\.config\)",
    "llm_input_ids": r"llm_input_ids( = input_ids\.clone\(\)|\[(is_audio_idx|multimodal_mask)\] = 0)",
    "is_audio_idx": rf"is_audio_idx = {_PLACES}",
    "multimodal_mask": rf"multimodal_mask = {_PLACES} \| {_PLACES}",
    "position_ids": r"position_ids = (position_ids\.unsqueeze\(0\)|torch\.arange\((inputs_embeds\.shape\[1\]|"
    r"cache_length, seq_len \+ cache_length)(, \w+=[\w.]+)*\)( \+ past_seen_tokens)?)",
    "past_seen_tokens": _CACHED,
    "cache_length": _CACHED,
    "seq_len": r"seq_len = inputs_embeds\.shape\[1\]",
}
_EMBED = re.compile(r"self\.(\w+\.)*(get_input_embeddings\(\)|embed_tokens)\((llm_)?input_ids\)")
_ASK = re.compile(r"self\.get_(image|video|audio)_features")
# methods of transformers' own classes that put features at placeholders (the last for prompts of older processors)
_MERGERS = ("inputs_merger", "get_merged_audio_embeddings", "_merge_input_ids_with_audio_features")
# methods that give the values which they get: of whole embeddings, of features, of masks
_MOVED = frozenset({"to", "clone", "contiguous"})
_SHAPED = _MOVED | {"reshape", "view", "flatten", "squeeze", "unsqueeze", "get"}
_SPREAD = _SHAPED | {"expand_as", "bool"}
_CROSS = re.compile(r"cross_?attn|cross_?attention|encoder_attn")


def _variable(node: ast.AST) -> str:
    """The variable that an expression is a part, an item or a method of."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


@dataclass
class Forward:
    """What a multimodal class hands to its language model: `arguments` (name, expression), all `writes` before
    (variable, statement, value), and the `masks` and `features` that are scattered among the embeddings."""

    parameters: list[str] = field(default_factory=list)
    rest: str | None = None  # the name of its **kwargs
    mergers: set[str] = field(default_factory=set)
    arguments: list[tuple[str, str]] = field(default_factory=list)
    writes: list[tuple[str, str, ast.expr]] = field(default_factory=list)
    masks: list[ast.expr] = field(default_factory=list)
    features: list[ast.expr] = field(default_factory=list)
    calls: int = 0

    @classmethod
    def of(cls, core: nn.Module, child: str) -> "Forward":
        function = inspect.unwrap(type(core).forward)
        try:
            source = textwrap.dedent(inspect.getsource(function))
        except OSError as error:
            raise ValueError(
                f"{type(core).__name__}: what its forward does cannot be read ({error}), so it cannot be judged as an "
                "expert. Install its code as source files"
            ) from error
        taken = inspect.getfullargspec(function)
        known = {name: getattr(getattr(type(core), name, None), "__module__", "") for name in _MERGERS}
        mergers = {f"self.{name}" for name, place in known.items() if place.startswith("transformers.models.")}
        made = cls(taken.args + taken.kwonlyargs, taken.varkw, mergers)
        for node in ast.walk(ast.parse(source)):
            made._read(node, f"self.{child}")
        for statement, value in [(text, ast.unparse(node)) for name, text, node in made.writes if name == made.rest]:
            item = re.match(r"\w+\['(\w+)'\] = ", statement)
            made.arguments.append((item[1] if item else f"**{value}", value))
        return made

    def _read(self, node: ast.AST, llm: str):
        match node:
            case ast.Assign(targets, value):
                for target in targets:
                    self._write(target, value)
            case ast.AugAssign(target, op, value):
                self._write(target, ast.BinOp(target, op, value))
            case ast.AnnAssign(target, _, ast.expr() as value) | ast.NamedExpr(target, value):
                self._write(target, value)
            case ast.For(target, value) | ast.comprehension(target, value) | ast.withitem(value, ast.expr() as target):
                self._write(target, value)
            case ast.Expr(ast.Call() as call):  # its result is dropped, so it is there for what it changes
                self._act(call)
            case ast.Call(func):
                self._call(node, ast.unparse(func), llm)

    def _write(self, target: ast.expr, value: ast.expr):
        if not isinstance(target, ast.Tuple | ast.List):
            self.writes.append((_variable(target), f"{ast.unparse(target)} = {ast.unparse(value)}", value))
        elif not (isinstance(value, ast.Call) and ast.unparse(value.func) in self.mergers):
            for i, part in enumerate(target.elts):
                self._write(part, ast.Subscript(value, ast.Constant(i)))

    def _act(self, call: ast.Call):
        """`name.mul_(2)` or `change(name)`."""
        given = [node for node in (*call.args, *(k.value for k in call.keywords)) if isinstance(node, ast.Name)]
        names = {_variable(call.func), *(node.id for node in given)}
        reads = ast.unparse(call.func) in (f"{self.rest}.get", f"{self.rest}.pop")
        if not reads and not names & {"logger", "warnings", "print"}:
            self.writes += [(name, ast.unparse(call), call) for name in names]

    def _call(self, call: ast.Call, called: str, llm: str):
        named = {k.arg or f"**{ast.unparse(k.value)}": k.value for k in call.keywords}
        if called == llm:
            self.calls += 1
            self.arguments += [(ast.unparse(value), "without its name") for value in call.args]
            self.arguments += [(k, ast.unparse(value)) for k, value in named.items() if k != f"**{self.rest}"]
        elif called == "inputs_embeds.masked_scatter":
            self.masks += [*call.args, *named.values()][:1]
            self.features += [*call.args, *named.values()][1:]
        elif called in self.mergers:
            given = [value for k, value in named.items() if k.endswith(("_features", "_hidden_states"))]
            self.features += given + call.args
        elif re.search(r"[^_]_$", called) or named.keys() & {"out", "inplace"} or _variable(call.func) == self.rest:
            self._act(call)

    def own(self, name: str, *behind: str) -> str | None:
        """What the language model gets as `name` instead of the forward's argument of this name, or what is written to
        it or to the variables `behind` it and may not be written there."""
        given = [value for argument, value in self.arguments if argument == name]
        if not given and self.calls and name in self.parameters:
            return f"{name} is kept back"
        changed = [value for value in given if value != name]
        for variable, statement, value in self.writes:
            if variable == "inputs_embeds":
                kept = statement.startswith("inputs_embeds = ") and not self.changed([value], self._embeds, _MOVED)
            else:
                kept = variable in _PLAIN and re.fullmatch(_PLAIN[variable], statement) is not None
            changed += [statement] * (variable in (name, *behind) and not kept)
        return changed[0] if changed else None

    def changed(self, nodes: list[ast.expr], source: Callable[[ast.expr], bool], same: frozenset[str]) -> str | None:
        """The first expression on the way back from `nodes` that is no `source` and does more than pass it on."""
        wanted, seen = list(nodes), set[str]()
        for node in wanted:  # which grows
            text = ast.unparse(node)
            passed = [] if text in seen or source(node) else self._passed(node, same)
            if passed is None:
                return text
            seen.add(text)
            wanted += passed
        return None

    def _passed(self, node: ast.expr, same: frozenset[str]) -> list[ast.expr] | None:
        """What `node` has its values from; None where they are calculated, picked or come from nowhere."""
        match node:
            case ast.Constant(None) | ast.Dict([]):
                return []
            case ast.Name(own):
                return [value for name, _, value in self.writes if name == own] or None
            case ast.IfExp(_, chosen, otherwise):
                return [chosen, otherwise]
            case ast.Call(ast.Attribute(ast.Name("torch"), "cat" | "stack"), [value, *dim]):
                dims = [*dim, *(k.value for k in node.keywords)]
                return [value] if all(ast.unparse(given) == "0" for given in dims) else None
            case ast.Call(ast.Attribute(value, method)):
                return [value] if method in same else None
            case ast.Attribute(value, "pooler_output") | ast.Subscript(value, ast.Constant(str())):
                return [value]
            case ast.ListComp(value, [ast.comprehension(ifs=[])]):
                return [value]
        return None

    def _embeds(self, node: ast.expr) -> bool:
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        puts = called == "inputs_embeds.masked_scatter" or called in self.mergers
        return puts or _EMBED.fullmatch(ast.unparse(node)) is not None

    def places(self, node: ast.expr) -> bool:
        match node:
            case ast.Call(func) | ast.Subscript(ast.Call(func), ast.Constant()):
                return ast.unparse(func) == "self.get_placeholder_mask"
        return all(re.fullmatch(_PLACES, part) for part in ast.unparse(node).split(" | "))

    def asks(self, node: ast.expr) -> bool:
        if not (isinstance(node, ast.Call) and _ASK.fullmatch(ast.unparse(node.func))):
            return False
        given = [*node.args, *(k.value for k in node.keywords if k.arg != "return_dict")]
        return not self.changed(given, self._given, _SHAPED)

    def _given(self, node: ast.expr) -> bool:
        """An argument of the forward, or its first item, which is all there is in a packed batch; or a setting."""
        plain = re.fullmatch(r"([a-z_]\w*)(\[:1\])?|self\.config\.\w+", ast.unparse(node))
        return plain is not None and plain[1] not in {name for name, _, _ in self.writes} - {self.rest}


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


def _one_class(found: Candidate) -> str | None:
    return "its language model and the rest in one class" if found.child is None else None


def _own_mask(found: Candidate) -> str | None:
    own = found.forward.own("attention_mask", "cache", "past_key_values")
    return f"an attention mask of its own ({own})" if own else None


def _own_positions(found: Candidate) -> str | None:
    own = found.forward.own("position_ids", "past_seen_tokens", "cache_length", "seq_len")
    return f"positions of its own ({own})" if own else None


def _own_embeddings(found: Candidate) -> str | None:
    forward = found.forward
    if own := forward.own("inputs_embeds", "input_ids", "llm_input_ids", "is_audio_idx", "multimodal_mask"):
        return f"other things among its embeddings than the features of media ({own})"
    places = forward.changed(forward.masks, forward.places, _SPREAD)
    return f"features that stand elsewhere than at their placeholders ({places})" if places else None


def _changed_features(found: Candidate) -> str | None:
    """Features of a class that are asked for in its own way (OWN_FEATURES) are right, whatever its forward does."""
    if any(kind == found.config.model_type for kind, _ in OWN_FEATURES):
        return None
    asking = [name for name in dir(type(found.core)) if re.fullmatch(r"get_(image|video|audio)_features", name)]
    for name in asking:
        if "input_ids" in inspect.signature(getattr(type(found.core), name)).parameters:
            return f"features that depend on the text around them ({name} takes input_ids)"
    changed = found.forward.changed(found.forward.features, found.forward.asks, _SHAPED)
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
    "one class": (_one_class,
        "A tower is the class without its language model, and the language model is merged by the base's names",
        "Use a checkpoint whose class keeps the two apart"),
    "attention mask": (_own_mask,
        "Attention is the base's own and joint over all experts; which tokens see each other would differ", _OTHER),
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


def check_fitness(name: str, model: PreTrainedModel, config: PreTrainedConfig):
    """Raises ValueError where an expert of this class would compute something else in a merged model."""
    found = misfit(model, config)
    if found is not None:
        _, why, instead = RULES[found[0]]
        raise ValueError(f"expert {name!r}: {type(model).__name__} has {found[1]}. {why}. {instead}")


__all__ = ["RULES", "check_fitness", "misfit"]
