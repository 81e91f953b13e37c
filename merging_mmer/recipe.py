"""The recipe: what to merge, and how.

Enters: YAML (a file, or its text as a mapping). Leaves: a `Recipe` with every default filled in. All defaults of
the project stand here and nowhere else. Invariant: a recipe that loads is consistent; one that does not names the
field, what was found and what is expected.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from configuration_mmer.route_names_mmer import AUTO, MODALITIES, ROUTE_NAMES

Modality = Literal["image", "video", "audio", "point_cloud"]

# a recipe of a hundred experts has some 10 KB, and nothing in it lies deeper than an expert's encoder
_MOST_BYTES, _MOST_DEPTH, _MOST_VALUES, _MOST_LETTERS = 1 << 17, 16, 50_000, 1000
_SHOWN = 80


def _source(value: str) -> str:
    if not value or not value.isprintable() or len(value) > _MOST_LETTERS:
        raise ValueError(f"found {_short(value)}, expected a Hub id (org/name or org/name@revision) or a folder")
    return value


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


Source = Annotated[str, AfterValidator(_source)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True, allow_inf_nan=False)


class ExpertRecipe(_Part):
    """One expert: `model` (a multimodal checkpoint, or a LoRA folder), or `lora` on the checkpoint `tower`.

    `tokenizer: own` accepts one that splits ordinary text otherwise than the base's: each keeps its own way.
    `encoder`: a Hub id, folder or file, or one a modality, where a checkpoint only names its encoders (see
    encoder_sources.py). `lora_key`: which factors are the expert's, where it has several (model_compose_layout.py).
    """

    model: Source | None = None
    lora: Source | None = None
    tower: Source | None = None
    encoder: Source | dict[Modality, Source] | None = None
    lora_key: Literal["default", "vision", "audio", "video", "point"] | None = None
    modality: Modality | list[Modality] | None = None
    tokenizer: Literal["base", "own"] = "base"
    lam: float | None = Field(default=None, alias="lambda", ge=0)
    weight: float = Field(default=1.0, gt=0)
    density: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_source(self):
        if (self.model is None) == (self.lora is None):
            raise ValueError(
                "found both model and lora" if self.model else "found neither model nor lora; expected one of them"
            )
        return self

    @property
    def modalities(self) -> list[str] | None:
        return [self.modality] if isinstance(self.modality, str) else list(self.modality) if self.modality else None


class Method(_Part):
    """How the task vectors become one."""

    name: Literal["ties", "task_arithmetic", "emr"] = "ties"
    density: float = Field(default=1.0, gt=0, le=1)
    scope: Literal["tensor", "model"] = "tensor"
    alpha: float = 1.0


class Decoupling(_Part):
    """How each expert is recovered from the merged vector. `auto`: see decoupling.py."""

    kind: Literal["auto", "mask", "paper", "exact", "none"] = "auto"
    lam: float = Field(default=1.0, alias="lambda", ge=0)
    scale: Literal["row", "tensor", "none"] = "row"
    rank: int = Field(default=8, ge=0, le=1 << 20)

    @model_validator(mode="before")
    @classmethod
    def _fixed_by_kind(cls, values: Any) -> Any:
        """Only `mask` has scales and corrections of one's choice; the other kinds fix both."""
        if not isinstance(values, dict):
            return values
        if "kind" not in values and values:
            return {"kind": "mask", **values}  # who sets scale, rank or lambda speaks of masks
        kind = values.get("kind")
        if kind not in ("paper", "exact", "none"):
            return values
        fixed = {"scale": "none"} if kind == "exact" else {"scale": "none", "rank": 0}
        against = [f"{key} {values[key]!r}" for key, value in fixed.items() if values.get(key, value) != value]
        if kind == "exact" and values.get("rank"):
            against.append(f"rank {values['rank']!r}, which is the LoRAs' own")
        if against:
            raise ValueError(f"kind {kind!r} leaves no choice of scale and rank, found {' and '.join(against)}")
        return {**values, "scale": "none", "rank": 0}


