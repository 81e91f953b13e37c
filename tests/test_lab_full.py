"""The lab's fully fine-tuned experts: which linears learn, and how they come into a tower under the base's names."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "lab")]

import train  # noqa: E402
from lab import full  # noqa: E402


def layer() -> nn.ModuleDict:
    return nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2, bias=False)})})


def test_only_the_language_models_linears_learn_under_the_bases_names():
    inner = nn.ModuleDict(
        {
            "language_model": nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()])}),
            "vision_tower": nn.ModuleDict({"layers": nn.ModuleList([layer()])}),
        }
    )
    found = train.linears_of(nn.ModuleDict({"model": inner}))
    assert list(found) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert found["model.layers.1.self_attn.q_proj"] is inner["language_model"]["layers"][1]["self_attn"]["q_proj"]


class NoTokenizer:
    @classmethod
    def from_pretrained(cls, _: Path) -> "NoTokenizer":
        return cls()

    def save_pretrained(self, folder: str):
        (Path(folder) / "tokenizer_config.json").write_text("{}")


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")

    def write_tower(name: str, llm: Path, encoder: Path, connector: dict, folder: Path):
        folder.mkdir()
        save_file({**load_file(llm / "model.safetensors"), **connector}, folder / "model.safetensors")

    monkeypatch.setenv("MMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(full, "build_base", lambda: tmp_path / "base")
    monkeypatch.setattr(full, "build_encoder", lambda name: tmp_path)
    monkeypatch.setattr(full, "AutoTokenizer", NoTokenizer)
    monkeypatch.setattr(full, "write_tower", write_tower)
    return tmp_path / "base"


def run(folder: Path, linears: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(linears, folder / "linears.safetensors")
    save_file({"projector": torch.ones(2)}, folder / "connector.safetensors")
    for file in ("expert.json", "curve.json"):
        (folder / file).write_text(json.dumps({}))
    return folder


def test_a_run_becomes_a_tower_with_its_linears_and_all_else_of_the_base(base, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    full.build(run(tmp_path / "run", {name: torch.full((8, 8), 0.5, dtype=torch.bfloat16)}), "clothes")
    found, before = load_file(full.full_tower("clothes") / "model.safetensors"), load_file(base / "model.safetensors")
    assert torch.equal(found.pop("projector"), torch.ones(2))
    assert found.keys() == before.keys() and name in before
    for key, tensor in found.items():
        assert torch.equal(tensor, torch.full_like(tensor, 0.5) if key == name else before[key]), key


def test_a_run_of_another_base_is_refused(base, tmp_path):
    folder = run(tmp_path / "run", {"model.layers.9.mlp.up_proj.weight": torch.zeros(8, 8)})
    with pytest.raises(RuntimeError, match="that the base has not, such as model.layers.9"):
        full.build(folder, "clothes")
    with pytest.raises(RuntimeError, match="'clothes' is not in"):
        full.full_tower("clothes")
