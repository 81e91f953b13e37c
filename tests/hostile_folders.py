"""Merged folders made hostile: one file of a sound one broken a time, and what the commands make of it.

Enters: a seed. Leaves: of each input and command its outcome: "refused" (an error in words, or for `verify` a failed
check), "same" or "other" (it was done); everything else is a fault, in words. Invariants: a command that refuses
leaves the folder as it was, no file beside it, no output; code of the folder never runs; none takes long.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from merging_mmer import add, remove
from merging_mmer.exporting import export_route
from merging_mmer.verification import FAILED, verify

from . import hostile_recipes as recipes
from . import hostile_settings as settings
from . import hostile_weights as weights
from . import tiny_several as several
from .hostile_inputs import TooLong, limited, tree
from .hostile_pickles import indices
from .hostile_weights import ANY, NO, OTHER, REFUSED, SAME, Change
from .tiny_merges import run as run_merge

LIMIT = 30.0  # seconds until something hangs; the sound folder takes about one
COMMANDS = ("verify", "add", "remove", "export")
JSON = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "merge_report.json")
INDEX, RECIPE = "model.safetensors.index.json", "merge_recipe.yaml"
# only `verify` looks at every value: an expert that is not asked for may be broken
UNREAD = ("NaN", "inf", "-inf")


@dataclass(frozen=True)
class Input:
    place: str
    name: str
    put: Callable[[Path, Path], object]
    right: frozenset[str]

    def __str__(self) -> str:
        return f"{self.place}: {self.name}"


class Folders:
    """A sound merged folder in several shards, and an expert that may join it."""

    def __init__(self, folder: Path):
        self.flag, self.expert, self.sound = folder / "code-was-run", folder / "more", folder / "mmer"
        base = several.save_base(folder / "base")
        for seed, (name, kind) in enumerate({"image": "llava", "audio": "qwen2_audio", "more": "llava"}.items()):
            several.save_expert(folder / name, kind, base, seed=seed + 1)
        named = {name: str(folder / name) for name in ("image", "audio")}
        recipe = {"base": str(folder / "base"), "experts": named, "decoupling": {"kind": "mask", "rank": 1}}
        run_merge(recipe, self.sound, max_shard_size="200KB")
        self.shard = sorted(path.name for path in self.sound.glob("*.safetensors"))[1]

    def inputs(self, seed: int) -> Iterator[Input]:
        def changed(place: str, change: Change, right: frozenset[str]) -> Input:
            def put(path: Path, original: Path):
                path.write_bytes(change.write(original.read_bytes(), Random(f"{seed} {place} {change.name}")))

            return Input(place, change.name, put, right)

        for change in (*weights.HEADERS, *weights.BYTES):
            yield changed(self.shard, change, change.right)
        for name, change, right in weights.TENSORS:
            # an encoder may be of any floating dtype, and of no use to a language model
            yield changed(self.shard, Change(name, weights.in_safetensors(change)), ANY if right != NO else right)
        for change in indices(self.expert / "model.safetensors"):
            yield changed(INDEX, change, ANY)
        for place in (*JSON, INDEX):
            for change in settings.SYNTAX:
                yield changed(place, change, ANY)
            for number in range(6):
                again = Change(f"a field, {number}", settings.FIELD.write)
                yield changed(place, again, ANY)
        good = (self.sound / RECIPE).read_bytes()
        for name, content, _ in recipes.recipes({"base": "a/b", "experts": {"eye": {"model": "c/d"}}}, self.flag):
            yield Input(RECIPE, name, lambda path, original, content=content: path.write_bytes(content), ANY)
        yield Input(RECIPE, "cut", lambda path, original: path.write_bytes(good[: len(good) // 2]), ANY)
        for place in ("config.json", "tokenizer_config.json", "processor_config.json"):
            for with_code in settings.with_code(self.flag, place):
                yield Input(place, with_code.name, with_code.put, ANY)
        for place in (self.shard, INDEX, *JSON, RECIPE):
            for there in settings.PLACES:
                yield Input(place, there.name, there.put, ANY)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(world: Folders, given: Input, command: str, work: Path) -> str:
    """The outcome of one command on one broken folder. `work`: an empty folder, which is taken away."""
    own = work / "mmer"
    shutil.copytree(world.sound, own)
    (own / given.place).unlink()
    given.put(own / given.place, world.sound / given.place)
    before, around = contents(own), tree(work)
    started = time.monotonic()
    try:
        with limited(LIMIT):
            outcome = _outcome(world, own, command)
    except (ValueError, OSError) as error:
        outcome = REFUSED if str(error).strip() else f"an empty {type(error).__name__}"
    except TooLong:
        outcome = f"stopped after {time.monotonic() - started:.0f} s"
    except BaseException as error:  # also what a library in another language throws
        outcome = f"{type(error).__name__}: {error}"
    if outcome == REFUSED and (contents(own) != before or tree(work) != around):
        outcome = f"refused, and changed: {sorted(tree(work) ^ around)}"
    if strays := {path.name for path in work.iterdir()} - {"mmer", "plain", "blobs"}:
        outcome = f"left behind: {sorted(strays)} ({outcome})"
    if world.flag.exists():
        world.flag.unlink()
        outcome = "CODE WAS RUN"
    shutil.rmtree(work)
    right = ANY if command != "verify" and given.name in UNREAD else given.right
    return outcome if outcome not in ANY or outcome in right else f"{outcome}, expected {sorted(right)}"


def _outcome(world: Folders, own: Path, command: str) -> str:
    if command == "verify":
        made = verify(own)
        assert all(check.found.strip() for check in made.checks if check.status == FAILED)
        return SAME if made.ok else REFUSED
    if command == "add":
        add(own, {"more": str(world.expert)}, progress=False)
    elif command == "remove":
        remove(own, "audio", progress=False)
    else:
        export_route(own, "image", own.parent / "plain", progress=False)
    return OTHER