class Recipe(_Part):
    """What to merge. Sources are Hub ids (`org/name`, `org/name@revision`) or folders, relative to where one works."""

    base: Source
    experts: dict[str, ExpertRecipe] = Field(min_length=1)
    method: Method = Method()
    decoupling: Decoupling = Decoupling()
    default_experts: dict[str, str] = {}
    text_route: str = AUTO
    dtype: Literal["bfloat16", "float16", "float32"] | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _short_form(cls, experts: Any) -> Any:
        if not isinstance(experts, dict):
            return experts
        return {name: {"model": entry} if isinstance(entry, str) else entry for name, entry in experts.items()}

    @model_validator(mode="after")
    def _across_fields(self):
        for name in self.experts:
            plain = name.replace("-", "_").isidentifier() and len(name) <= _SHOWN
            if name in (AUTO, *ROUTE_NAMES) or not plain:
                raise ValueError(
                    f"experts.{name[:_SHOWN]}: expected letters, digits, '_' and '-', {_SHOWN} at most, and none of "
                    f"{[AUTO, *ROUTE_NAMES]}"
                )
        if self.text_route not in (AUTO, *ROUTE_NAMES, *self.experts):
            raise ValueError(f"text_route: found {self.text_route!r}, expected {[AUTO, *ROUTE_NAMES, *self.experts]}")
        for modality, name in self.default_experts.items():
            if modality not in MODALITIES:
                raise ValueError(f"default_experts.{modality}: expected one of {list(MODALITIES)}")
            if name not in self.experts:
                raise ValueError(f"default_experts.{modality}: found {name!r}, expected one of {list(self.experts)}")
            if modality not in (self.experts[name].modalities or [modality]):
                raise ValueError(
                    f"default_experts.{modality}: expert {name!r} is to bring {self.experts[name].modalities} alone"
                )
        trimmed = [name for name in self.experts if self.density(name) != 1]
        if self.method.name != "ties" and trimmed:
            raise ValueError(
                f"method.name {self.method.name!r} does not trim, but a density below 1 is set for {trimmed}"
            )
        return self

    def density(self, expert: str) -> float:
        own = self.experts[expert].density
        return self.method.density if own is None else own

    def lam(self, expert: str) -> float:
        own = self.experts[expert].lam
        return self.decoupling.lam if own is None else own

    @property
    def own_tokenizers(self) -> list[str]:
        """The experts that keep their own way to split ordinary text."""
        return [name for name, expert in self.experts.items() if expert.tokenizer == "own"]

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """The recipe in a YAML file."""
        return cls.from_dict(_read(Path(path)), str(path))

    @classmethod
    def from_dict(cls, values: Any, origin: str = "recipe") -> "Recipe":
        """The recipe in a mapping. Raises ValueError that lists every faulty field."""
        if not isinstance(values, dict):
            raise ValueError(f"{origin}: expected a mapping with base and experts, found {type(values).__name__}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{origin}:\n" + "\n".join(_faults(error))) from error

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, with every default and every coefficient written out."""
        values = self.model_dump(by_alias=True)
        for name, expert in values["experts"].items():
            expert["lambda"], expert["density"] = self.lam(name), self.density(name)
            values["experts"][name] = {key: value for key, value in expert.items() if value is not None}
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False)

    def with_experts(self, experts: dict[str, ExpertRecipe]) -> "Recipe":
        """The recipe with further experts behind its own. Raises ValueError for a name that it has already."""
        if taken := sorted(set(experts) & set(self.experts)):
            raise ValueError(f"experts: {taken} are there already, beside {list(self.experts)}: give other names")
        values = self.model_dump(by_alias=True)
        values["experts"] |= {name: expert.model_dump(by_alias=True) for name, expert in experts.items()}
        return Recipe.from_dict(values)

    def without_experts(self, names: Collection[str]) -> "Recipe":
        """The recipe without some of its experts, and without what it says of them as defaults.

        Raises ValueError for a name that it has not, and when none would be left.
        """
        if strangers := sorted(set(names) - set(self.experts)):
            raise ValueError(f"experts: there is no {strangers}, only {list(self.experts)}")
        if not set(self.experts) - set(names):
            raise ValueError(f"experts: {list(self.experts)} are all there are, and one must stay")
        values = self.model_dump(by_alias=True)
        values["experts"] = {name: expert for name, expert in values["experts"].items() if name not in names}
        values["default_experts"] = {m: name for m, name in self.default_experts.items() if name not in names}
        values["text_route"] = AUTO if self.text_route in names else self.text_route
        return Recipe.from_dict(values)


def expert_recipes(experts: Mapping[str, Any], origin: str = "experts") -> dict[str, ExpertRecipe]:
    """Experts as a recipe has them: name -> source, or its fields, or an `ExpertRecipe`."""
    return Recipe.from_dict({"base": "any", "experts": dict(experts)}, origin).experts


def load_experts(path: str | Path) -> dict[str, ExpertRecipe]:
    """The experts of a YAML file that has an `experts` mapping, as in a recipe, and nothing else."""
    values = _read(Path(path))
    if not isinstance(values, dict) or set(values) != {"experts"} or not isinstance(values["experts"], dict):
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(
            f"{path}: found {found}, expected a mapping `experts` alone: the folder's own recipe says all else"
        )
    return expert_recipes(values["experts"], str(path))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: there is no recipe of this name")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{path}: has {size:,} bytes, expected a recipe of at most {_MOST_BYTES:,}")
    try:
        loader = _UniqueKeys(path.read_bytes().decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(f"{path}: not readable as YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter of dates and numbers that are none
        raise ValueError(f"{path}: not readable as YAML: {error}") from error


def _check_size(root: yaml.Node):
    """Raises ValueError where the values of a document, with every alias written out, nest too deeply or are too many.

    A line of aliases of aliases stands for more values than a memory holds, one of itself for values without end.
    """
    sizes: dict[int, tuple[int, int]] = {}  # id of a node -> (values, depth), -1 while it is looked at
    todo: list[tuple[yaml.Node, bool]] = [(root, False)]
    while todo:
        node, done = todo.pop()
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [one for pair in inner for one in pair] if isinstance(node, yaml.MappingNode) else inner
        if done:
            values, depth = zip((1, 0), *(sizes[id(one)] for one in inner))
            sizes[id(node)] = sum(values), max(depth) + 1
            if sizes[id(node)][0] > _MOST_VALUES or sizes[id(node)][1] > _MOST_DEPTH:
                raise ValueError(
                    f"more than {_MOST_VALUES:,} values, or nested more than {_MOST_DEPTH} deep, with aliases written "
                    f"out, at {node.start_mark}"
                )
        elif id(node) not in sizes:
            sizes[id(node)] = -1, 0
            todo.append((node, True))
            todo += [(one, False) for one in inner]
        elif sizes[id(node)][0] < 0:
            raise ValueError(f"what is named at {node.start_mark} holds itself")


class _UniqueKeys(yaml.SafeLoader):
    """YAML where a key given twice is an error: the first would vanish without a word."""

    _depth = 0

    def compose_node(self, parent, index):
        if self._depth >= _MOST_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {_MOST_DEPTH} deep", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping, expected a word", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _faults(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        field = ".".join(str(part)[:_SHOWN] for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        found = "" if fault["type"] in ("missing", "value_error") else f" (found {_short(fault['input'])})"
        if fault["type"] == "extra_forbidden":
            message, found = "unknown field", ""
        lines.append(f"  {field}: {message}{found}" if field else f"  {message}")
    return lines[:_SHOWN] + [f"  and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)


__all__ = ["MODALITIES", "Decoupling", "ExpertRecipe", "Method", "Recipe", "expert_recipes", "load_experts"]
