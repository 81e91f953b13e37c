"""What a multimodal class's forward does before its language model, read from its source.

Enters: the model that holds the language model, and the name of that child. Leaves: what the language model is handed
and what was written to it before (`Forward`), in the forms that `merging_mmer/fitness.py` judges. Invariant: every
call, assignment and change in place of the forward's own source is read; what stands in what it calls is not.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_CACHED = r"\w+ = (\w+)\.get_seq_length\(\) if \1 is not None else 0"
_PLACES = r"\(?input_ids == self\.config\.\w+_token_(id|index)\)?"
# all that may be written to the variables that decide over tokens, cache and positions
_PLAIN = {
    "cache": r"cache = DynamicCache\(config=self\.config\)",
    "llm_input_ids": r"llm_input_ids( = input_ids(\.clone\(\))?|\[\w+\] = 0)",
    "position_ids": r"position_ids = (position_ids\.unsqueeze\(0\)|torch\.arange\((inputs_embeds\.shape\[1\]|"
    r"cache_length, seq_len \+ cache_length)(, \w+=[\w.]+)*\)( \+ past_seen_tokens)?)",
    "past_seen_tokens": _CACHED,
    "cache_length": _CACHED,
    "seq_len": r"seq_len = inputs_embeds\.shape\[1\]",
}
# the one mask of its own that the merged model can make: tokens of a run of placeholders see each other, as in Gemma 3
_MASK = "causal_mask_mapping"
_UNMADE = ast.unparse(ast.parse(f"not isinstance({_MASK} := attention_mask, dict)", mode="eval"))
_TYPED = "token_type_ids is not None"
_BLOCK_MASKS = [  # (under which conditions, what is written)
    (
        (_UNMADE,),
        "mask_kwargs = {'config': self.config.get_text_config(), 'inputs_embeds': inputs_embeds, "
        "'attention_mask': attention_mask, 'cache': cache, 'position_ids': position_ids}",
    ),
    (
        (_UNMADE, _TYPED),
        "block_sequence_ids = get_block_sequence_ids_for_mask(token_type_ids, device=inputs_embeds.device)",
    ),
    (
        (_UNMADE, _TYPED),
        f"{_MASK} = create_masks_for_vision_model(block_sequence_ids=block_sequence_ids, **mask_kwargs)",
    ),
    ((_UNMADE, f"not ({_TYPED})"), f"{_MASK} = create_masks_for_generate(**mask_kwargs)"),
]
# what is called there, and the module whose it must be: others of these names mask otherwise (gemma4)
_MAKERS = {
    "get_block_sequence_ids_for_mask": "transformers.models.gemma3.modeling_gemma3",
    "create_masks_for_vision_model": "transformers.models.gemma3.modeling_gemma3",
    "create_masks_for_generate": "transformers.masking_utils",
}
_EMBED = re.compile(r"self\.(\w+\.)*(get_input_embeddings\(\)|embed_tokens)\((llm_)?input_ids\)")
_ASK = re.compile(r"self\.get_(image|video|audio)_features")
# methods of transformers' own classes that put features at placeholders (the last for prompts of older processors)
_MERGERS = ("inputs_merger", "get_merged_audio_embeddings", "_merge_input_ids_with_audio_features")
# methods that give the values which they get: of whole embeddings, of features, of masks
MOVED = frozenset({"to", "clone", "contiguous"})
SHAPED = MOVED | {"reshape", "view", "flatten", "squeeze", "unsqueeze", "get"}
SPREAD = SHAPED | {"expand_as", "bool"}


def _conditions(node: ast.AST, tests: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(conditions, statement) of the assignments inside `node`; other blocks than `if` stand by their name."""
    match node:
        case ast.Assign():
            yield tests, ast.unparse(node)
        case ast.If(test, body, otherwise):
            said = ast.unparse(test)
            for branch, condition in ((body, said), (otherwise, f"not ({said})")):
                for statement in branch:
                    yield from _conditions(statement, (*tests, condition))
        case _:
            outer = isinstance(node, ast.Module | ast.FunctionDef)
            for part in ast.iter_child_nodes(node):
                yield from _conditions(part, tests if outer else (*tests, type(node).__name__))


