"""Hostile and broken inputs: a tiny world on disk, one file of it broken a time, and what a merge makes of it.

Enters: a seed and a number of inputs. Leaves: of each input its outcome: "refused" (ValueError or OSError whose
message names the broken file), "same" (what the sound world gives), "other" (the values that another reader finds in
the broken files); everything else is a fault, in words. Invariant: whatever the outcome, no file is left behind and
none is made, and nothing takes more than a second longer than the sound world.

Levels, by what is done with the input: "weights" opens base and expert and reads every tensor; "words" makes the
merged vocabulary and processor too; "merge" is the whole merge.
"""

import hashlib
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from merging_mmer.experts import Base, open_expert
from merging_mmer.merge import merge
from merging_mmer.pretrained import load_tokenizer
from merging_mmer.recipe import Recipe
from merging_mmer.verification import verify
from merging_mmer.vocabulary import merge_vocabulary

from . import hostile_checkpoints as checkpoints
from . import hostile_pickles as pickles
from . import hostile_recipes as recipes
from . import hostile_settings as settings
from . import hostile_weights as weights
from . import tiny_layouts as layouts
from . import tiny_several as several
from .hostile_weights import ANY, OTHER, REFUSED, SAME, Change

LONGER = 1.0
_FAULTS = (ValueError, OSError)


class TooLong(BaseException):
    """No Exception, so that nothing takes it for an error of the input."""


@dataclass(frozen=True)
class Input:
    """One input: `put` breaks the file `place` ("image/config.json"), given its path and the sound file."""

    kind: str
    place: str
    name: str
    put: Callable[[Path, Path], object]
    right: frozenset[str]
    level: str
    says: str = ""  # a message may name this instead of the file

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {self.name} ({self.level})"


class World:
    """Sound checkpoints under `folder`, and what a merge of each of them gives."""

    def __init__(self, folder: Path):
        self.folder, self.flag = folder, folder / "code-was-run"
        base = several.save_base(folder / "base", max_position_embeddings=1024)
        several.save_expert(folder / "image", "llava", base, 1)
        several.save_expert(folder / "audio", "qwen2_audio", base, 2)
        layouts.write_llava(folder / "original", base, folder / "clip")
        checkpoints.move_projector_out(folder / "original")
        checkpoints.write_lora(folder / "lora", base)
        checkpoints.write_shards(folder)
        self.plain: dict[tuple[str, str], tuple[float, Any]] = {}

    def recipe(self, part: str, **moved: Path) -> dict[str, Any]:
        """The recipe in which `part` takes part. moved: part -> where it is instead."""
        place = {name: str(moved.get(name, self.folder / name)) for name in sorted(os.listdir(self.folder))}
        expert: dict[str, Any] = {
            "lora": {"lora": place["lora"], "tower": place["image"]},
            "audio": {"model": place["audio"]},
            "original": {"model": place["original"], "encoder": place["clip"]},
            "clip": {"model": place["original"], "encoder": place["clip"]},
        }.get(part, {"model": place["image"]})
        values = {"base": place["shards" if part == "shards" else "base"], "experts": {"eye": expert}}
        return {**values, "decoupling": {"kind": "mask", "rank": 1}}

    def sound(self, part: str, level: str) -> tuple[float, Any]:
        """(seconds, result) of the sound world, at a level."""
        key = ("image" if part == "base" else part, level)
        if key not in self.plain:
            times, result = [], None
            for _ in range(3):
                started = time.process_time()
                result = _do(Recipe.from_dict(self.recipe(part)), self.folder.parent / "sound", level)
                times.append(time.process_time() - started)
                shutil.rmtree(self.folder.parent / "sound", ignore_errors=True)
            self.plain[key] = sorted(times)[1], result
        return self.plain[key]


# one input


