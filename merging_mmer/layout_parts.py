"""What the readers of other code's checkpoints share: what lies in a folder, and what a reader makes of it.

Enters: a folder. Leaves: `Seen`, its config, files and tensor names, by which a layout is told; the language model's
config, tokenizer and prompt format; `Reading`, which is all that opening an expert needs. Invariants: a folder's name
says nothing; a reading holds a config of a class that can be built here, and tensors under that class's names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from .checkpoints import ADAPTER_FILES, MODEL_FILES, Checkpoint
from .lora import CONFIG_FILE
from .pretrained import CONFIG, check_numbers, naming, read_json
from .pretrained import load_tokenizer as read_tokenizer
from .recipe import ExpertRecipe
from .renaming import RenamedCheckpoint, Rule, leave_out, rename

PROJECTOR_FILE, TRAINED_FILE = "mm_projector.bin", "non_lora_trainables.bin"
_WEIGHTS = (".safetensors", ".bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

# what a prompt says for a medium, where the checkpoint has no token of its own for it (ModelCompose's constants.py;
# it gives them the ids -200, -203, -204 and -205, which no vocabulary has)
PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>", "point_cloud": "<point>"}

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# buffers that old classes saved and every class computes
BUFFERS = (
    leave_out(r"(.+\.)?rotary_emb\.inv_freq", "rotary frequencies, which the class computes"),
    leave_out(r"(.+\.)?embeddings\.position_ids", "0, 1, 2, …, which the class computes"),
)


def language_model_rules(wrapper: str = "") -> tuple[Rule, ...]:
    """A LlamaForCausalLM's names -> those in a multimodal class. wrapper: a regular expression before them."""
    return (
        *BUFFERS,
        rename(rf"{wrapper}model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
        rename(rf"{wrapper}(lm_head\..+)", r"\1"),
    )


def projector_rules(prefix: str, *places: str) -> tuple[Rule, ...]:
    """A projector's linear layers, numbered or single, to the connectors `places`. prefix: as an expression."""
    return (
        rename(rf"{prefix}\.(\d+\.(?:weight|bias))", *(rf"{place}.\1" for place in places)),
        rename(rf"{prefix}\.(weight|bias)", *(rf"{place}.0.\1" for place in places)),
    )


def projector_widths(checkpoint: Checkpoint, prefix: str) -> list[int]:
    """[in, …, out] of linear layers with GELU between them, from their tensors. prefix: as an expression.

    Raises ValueError where something else lies there.
    """
    found = [key for key in checkpoint.keys() if re.match(rf"{prefix}\.", key)]
    weights = {}
    for key in found:
        place = re.fullmatch(rf"{prefix}(?:\.(\d+))?\.(weight|bias)", key)
        if place and place[2] == "weight":
            weights[int(place[1] or 0)] = checkpoint.shape(key)
        if not place or (place[2] == "weight" and len(checkpoint.shape(key)) != 2):
            raise ValueError(
                f"{checkpoint.named()}: the projector's tensor {key!r} is none of linear layers with GELU between "
                "them (linear, mlp2x_gelu, …), which are the only kind known here"
            )
    shapes = [weights[place] for place in sorted(weights)]
    if sorted(weights) != [2 * place for place in range(len(weights))] or not shapes:
        raise ValueError(f"{checkpoint.named()}: no whole projector; found {found}, expected layers 0, 2, …")
    return [shapes[0][1], *(shape[0] for shape in shapes)]


class Seen:
    """What lies in a folder, before it is known what it is."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        values = read_json(path)
        check_numbers(path, values)
        return values

    @property
    def model_type(self) -> str | None:
        found = self.config.get("model_type")
        if not isinstance(found, str | None):
            raise ValueError(f"{self.folder / CONFIG}: model_type is {found!r}, expected a name")
        return found

    @cached_property
    def weights(self) -> Checkpoint | None:
        """The whole model, else what an adapter or a first training stage saved; None where there are no weights."""
        for wanted in (MODEL_FILES, (TRAINED_FILE,), ADAPTER_FILES, (PROJECTOR_FILE,)):
            if any(name in self.files for name in wanted):
                return Checkpoint(self.folder, wanted)
        return None

    @cached_property
    def keys(self) -> list[str]:
        return [] if self.weights is None else self.weights.keys()

    def some(self, *prefixes: str) -> bool:
        """Whether a tensor's name begins so."""
        return any(key.startswith(prefixes) for key in self.keys)

    @property
    def weight_files(self) -> str:
        """Folder and weight files, for messages."""
        return f"{self.folder} ({', '.join(name for name in self.files if Path(name).suffix in _WEIGHTS)})"

    @property
    def is_adapter(self) -> bool:
        return CONFIG_FILE in self.files and not any(name in self.files for name in MODEL_FILES)


@dataclass
class Reading:
    """An expert as its layout reads it.

    weights: its tensors under the names of the class of `config`. lora: settings and tensors of low-rank factors
    beside them. inputs: files that were read beside the weights'. notes: what a user should know.
    """

    layout: str
    config: PreTrainedConfig
    weights: RenamedCheckpoint
    make_processor: Callable[[], ProcessorMixin]
    lora: tuple[dict[str, Any], Checkpoint] | None = None
    inputs: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Order:
    """What a reader is given beside the folder. where: the recipe's entry, for messages. base: the base's folder,
    whose tokenizer a checkpoint without one was trained with."""

    where: str
    recipe: ExpertRecipe
    base: Path | None = None
    trust_remote_code: bool = False

    def encoder(self, modality: str) -> str | None:
        given = self.recipe.encoder
        return given.get(modality) if isinstance(given, dict) else given  # type: ignore[call-overload]


@dataclass(frozen=True)
class Layout:
    """One way to lay a checkpoint out. shown: what it is told by, in words."""

    name: str
    shown: str
    matches: Callable[[Seen], bool]
    read: Callable[[Seen, Order], Reading]


def llama_config(seen: Seen) -> PreTrainedConfig:
    """The language model's own config, without what the multimodal code wrote into it.

    Raises ValueError for a checkpoint that is not built around Llama: its prompt format is not in its files.
    """
    named = [name for name in seen.config.get("architectures") or [] if "Llama" not in name]
    if named:
        raise ValueError(
            f"{seen.folder / CONFIG}: architectures {named}; of this layout only experts around Llama (Vicuna) are "
            "known, whose prompt format is vicuna_v1. Convert it with transformers' own script, and give what it made"
        )
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling", "torch_dtype"}
    known -= {"architectures", "model_type", "transformers_version", "_name_or_path"}
    values: Any = {key: value for key, value in seen.config.items() if key in known}
    if not {"hidden_size", "num_hidden_layers"} <= set(values):
        raise ValueError(f"{seen.folder}/config.json: lacks hidden_size or num_hidden_layers, found {sorted(values)}")
    with naming(seen.folder / CONFIG):
        return LlamaConfig(**values)


def load_tokenizer(
    seen: Seen, order: Order, text_config: PreTrainedConfig, added: list[str], required: list[str]
) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, or the base's where it has none, with the tokens `added` behind its vocabulary.

    Raises ValueError where a token of `required` is not in it: its row would be one that nobody trained.
    """
    if any(name in seen.files for name in TOKENIZER_FILES):
        # given the language model's config, transformers does not look for a class of the folder's model_type
        tokenizer = read_tokenizer(seen.folder, config=text_config)
    elif order.base is not None:
        tokenizer = read_tokenizer(order.base, order.trust_remote_code)
    else:
        raise ValueError(f"{seen.folder}: no tokenizer (none of {list(TOKENIZER_FILES)}); name the base it comes from")
    known = tokenizer.get_vocab()
    if lacking := [token for token in required if token not in known]:
        raise ValueError(f"{seen.folder}: config.json wants the tokens {lacking}, which its tokenizer does not have")
    new = [AddedToken(token, special=True, normalized=False) for token in added if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def vicuna_template(written: dict[str, str]) -> str:
    """The chat template of vicuna_v1, with each message's media on lines of their own before its text.

    written: modality -> what stands for a medium of it.
    """
    table = ", ".join(f"'{modality}': '{text}'" for modality, text in written.items())
    parts = [
        "{%- macro media(content) -%}{%- if content is not string -%}{%- for block in content -%}",
        "{%- if block['type'] != 'text' -%}{{ written[block['type']] + '\\n' }}{%- endif -%}",
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
        "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}",
        "{%- for block in content -%}{%- if block['type'] == 'text' -%}{{ block['text'] }}{%- endif -%}",
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
        f"{{%- set written = {{{table}}} -%}}",
        f'{{%- set opening = namespace(text="{SYSTEM_PROMPT}") -%}}',
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- set opening.text = words(messages[0]['content']) -%}{%- endif -%}",
        "{{- opening.text + ' ' -}}",
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}",
        "{{- 'USER: ' + media(message['content']) + words(message['content']) + ' ' -}}",
        "{%- elif message['role'] == 'assistant' -%}",
        "{{- 'ASSISTANT: ' + words(message['content']) + eos_token -}}",
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}",
    ]
    return "".join(parts)