def _variable(node: ast.AST) -> str:
    """The variable that an expression is a part, an item or a method of."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _named_today(statement: str) -> str:
    """The cache has had another name."""
    return statement.replace("'past_key_values': past_key_values", "'cache': cache")


@dataclass
class Forward:
    """What a multimodal class hands to its language model: `arguments` (name, expression), all `writes` before
    (variable, statement, value), and the `masks` and `features` that are scattered among the embeddings. `in_blocks`:
    the attention mask is Gemma 3's, in which the tokens of one medium see each other."""

    parameters: list[str] = field(default_factory=list)
    rest: str | None = None  # the name of its **kwargs
    mergers: set[str] = field(default_factory=set)
    arguments: list[tuple[str, str]] = field(default_factory=list)
    writes: list[tuple[str, str, ast.expr]] = field(default_factory=list)
    masks: list[ast.expr] = field(default_factory=list)
    features: list[ast.expr] = field(default_factory=list)
    calls: int = 0
    in_blocks: bool = False

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
        tree = ast.parse(source)
        for node in ast.walk(tree):
            made._read(node, f"self.{child}")
        for statement, value in [(text, ast.unparse(node)) for name, text, node in made.writes if name == made.rest]:
            item = re.match(r"\w+\['(\w+)'\] = ", statement)
            made.arguments.append((item[1] if item else f"**{value}", value))
        if made._makes_block_masks(tree, getattr(function, "__globals__", {})):
            made.in_blocks = True
            handed = ("attention_mask", _MASK)
            made.arguments = [
                (name, name) if (name, value) == handed else (name, value) for name, value in made.arguments
            ]
        return made

    def _makes_block_masks(self, tree: ast.Module, names: dict[str, Any]) -> bool:
        """Whether the mask that it hands on is made by the known statements, under the known conditions, by the known
        functions, and nothing else is written to the variables behind it."""
        if any(getattr(names.get(maker), "__module__", None) != home for maker, home in _MAKERS.items()):
            return False
        behind = {_MASK, "mask_kwargs", "block_sequence_ids", "token_type_ids"}
        written = [_named_today(statement) for name, statement, _ in self.writes if name in behind]
        known = [statement for _, statement in _BLOCK_MASKS]
        found = [(tests, _named_today(statement)) for tests, statement in _conditions(tree)]
        in_order = [each for each in found if each[1] in written]
        return sorted(written) == sorted([*known, f"{_MASK} = attention_mask"]) and in_order == _BLOCK_MASKS

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
                kept = statement.startswith("inputs_embeds = ") and not self.changed([value], self._embeds, MOVED)
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

    def emptied(self) -> list[ast.expr]:
        """The masks of the ids that are replaced before they are embedded."""
        found = [re.fullmatch(r"llm_input_ids\[(\w+)\] = 0", statement) for _, statement, _ in self.writes]
        return [ast.Name(match[1]) for match in found if match]

    def places(self, node: ast.expr) -> bool:
        match node:
            case ast.Call(func) | ast.Subscript(ast.Call(func), ast.Constant()):
                return ast.unparse(func) == "self.get_placeholder_mask"
        return all(re.fullmatch(_PLACES, part) for part in ast.unparse(node).split(" | "))

    def asks(self, node: ast.expr) -> bool:
        if not (isinstance(node, ast.Call) and _ASK.fullmatch(ast.unparse(node.func))):
            return False
        given = [*node.args, *(k.value for k in node.keywords if k.arg != "return_dict")]
        return not self.changed(given, self._given, SHAPED)

    def _given(self, node: ast.expr) -> bool:
        """An argument of the forward, or its first item, which is all there is in a packed batch; or a setting."""
        plain = re.fullmatch(r"([a-z_]\w*)(\[:1\])?|self\.config\.\w+", ast.unparse(node))
        return plain is not None and plain[1] not in {name for name, _, _ in self.writes} - {self.rest}


__all__ = ["MOVED", "SHAPED", "SPREAD", "Forward"]
