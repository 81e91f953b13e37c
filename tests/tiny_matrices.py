"""A small model of chosen tensors on disk, and experts with chosen task vectors: what the exactness tests merge.

Enters: θ₀ and τᵢ by the base's names, fp32. Leaves: a folder that `merge` takes, and what it wrote, read without any
code of ours.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from merging_mmer import Recipe, merge

from .tiny_world import SPECIAL, TEMPLATE, tokenizer

ROWS = 96  # as many words as `tokenizer` has: no row is padding
_TOWER = dict(
    model_type="clip_vision_model", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    image_size=16, patch_size=8,
)  # fmt: skip
assert len(SPECIAL) < ROWS


@dataclass(frozen=True)
class Sizes:
    """hidden 1 and ffn 1 give matrices and norms of one element."""

    hidden: int = 12
    ffn: int = 20
    layers: int = 1

    def llama(self, rows: int = 0) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=ROWS + rows, hidden_size=self.hidden, intermediate_size=self.ffn, head_dim=4,
            num_hidden_layers=self.layers, num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip

    def llava(self) -> LlavaConfig:
        return LlavaConfig(
            text_config=self.llama(rows=1), vision_config=_TOWER, image_token_index=ROWS, image_seq_length=4,
            tie_word_embeddings=False,
        )  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The base's names, in the order of its class: without `model.` in front."""
        with torch.device("meta"):
            state = LlamaForCausalLM(self.llama()).state_dict()
        return {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in state.items()}


Tensors = dict[str, torch.Tensor]


class World:
    """A base and experts under `folder`. The configs, tokenizers and processors are written once, weights anew."""

    def __init__(self, folder: Path, sizes: Sizes = Sizes(), experts: int = 8):
        self.folder, self.sizes = folder, sizes
        self._describe(folder / "base", sizes.llama(), "LlamaForCausalLM")
        tokenizer().save_pretrained(folder / "base")
        sides = {"height": 16, "width": 16}
        for place in range(experts):
            at = folder / f"e{place}"
            self._describe(at, sizes.llava(), "LlavaForConditionalGeneration")
            LlavaProcessor(
                CLIPImageProcessor(size=sides, crop_size=sides), tokenizer("<image>"), patch_size=8,
                vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>",
                chat_template=TEMPLATE.replace("PLACEHOLDER", "<image>"),
            ).save_pretrained(at)  # fmt: skip
        with torch.device("meta"):
            whole = LlavaForConditionalGeneration(sizes.llava()).state_dict()
        tower = {
            name: tensor for name, tensor in whole.items() if "language_model" not in name and "lm_head" not in name
        }
        self._tower = {name: torch.full(tensor.shape, 0.5) for name, tensor in tower.items()}

    @staticmethod
    def _describe(folder: Path, config, name: str):
        folder.mkdir(parents=True)
        config.architectures = [name]
        config.save_pretrained(folder)

    def write(self, theta_0: Tensors, thetas: list[Tensors], dtype: torch.dtype = torch.float32):
        """θ₀ and θᵢ, rounded to `dtype`."""
        base = {name if name.startswith("lm_head") else f"model.{name}": t.to(dtype) for name, t in theta_0.items()}
        save_file(base, self.folder / "base" / "model.safetensors", metadata={"format": "pt"})
        for place, theta in enumerate(thetas):
            own = {name: tensor.to(dtype) for name, tensor in self._tower.items()}
            for name, tensor in theta.items():
                if len(tensor) == ROWS and tensor.ndim == 2:  # and the row of the placeholder
                    tensor = torch.cat([tensor, tensor[:1]])
                own[name if name.startswith("lm_head") else f"model.language_model.{name}"] = tensor.to(dtype)
            save_file(own, self.folder / f"e{place}" / "model.safetensors", metadata={"format": "pt"})

    def recipe(self, experts: list[int], **settings) -> dict:
        """`experts`: their numbers, in the order in which they are merged."""
        sources = {f"e{place}": {"model": str(self.folder / f"e{place}")} for place in experts}
        for name, more in settings.pop("of", {}).items():
            sources[name] |= more
        return {"base": str(self.folder / "base"), "experts": sources, **settings}


def run(recipe: dict, out: Path, **options) -> "Merged":
    merge(Recipe.from_dict(recipe), out, progress=False, **options)
    return Merged(out)


class Merged:
    """What a merge wrote, by the base's names."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.stored = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}

    @property
    def report(self) -> dict:
        return json.loads((self.folder / "merge_report.json").read_text())

    def part(self, name: str, part: str) -> torch.Tensor | None:
        """`part`: delta, masks, scales, correction_a, correction_b of a weight; expert_weight, merged_weight."""
        module = name.removesuffix(".weight")
        return self.stored.get(f"{module if module == 'lm_head' else f'model.language_model.{module}'}.{part}")

    def tau(self, name: str, theta_0: torch.Tensor) -> torch.Tensor | None:
        """τ* as it is stored, fp32: of a matrix; of a norm what it adds to θ₀. None where no expert changed it."""
        delta = self.part(name, "delta") if theta_0.ndim == 2 else self.part(name, "merged_weight")
        if delta is None:
            return None
        return delta.float() if theta_0.ndim == 2 else delta.float() - theta_0.float()

    def mask(self, name: str, expert: int, columns: int) -> torch.Tensor:
        """One expert's, bool (out, in): bit j of byte b is column 8b + j."""
        packed = self.part(name, "masks")[expert].tolist()
        return torch.tensor([[row[column // 8] >> column % 8 & 1 == 1 for column in range(columns)] for row in packed])
