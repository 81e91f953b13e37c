"""What transformers reads of a folder (config, tokenizer, processor), and JSON, with errors that name the file.

Enters: a folder that somebody else wrote, broken or hostile. Leaves: the object, or ValueError. Invariants: whatever a
library raises on such a file becomes a ValueError that names it; a file is read strictly (a key given twice, nesting
without end or a size that no settings have is refused); nothing is built or allocated because a number says so.
"""

import json
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

CONFIG, GENERATION = "config.json", "generation_config.json"
# by the names that transformers gives them; whichever is there
TOKENIZER_PARTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
_TEKKEN = "tekken.json"
_USUAL = ("tokenizer.json", "tokenizer_config.json", "processor_config.json")
PROCESSOR_PARTS = (
    "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json", "audio_tokenizer_config.json",
)  # fmt: skip

# the largest tokenizer.json of today has 35 MB
MOST_BYTES = 1 << 27
_SETTINGS = (".json", ".jinja", ".model", ".txt", ".yaml")
_SUFFIXES = (*_SETTINGS, ".safetensors", ".bin", ".py")
_MOST_DEPTH = 64
# models of today have up to 126 layers
_MOST_LAYERS = 10_000
_COUNTS = re.compile(r"layer|depth|block|stage", re.IGNORECASE)
_LARGEST = 1 << 31
_UNBOUNDED = re.compile(r"theta|length|token|seed", re.IGNORECASE)
_SHOWN = 400


@contextmanager
def naming(*paths: Path | str, own: bool = False) -> Iterator[None]:
    """Errors inside become ValueError that names `paths`, as long as they do not name one of them already.

    own: only code of ours is inside, whose ValueErrors say already what they are about.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust code, which is no Exception
        if not (isinstance(error, Exception) or panic):
            raise
        said = str(error)
        told = own or any(str(path) in said for path in paths)
        if told and isinstance(error, ValueError | OSError):
            raise
        if type(error) is not ValueError:
            said = f"{type(error).__name__}: {said[:_SHOWN]}{'…' * (len(said) > _SHOWN)}"
        raise ValueError(f"{' or '.join(map(str, paths))}: {said}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ValueError that names it for anything else, and for a key given twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
        return values

    try:
        values = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=once, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError(f"{path}: not readable as JSON: nested too deeply. Download it again") from error
    except ValueError as error:  # also of its encoding, and of numbers with thousands of digits
        raise ValueError(f"{path}: not readable as JSON ({error}). Download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, expected a JSON object. Download it again")
    if _depth(values) > _MOST_DEPTH:
        raise ValueError(f"{path}: nested more than {_MOST_DEPTH} deep, which no settings are. Download it again")
    return values


def _constant(word: str) -> float:
    if word == "NaN":
        raise ValueError("NaN is no value of JSON, nor of a setting")
    return float(word)


def _depth(values: Any) -> int:
    """How deeply it is nested, without recursion."""
    level, depth = [values], 0
    while level:
        depth += 1
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for many in inner for one in many if isinstance(one, dict | list)]
    return depth


def check_folder(folder: Path):
    """Raises ValueError for an entry that has a file's name and is none: a pipe, a device, a link that leads nowhere.

    Readers wait for ever at such a thing, fill the memory from it, or go on as if there were no such file. Links to
    files are fine wherever they lead: the Hub's cache is made of them.
    """
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise ValueError(f"{path}: a link that leads nowhere ({error.strerror}). Download it again") from error
        if not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and path.suffix not in _SUFFIXES)):
            raise ValueError(f"{path}: is no file, but a folder, pipe or device. Download it again")
        if path.suffix in _SETTINGS and path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes, expected settings of at most {MOST_BYTES:,}")


def check_files(folder: Path, *names: str):
    """Raises ValueError for one of the JSON files `names` that cannot be read."""
    for name in names:
        path = folder / name
        if name.endswith(".json") and path.is_file():
            read_json(path)


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a folder."""
    path = folder / CONFIG
    if path.is_file():
        check_numbers(path, read_json(path))
    with naming(path):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def check_generation(folder: Path):
    """Raises ValueError for a generation_config.json that no model could be loaded beside."""
    path = folder / GENERATION
    if path.exists() or path.is_symlink():
        with naming(path):
            read_json(path)
            GenerationConfig.from_pretrained(folder)


def check_numbers(path: Path, values: dict[str, Any]):
    """Raises ValueError for a number in a config that no model has, before anything is built by it."""
    inside: list[tuple[str, Any]] = list(values.items())
    while inside:
        key, value = inside.pop()
        if isinstance(value, dict):
            inside += value.items()
        elif isinstance(value, list):
            inside += [(key, one) for one in value]
        elif isinstance(value, int):
            most = _MOST_LAYERS if _COUNTS.search(key) else _LARGEST
            if abs(value) > most and not _UNBOUNDED.search(key):
                raise ValueError(f"{path}: {key} is {value:.3g}, expected at most {most:,}. Is it the model's own?")


def load_tokenizer(folder: Path, trust_remote_code: bool = False, **more: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder."""
    check_files(folder, *TOKENIZER_PARTS, CONFIG)
    with naming(_there(folder, TOKENIZER_PARTS)):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **more)


def load_processor(folder: Path, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor of a folder, with a tokenizer in it."""
    check_files(folder, *PROCESSOR_PARTS, *TOKENIZER_PARTS, CONFIG)
    if (folder / _TEKKEN).is_file() and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder / _TEKKEN}: a tokenizer of mistral-common, expected tokenizer.json. Give a checkpoint whose "
            "tokenizer has the form of transformers"
        )
    with naming(processor_files(folder)):
        made = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not isinstance(getattr(made, "tokenizer", None), PreTrainedTokenizerBase):
            raise ValueError(f"a {type(made).__name__} is no processor with a tokenizer, which an expert needs")
        return made


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where a tokenizer was read from."""
    return _there(Path(tokenizer.name_or_path), TOKENIZER_PARTS)


def processor_files(folder: Path) -> str:
    return _there(folder, (*PROCESSOR_PARTS, *TOKENIZER_PARTS))


def _there(folder: Path, names: tuple[str, ...]) -> str:
    """Folder and files, for messages: those that are there, and which of the usual ones are not."""
    there = [name for name in names if (folder / name).exists()]
    lacking = [name for name in _USUAL if name in names and name not in there]
    return f"{folder} ({', '.join(there) or 'nothing'}{f'; no {lacking}' if lacking else ''})"


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """A class that is built inside and registers more parameters raises ValueError, before it has built them all."""
    seen = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None):
        nonlocal seen
        seen += 1
        if seen > tensors:
            raise ValueError(
                f"{CONFIG} describes a model of more than {tensors:,} tensors, far more than its weight files hold"
            )

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def most_tensors(*names: Collection[str]) -> int:
    """How many tensors a class may have whose weights have these names: several may be saved as one."""
    return 1000 + 4 * sum(map(len, names))


__all__ = [
    "CONFIG",
    "at_most",
    "check_generation",
    "check_files",
    "check_folder",
    "check_numbers",
    "load_config",
    "load_processor",
    "load_tokenizer",
    "most_tensors",
    "naming",
    "processor_files",
    "read_json",
    "tokenizer_files",
]