def _do(recipe: Recipe | Path, out: Path, level: str) -> Any:
    """What a level gives: a digest of every tensor, or of every file of the merged folder."""
    if level in ("merge", "recipe") or not isinstance(recipe, Recipe):
        merge(recipe, out, progress=False)
        return _files(out)
    base = Base(recipe.base)
    found = {}
    for name, own in recipe.experts.items():
        expert = open_expert(name, own, base)
        for tensor in base.names:
            theta_0 = base.tensor(tensor)
            found[tensor] = _digest(theta_0), _digest(expert.exact_tensor(tensor))
            expert.task_vector(tensor, theta_0, len(theta_0))
        found |= {f"{name}/{tensor}": _digest(expert.tower_tensor(tensor)) for tensor in expert.tower}
        if level == "words":
            processor = expert.load_processor()
            merge_vocabulary(load_tokenizer(base.folder), {name: processor}, {name: expert.config})
    return found


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous()
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _files(folder: Path) -> dict[str, str]:
    """Digests of a merged folder, without what tells paths, hashes of the inputs and seconds."""
    passed = {"merge_report.json", "merge_recipe.yaml"}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in passed]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prepare(world: World, given: Input, work: Path) -> dict[str, Any]:
    """The recipe of a world in `work` with one broken file; all other files of its part are hard links."""
    if given.level == "recipe":
        given.put(work / given.place, world.folder)
        return {}
    part, _, file = given.place.partition("/")
    own = work / part
    shutil.copytree(world.folder / part, own, copy_function=os.link)
    (own / file).unlink()
    given.put(own / file, world.folder / given.place)
    return world.recipe(part, **{part: own})


def run(world: World, given: Input, work: Path) -> str:
    """The outcome of one input. `work`: an empty folder, which is taken away."""
    work.mkdir(exist_ok=True)
    values = prepare(world, given, work)
    recipe = Recipe.from_dict(values) if values else work / given.place
    part, _, file = given.place.rpartition("/")
    before, out = tree(work), work / "out"
    seconds, sound = world.sound(part or "image", "merge" if given.level == "recipe" else given.level)
    started = time.process_time()
    try:
        with limited(seconds + 20 * LONGER):
            found = _do(recipe, out, given.level)
        outcome = SAME if found == sound else ""
    except _FAULTS as error:
        named = file in str(error) or bool(given.says and given.says in str(error))
        outcome = REFUSED if named else f"the message does not name {file}: {type(error).__name__}: {error}"
        found = None
    except TooLong:
        outcome = "stopped: it took too long"
    except BaseException as error:  # also what a library in another language throws
        outcome = f"{type(error).__name__}: {error}"
    took = time.process_time() - started
    if took > seconds + LONGER:
        outcome = f"{took:.1f} s, {seconds:.1f} s in the sound world ({outcome})"
    if outcome == "":
        outcome = _other(recipe, out, given.level, found)
    if out.exists() and found is None:
        outcome = f"an output was left ({outcome})"
    outcome = cleared(world, work, out, before, outcome)
    if outcome in ANY and outcome not in given.right:
        return f"{outcome}, expected {sorted(given.right)}"
    return outcome


def cleared(world: World, work: Path, out: Path, before: set[str], outcome: str) -> str:
    """The outcome, or what is worse: strays in the working folder, or code that was run. The folder is gone then."""
    shutil.rmtree(out, ignore_errors=True)
    if strays := tree(work) ^ before:
        outcome = f"left behind or taken away: {sorted(strays)} ({outcome})"
    if world.flag.exists():
        world.flag.unlink()
        outcome = "CODE WAS RUN"
    shutil.rmtree(work)
    return outcome


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _other(recipe: Recipe | Path, out: Path, level: str, found: Any) -> str:
    """OTHER where the values are those in the broken files, as another reader has them."""
    if level in ("merge", "recipe") or not isinstance(recipe, Recipe):
        result = verify(out, originals=recipe)
        return (
            OTHER
            if result.ok
            else f"does not verify: {[check for check in result.checks if check.status == 'failed']}"
        )
    theirs = {_digest(tensor) for folder in _folders(recipe) for tensor in _read(folder)}
    ours = {digest for value in found.values() for digest in (value if isinstance(value, tuple) else [value])}
    adapted = next(iter(recipe.experts.values())).lora is not None
    strange = ours - theirs
    return OTHER if not strange or adapted else f"values that are not in the files: {len(strange)}"


def _folders(recipe: Recipe) -> list[Path]:
    own = next(iter(recipe.experts.values()))
    return [Path(str(place)) for place in (recipe.base, own.model, own.lora, own.tower, own.encoder) if place]


def _read(folder: Path) -> Iterator[torch.Tensor]:
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            yield from load_file(path).values()
        elif path.suffix == ".bin":
            yield from torch.load(path, weights_only=True).values()


# many inputs


def changed(kind: str, place: str, change: Change, seed: int, level: str) -> Input:
    def put(path: Path, original: Path):
        path.write_bytes(change.write(original.read_bytes(), Random(f"{seed} {place} {change.name}")))

    return Input(kind, place, change.name, put, change.right, level)


