"""The experts, opened lazily, and the check that they belong to the base.

Enters: the opened base (`Base`, base.py) and the sources of a recipe. Leaves: `Expert`s (τᵢ tensor by tensor, tower
tensors unchanged). Invariant: an expert that is opened has the base's architecture and lies near the base; anything
else raises and says which field, or how far.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, ProcessorMixin

from configuration_mmer.composed_config_mmer import ComposedConfig

from .adapter_tokenizer import holds_processor, with_own_tokenizer
from .base import Base
from .checkpoints import MODEL_FILES, Checkpoint, fetch
from .fitness import check_fitness
from .layout_parts import TRAINED_FILE
from .layouts import Order, Reading, read_layout
from .llava_layout import refuse_lora_on_llava
from .lora import CONFIG_FILE, LoraAdapter, adapters_inside, fetch_adapter, is_adapter, read_adapter_config
from .naming import HEAD, NamedCheckpoint, class_on_meta, listing, split_names
from .pretrained import CONFIG, at_most, load_config, load_processor, most_tensors, naming, processor_files
from .recipe import ExpertRecipe
from .task_vectors import task_vector, vocabulary_task_vector
from .vocabulary import find_placeholders

# what must agree for a tensor of the expert to mean what the base's tensor of that name means
SAME_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rms_norm_eps", "layer_norm_eps",
    "rope_parameters", "attention_bias", "mlp_bias", "layer_types", "num_experts", "num_local_experts",
    "num_experts_per_tok", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
    "residual_multiplier", "embedding_multiplier", "attention_multiplier", "logits_scaling", "query_pre_attn_scalar",
    "use_qk_norm", "sliding_window", "no_rope_layers", "clip_qkv", "norm_eps", "norm_epsilon", "layer_norm_epsilon",
)  # fmt: skip

# ‖θᵢ-θ₀‖ / ‖θ₀‖ over the matrices. Fine-tunes lie far below (LoRA and full tuning: 0.004 to 0.2), unrelated models
# of the same shape near √2 = 1.41, and at 0.7 the cosine of two vectors of one length is 0.75
LARGEST_DISTANCE = 0.7

_SAMPLED, _SAMPLED_ROWS = 8, 256


@dataclass
class Distance:
    """‖θᵢ-θ₀‖/‖θ₀‖ and the cosine of θᵢ and θ₀, gathered over tensors in fp64."""

    tau: float = 0.0
    theta_0: float = 0.0
    product: float = 0.0

    def add(self, tau: torch.Tensor, theta_0: torch.Tensor):
        tau, theta_0 = tau.double(), theta_0.double()
        self.tau += float((tau * tau).sum())
        self.theta_0 += float((theta_0 * theta_0).sum())
        self.product += float((tau * theta_0).sum())

    def join(self, other: "Distance"):
        self.tau += other.tau
        self.theta_0 += other.theta_0
        self.product += other.product

    @property
    def relative(self) -> float:
        return (self.tau / self.theta_0) ** 0.5 if self.theta_0 else 0.0

    @property
    def cosine(self) -> float:
        length = (self.theta_0 + 2 * self.product + self.tau) ** 0.5 * self.theta_0**0.5
        return (self.theta_0 + self.product) / length if length else 1.0

    def check(self, expert: str, base: str):
        if self.relative > LARGEST_DISTANCE:
            raise ValueError(
                f"expert {expert!r} was not tuned from {base}: its language model is {self.relative:.2f} of the "
                f"base's norm away (cosine {self.cosine:.2f}). Fine-tunes lie below {LARGEST_DISTANCE}, unrelated "
                "models near 1.41. Give the LLM that this expert was tuned from as base"
            )


@dataclass
class Expert:
    """One expert: its tensors under the base's names, its tower under the names of its own `AutoModel`.

    reading: what its layout made of it, where it is no transformers checkpoint.
    """

    name: str
    config: PreTrainedConfig
    weights: NamedCheckpoint
    llm: dict[str, str]
    tower: dict[str, str]
    base: Base
    tower_folder: Path
    adapter: LoraAdapter | None = None
    adapter_folder: Path | None = None
    has_llm: bool = True
    reading: Reading | None = None
    processor_folder: Path = field(init=False)

    def __post_init__(self):
        own = self.adapter_folder
        self.processor_folder = own if own is not None and holds_processor(own) else self.tower_folder

    def stored(self, name: str) -> torch.Tensor:
        full = self.llm[name]
        tensor = self.weights.tensor(full) if self.has_llm else self.base.tensor(name)
        return tensor if self.adapter is None else self.adapter.replace(full, tensor)

    def task_vector(self, name: str, theta_0: torch.Tensor, tokens: int) -> torch.Tensor:
        """τ of one tensor, fp32: what the checkpoint changed, plus B·A. The base has `tokens` tokens."""
        tau = self.dense_part(name, theta_0, tokens)
        delta = self.adapter.delta(self.llm[name]) if self.adapter else None
        if delta is None:
            return tau
        if name in self.base.vocabulary_names:
            rows = min(tokens, len(tau))
            if len(delta) < rows:
                raise ValueError(
                    f"{listing(map(str, self.weight_files))}: the LoRA on {name} has {len(delta)} rows, expected at "
                    f"least the base's {rows} tokens"
                )
            tau[:tokens] += delta[:rows]
            return tau
        return tau + delta

    def dense_part(self, name: str, theta_0: torch.Tensor, tokens: int) -> torch.Tensor:
        """τ without the LoRA's B·A."""
        theta = self.stored(name)
        with naming(*self.weight_files):
            if name in self.base.vocabulary_names:
                return vocabulary_task_vector(theta, theta_0, tokens)
            return task_vector(theta, theta_0)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The LoRA's (s·B, A) of one tensor, or None."""
        if self.adapter is None or self.llm[name] not in self.adapter.ranks:
            return None
        return self.adapter.factors(self.llm[name])

    def exact_tensor(self, name: str) -> torch.Tensor:
        """θᵢ in the dtype it was saved in (fp32 where a LoRA changed it)."""
        stored = self.stored(name)
        delta = self.adapter.delta(self.llm[name]) if self.adapter else None
        return stored if delta is None else stored.float() + delta

    def tower_tensor(self, name: str) -> torch.Tensor:
        """A tensor of the tower, unchanged; where a LoRA reaches it, folded in fp32 and rounded to its dtype."""
        full = self.tower[name]
        tensor = self.weights.tensor(full)
        if self.adapter is None:
            return tensor
        replaced = self.adapter.replace(full, tensor)
        if replaced.shape != tensor.shape:
            raise ValueError(
                f"expert {self.name!r}: the adapter's {full!r} has shape {tuple(replaced.shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
        delta = self.adapter.delta(full)
        return replaced if delta is None else (replaced.float() + delta).to(tensor.dtype)

    def tower_dtype(self, name: str) -> torch.dtype:
        """The dtype of `tower_tensor(name)`."""
        full = self.tower[name]
        tensor = self.weights.tensor(full)
        if self.adapter is None or full in self.adapter.ranks:
            return tensor.dtype
        return self.adapter.replace(full, tensor).dtype

    @property
    def weight_files(self) -> list[Path]:
        """Every weight file that is read of it."""
        adapter = [] if self.adapter is None else self.adapter.checkpoint.files
        return list(dict.fromkeys([*self.weights.checkpoint.files, *adapter]))

    @property
    def notes(self) -> list[str]:
        """What a user should know of how it was read."""
        return [] if self.reading is None else [f"expert {self.name!r} {note}" for note in self.reading.notes]

    def load_processor(self, trust_remote_code: bool = False) -> ProcessorMixin:
        if self.reading is not None:
            processor = self.reading.make_processor()
        else:
            processor = load_processor(self.processor_folder, trust_remote_code)
            with naming(processor_files(self.processor_folder)):
                find_placeholders(self.name, processor, self.config)
        if self.adapter is None or self.adapter_folder in (None, self.processor_folder):
            return processor
        matrices = {self.llm[name] for name in (self.base.embedding, f"{HEAD}.weight") if name in self.llm}
        trained = bool(matrices & self.adapter.changed)
        return with_own_tokenizer(self.name, processor, self.adapter_folder, trained)

    def files(self) -> list[Path]:
        """Every file that was read of it, weights first."""
        read = [self.tower_folder / "config.json"] if self.reading is None else self.reading.inputs
        config = [] if self.adapter_folder is None else [self.adapter_folder / CONFIG_FILE]
        return list(dict.fromkeys([*self.weight_files, *read, *config]))


def open_expert(name: str, recipe: ExpertRecipe, base: Base, trust_remote_code: bool = False) -> Expert:
    """An expert that fits `base`. Raises ValueError that names the field, tensor or distance that does not fit."""
    tower_folder, adapter_folder = _folders(name, recipe)
    reading = read_layout(tower_folder, Order(f"experts.{name}", recipe, base.folder, trust_remote_code))
    if reading is None:
        config = load_config(tower_folder, trust_remote_code)
        checkpoint: Checkpoint = Checkpoint(tower_folder)
    else:
        config, checkpoint = reading.config, reading.weights
    try:
        # a reading's sizes come from tensors too
        read = [tower_folder / CONFIG, *([] if reading is None else checkpoint.files)]
        with naming(*read), at_most(most_tensors(checkpoint.keys(), base.weights.checkpoint.keys())):
            model = class_on_meta(config, multimodal=True, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"expert {name!r}: {error}. An expert is a multimodal checkpoint; a LoRA that was "
            "trained on a bare LLM needs the multimodal checkpoint it belongs to as tower:"
        ) from error
    with naming(tower_folder / CONFIG, base.folder / CONFIG):
        if not isinstance(config, ComposedConfig):
            check_fitness(name, model, config)
        _check_architecture(name, config.get_text_config(), base.config)
    weights = NamedCheckpoint(checkpoint, model)
    llm, tower = split_names(model)
    with naming(tower_folder / CONFIG, base.folder / CONFIG):
        _check_names(name, llm, base, model)
    if config.get_text_config().tie_word_embeddings:
        # some classes (Qwen2Audio) do not declare that they tie; their checkpoints may still lack the head
        weights.alias(llm.get(f"{HEAD}.weight"), llm[base.embedding])
    has_llm = not set(llm.values()) <= weights.missing
    lost = weights.missing if has_llm else weights.missing - set(llm.values())
    if lost:
        raise ValueError(
            f"expert {name!r} ({checkpoint.named()}): {len(lost)} tensors are missing: {listing(lost)}. Its "
            f"{CONFIG} asks for them"
        )
    expert = Expert(name, config, weights, llm, tower, base, tower_folder, has_llm=has_llm, reading=reading)
    if reading is not None and reading.lora is not None:
        with naming(tower_folder / CONFIG, own=True):
            expert.adapter = LoraAdapter(tower_folder, lambda path: _resolve(path, expert), *reading.lora)
    elif adapter_folder is not None:
        expert.adapter_folder = adapter_folder
        expert.adapter = LoraAdapter(adapter_folder, lambda path: _resolve(path, expert))
        expert.__post_init__()
    _check_adapter(expert)
    _check_head(expert)
    with naming(*dict.fromkeys([*expert.weight_files, *base.weights.checkpoint.files])):
        _check_distance(expert)
    return expert


def _check_adapter(expert: Expert):
    """Factors of another shape than their matrix would be spread over it, or fail in the middle of a merge."""
    if expert.adapter is None:
        return
    words = {expert.llm.get(name) for name in (expert.base.embedding, f"{HEAD}.weight")}
    for name, (out, wide) in expert.adapter.shapes.items():
        expected = tuple(expert.weights.meta[name].shape)
        if wide != expected[-1] or (out != expected[0] and name not in words) or len(expected) != 2:
            raise ValueError(
                f"{expert.adapter.checkpoint.named()}: the LoRA on {name!r} is for a matrix of shape {(out, wide)}, "
                f"expected {expected}. Is it for this model?"
            )


def _folders(name: str, recipe: ExpertRecipe) -> tuple[Path, Path | None]:
    """(folder of the multimodal checkpoint, folder of the adapter or None)."""
    folder = fetch(recipe.model or "") if recipe.lora is None else fetch_adapter(recipe.lora)
    whole = any((folder / file).is_file() for file in MODEL_FILES)
    if not is_adapter(folder) and (recipe.lora is not None or not (whole or (folder / "config.json").is_file())):
        if inside := adapters_inside(folder):
            raise ValueError(
                f"experts.{name}: {folder} holds several adapters, {inside}: name one, as "
                f"lora: {recipe.lora or recipe.model}/{inside[0]}"
            )
        if recipe.lora is not None:
            raise ValueError(f"experts.{name}.lora: {folder} holds no adapter_config.json, so it is no PEFT adapter")
    if recipe.lora is None and (whole or not is_adapter(folder)):
        if recipe.tower is not None:
            raise ValueError(f"experts.{name}.tower: {folder} is a whole checkpoint and brings its own tower")
        # an adapter beside the weights (Granite Speech) is part of the model, for transformers as well
        return folder, folder if is_adapter(folder) else None
    if (folder / TRAINED_FILE).is_file():  # original LLaVA: what was trained beside the LoRA, projector and all
        if recipe.tower is not None:
            raise ValueError(
                f"experts.{name}.tower: {folder} holds {TRAINED_FILE}, a projector that was trained beside its LoRA "
                "and would be lost behind another tower. Leave tower: out, or give the whole model"
            )
        refuse_lora_on_llava(f"experts.{name}", folder)
        return folder, folder
    own = str(folder) if whole and (folder / "config.json").is_file() else None
    source = recipe.tower or own or read_adapter_config(folder).get("base_model_name_or_path")
    if not source:
        raise ValueError(
            f"experts.{name}: {folder} does not say what it was trained on; give the checkpoint as tower:"
        )
    return fetch(source), folder


def _resolve(path: str, expert: Expert) -> str | None:
    """A name in the model that a LoRA was trained on (the class or the bare LLM) -> the name in the class."""
    full, pattern = expert.weights.rename(path)
    if pattern is None and full in expert.weights.meta:
        return full
    relative = expert.base.relative_name(path)
    return expert.llm.get(relative) if relative else None


def _check_architecture(name: str, text: PreTrainedConfig, base: PreTrainedConfig):
    for key in SAME_FIELDS:
        found, expected = getattr(text, key, None), getattr(base, key, None)
        if found != expected:
            raise ValueError(
                f"expert {name!r} was not tuned from this base: its language model has {key} {_plain(found)}, "
                f"the base {_plain(expected)}"
            )


def _plain(value: Any) -> str:
    return repr(dict(value)) if isinstance(value, dict) else repr(value)


def _check_names(name: str, llm: dict[str, str], base: Base, model: Any):
    ours, theirs = set(base.names), set(llm) - ({f"{HEAD}.weight"} if base.tied else set())
    if ours != theirs:
        raise ValueError(
            f"expert {name!r}: its language model and the base name their tensors differently. Only the base: "
            f"{listing(ours - theirs) or 'none'}; only the expert: {listing(theirs - ours) or 'none'}"
        )
    state = model.state_dict()
    for tensor in base.names:
        found, expected = tuple(state[llm[tensor]].shape), base.shapes[tensor]
        if tensor not in base.vocabulary_names and found != expected:
            raise ValueError(f"expert {name!r}: {tensor} has shape {found}, the base's {expected}")


def _check_head(expert: Expert):
    """A base that uses its embedding as head gets a place for heads where an expert has one of its own.

    PEFT: a LoRA, or a module saved whole, on the embedding or the head changes that one alone, trained tokens and
    `ensure_weight_tying` change both.
    """
    head, adapter = f"{HEAD}.weight", expert.adapter
    if not expert.base.tied or head not in expert.llm:
        return
    pair = {expert.llm[head], expert.llm[expert.base.embedding]}
    if adapter is not None:
        tokens_alone = adapter.config.get("trainable_token_indices") and expert.llm[head] not in adapter.changed
        if adapter.config.get("ensure_weight_tying") or tokens_alone:
            return
    if expert.has_llm:
        own = not torch.equal(expert.exact_tensor(head), expert.exact_tensor(expert.base.embedding))
    else:
        own = adapter is not None and bool(pair & adapter.changed)
    if own:
        expert.base.untie()


def sampled_matrices(base: Base) -> list[str]:
    """Some matrices of the LLM, spread over its layers, for a first look."""
    matrices = [name for name in base.names if len(base.shapes[name]) > 1 and name not in base.vocabulary_names]
    return matrices[:: max(1, len(matrices) // _SAMPLED)][:_SAMPLED]


def _check_distance(expert: Expert):
    """A first look at some matrices, so that a wrong base is refused in seconds; the merge checks all of them."""
    distance = Distance()
    for name in sampled_matrices(expert.base):
        theta_0 = expert.base.tensor(name)
        if expert.adapter is None:
            theta, theta_0 = expert.stored(name)[:_SAMPLED_ROWS], theta_0[:_SAMPLED_ROWS]
            distance.add(task_vector(theta, theta_0), theta_0)
        else:
            distance.add(expert.task_vector(name, theta_0, len(theta_0)), theta_0)
    distance.check(expert.name, expert.base.source)
