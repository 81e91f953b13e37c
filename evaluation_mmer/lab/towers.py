"""Tower folders: in go base, encoder and connector, out comes a whole checkpoint of a class that loads by itself.

All tensors are bf16. The base's 49152 embedding rows are there bit for bit; the rows of added tokens follow them,
taken from the connector. A connector is a dict of tensors: those of the expert's layout under the names of its class,
and `added_embeddings` (added tokens, hidden). `new_connector` draws an untrained one from a seed.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .cache import LabError
from .layouts import LAYOUTS, Layout, State

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'MEDIA_TYPE' %}{{ 'MEDIA_BLOCK\\n' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_template(layout: Layout) -> str:
    """The base's ChatML with the media block, then a newline, where a message has a content item of its type."""
    return CHAT_TEMPLATE.replace("MEDIA_TYPE", layout.media_type).replace("MEDIA_BLOCK", layout.media)


def base_with_rows(base: Path, added: torch.Tensor) -> tuple[PreTrainedConfig, State]:
    """Config and `LlamaForCausalLM` tensors of the base with `added` rows after its vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    rows = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = torch.cat([rows, added.to(rows.dtype)])
    config = copy.deepcopy(model.config)
    config.vocab_size = len(state["model.embed_tokens.weight"])
    return config, state


def expert_tokenizer(base: Path, layout: Layout) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.add_tokens(list(layout.added_tokens), special_tokens=True)
    return tokenizer


def new_connector(name: str, base: Path, encoder: Path, seed: int) -> State:
    """Untrained: small random projections, and added rows near the mean row of the base's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    layout, hidden = LAYOUTS[name], AutoConfig.from_pretrained(base).hidden_size
    rows = base_with_rows(base, torch.empty(0, hidden))[1]["model.embed_tokens.weight"].float()
    noise = torch.randn(len(layout.added_tokens), hidden, generator=generator)
    connector = {"added_embeddings": rows.mean(0) + 0.5 * rows.std(0) * noise}
    for key, shape in layout.shapes(layout.width(encoder), hidden).items():
        if len(shape) == 1:
            connector[key] = torch.zeros(shape)
        else:
            connector[key] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    return connector


def write_tower(name: str, base: Path, encoder: Path, connector: State, folder: Path) -> None:
    """The checkpoint and its processor in `folder`, for `name` in LAYOUTS."""
    layout = LAYOUTS[name]
    text_config, language = base_with_rows(base, connector["added_embeddings"])
    tokenizer = expert_tokenizer(base, layout)
    config: Any = layout.config(text_config, encoder, tokenizer)
    state = {f"model.{layout.encoder}.{key}": value for key, value in layout.features(encoder).items()}
    for key, value in connector.items():
        if key != "added_embeddings":
            state[f"model.{key}"] = value
    for key, value in language.items():
        state[f"model.language_model.{key.removeprefix('model.')}"] = value
    if layout.head:
        state["lm_head.weight"] = language["model.embed_tokens.weight"].clone()
    config.architectures = [layout.model.__name__]
    config.dtype = torch.bfloat16
    check_names(layout.model, config, state)
    config.save_pretrained(folder)
    half = {key: _half(state[key]).contiguous() for key in sorted(state)}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    GenerationConfig.from_pretrained(base).save_pretrained(folder)
    layout.processor(tokenizer, config, chat_template(layout)).save_pretrained(folder)


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def check_names(model: type[PreTrainedModel], config: PreTrainedConfig, state: State) -> None:
    """Raises unless `state` has exactly the tensors, in the shapes, that the class asks for."""
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in model(config).state_dict().items()}
    if "lm_head.weight" not in state:
        wanted.pop("lm_head.weight", None)  # tied
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != wanted:
        wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise LabError(
            f"{model.__name__}: {len(wrong)} tensors of the tower are not what the class asks for, e.g. {wrong[0]}: "
            f"have {found.get(wrong[0])}, expected {wanted.get(wrong[0])}. This transformers is not supported"
        )