WEIGHTS = (
    "base/model.safetensors",
    "image/model.safetensors",
    "lora/adapter_model.safetensors",
    "shards/model-00002-of-00003.safetensors",
)
PICKLES = ("original/pytorch_model-00001-of-00002.bin", "original/mm_projector.bin", "clip/pytorch_model.bin")
CONFIGS = (
    "base/config.json",
    "image/config.json",
    "audio/config.json",
    "original/config.json",
    "clip/config.json",
    "lora/adapter_config.json",
)
WORDS = (
    "base/tokenizer.json",
    "base/tokenizer_config.json",
    "image/tokenizer.json",
    "image/tokenizer_config.json",
    "original/tokenizer.json",
    "image/processor_config.json",
    "audio/processor_config.json",
    "clip/preprocessor_config.json",
)
BESIDE = (
    "base/generation_config.json",
    "base/chat_template.jinja",
    "image/chat_template.jinja",
    "image/generation_config.json",
)


def inputs(world: World, seed: int, rounds: int = 1) -> Iterator[Input]:
    """All inputs. `rounds` multiplies those that are random, the others come once."""
    good = {**world.recipe("image"), "experts": {"eye": {"model": str(world.folder / "image")}}}
    for name, content, right in recipes.recipes(good, world.flag):
        says = name.partition("'")[2].rstrip("'")

        def put(path: Path, original: Path, content: bytes = content):
            path.write_bytes(content)

        yield Input("recipe", "recipe.yaml", name, put, right, "recipe", says)
    for place in WEIGHTS:
        for change in weights.HEADERS:
            yield changed("header", place, change, seed, "weights")
        for name, change, right in weights.TENSORS:
            yield changed("tensors", place, Change(name, weights.in_safetensors(change), right), seed, "weights")
        for change in weights.BYTES:
            for number in range(8 * rounds):
                yield changed(change.name, place, change, seed + number, "weights")
    for place in PICKLES:
        for change in pickles.pickles(world.flag):
            kind = "code in a pickle" if change.name.startswith("code") else "pickle"
            if place == PICKLES[-1] and kind == "pickle":  # CLIP's text model, which is not read, lies in it too
                change = replace(change, right=change.right | {SAME})
            for number in range(8 * rounds if "bit" in change.name or change.name == "truncated" else 1):
                yield changed(kind, place, change, seed + number, "weights")
    for place in ("shards/model.safetensors.index.json", "original/pytorch_model.bin.index.json"):
        for change in pickles.indices(world.folder / "image" / "model.safetensors"):
            yield changed("index", place, change, seed, "weights")
    for place in (*CONFIGS, "shards/model.safetensors.index.json", *WORDS, "base/generation_config.json"):
        for change in settings.SYNTAX:
            level = "weights" if place in CONFIGS or "index" in place else "merge" if "gener" in place else "words"
            yield changed("JSON", place, change, seed, level)
    for place in CONFIGS[:4]:
        for name in settings.CONFIG_FIELDS:
            for value in settings.HUGE:
                yield changed("config field", place, settings.field((name,), value, ANY), seed, "weights")
    for name, values in settings.ADAPTER_FIELDS.items():
        for value in values:
            yield changed("adapter field", CONFIGS[-1], settings.field((name,), value, ANY), seed, "weights")
    for place in (*CONFIGS, *WORDS):
        for number in range(16 * rounds):
            level = "weights" if place in CONFIGS else "words"
            yield changed("any field", place, settings.FIELD, seed + number, level)
    for place in ("base/config.json", "image/config.json", WORDS[1], WORDS[3], WORDS[5]):
        for change in settings.with_code(world.flag, place.rpartition("/")[2]):
            yield Input("code of a model", place, change.name, change.put, change.right, "words")
    for place in BESIDE[1:3]:
        for change in settings.TEMPLATES:
            yield changed("chat template", place, change, seed, "merge")
    for place in (WEIGHTS[0], WEIGHTS[2], WEIGHTS[3], PICKLES[0], *CONFIGS, *WORDS, *BESIDE):
        for change in settings.PLACES:
            level = "merge" if place in BESIDE or change.right == {SAME} else "words"
            yield Input("no file", place, change.name, change.put, change.right, level)


def chosen(world: World, seed: int, count: int, only: str = "") -> list[Input]:
    """`count` of the inputs, of every kind as many as of any other where there are so many.

    only: what their description holds.
    """
    rng, kinds = Random(seed), defaultdict(list)
    for one in inputs(world, seed, rounds=1 + count // 1000):
        if only in str(one):
            kinds[one.kind].append(one)
    for many in kinds.values():
        rng.shuffle(many)
    found: list[Input] = []
    while len(found) < count and any(kinds.values()):
        found += [many.pop() for many in kinds.values() if many]
    return found[:count]
