"""`kind: auto`: the LoRAs themselves where every expert is one and that is smaller, else masks."""

import json

import pytest

from configuration_mmer import MMERConfig
from merging_mmer import Recipe
from merging_mmer.decoupling import exact_bits, is_lora, mask_bits, settle
from merging_mmer.experts import Base, open_expert
from merging_mmer.recipe import Decoupling

from . import tiny_checkpoints as tiny
from .test_lora import train
from .tiny_merges import base_tokenizer, run, save_audio, save_llava, world

TOKENS = tiny.ROWS - 2


def loras(folder, rank=2):
    """Two experts that are the base plus a LoRA of q_proj and v_proj."""
    model = tiny.base_model()
    tiny.save(model, folder / "base")
    base_tokenizer().save_pretrained(folder / "base")
    experts = {}
    for kind, name, save in (("llava", "image", save_llava), ("qwen2_audio", "audio", save_audio)):
        tower = tiny.expert_model(kind, model, noise=0.0)
        save(tower, folder / name)
        train(tower, folder / f"{name}-lora", r=rank, target_modules=r".*layers.*(q_proj|v_proj)")
        experts[name] = {"lora": str(folder / f"{name}-lora"), "tower": str(folder / name)}
    return {"base": str(folder / "base"), "experts": experts}


def opened(recipe):
    base = Base(recipe["base"])
    entries = Recipe.from_dict(recipe).experts
    return base, [open_expert(name, entry, base) for name, entry in entries.items()]


def settled(recipe, **choice):
    base, experts = opened(recipe)
    return settle(Decoupling.model_validate(choice), experts, base, TOKENS)


def test_bits_by_hand(tmp_path):
    base, experts = opened(loras(tmp_path))
    # two layers; q_proj is 32 x 32, v_proj 16 x 32 (2 of 4 heads); rank 2, 16 bits a number
    assert exact_bits(experts, base) == 2 * 2 * 16 * ((32 + 32) + (16 + 32))
    by_hand = 2 * ((32 * 32 + 32 * 16 + 1 * 16 * 64) + (16 * 32 + 16 * 16 + 1 * 16 * 48))
    assert mask_bits(Decoupling(kind="mask", rank=1), experts, base) == by_hand


def test_small_loras_are_kept_exactly(tmp_path):
    recipe = loras(tmp_path)
    assert settled(recipe).kind == "exact"
    report = run(recipe, tmp_path / "out")
    config = MMERConfig.from_pretrained(tmp_path / "out")
    assert config.decoupling == {"kind": "exact", "scale": "none", "rank": 2}
    assert all(expert["total"]["residual"] < 1e-4 for expert in report.experts.values())
    written = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert written["decoupling"]["kind"] == "exact"
    assert Recipe.load(tmp_path / "out/merge_recipe.yaml").decoupling.kind == "exact"


def test_loras_that_cost_more_than_masks_are_masked(tmp_path):
    assert settled(loras(tmp_path, rank=16), kind="auto", rank=1).kind == "mask"


def test_an_expert_tuned_in_full_means_masks(tmp_path):
    recipe = loras(tmp_path)
    full = tiny.expert_model("llava", tiny.base_model(), seed=3)
    save_llava(full, tmp_path / "full")
    mixed = {**recipe, "experts": {**recipe["experts"], "image": {"model": str(tmp_path / "full")}}}
    assert settled(mixed).kind == "mask"
    # a LoRA on a checkpoint whose LLM was tuned as well is no LoRA on the base
    recipe["experts"]["image"]["tower"] = str(tmp_path / "full")
    base, experts = opened(recipe)
    assert [is_lora(expert, base, TOKENS) for expert in experts] == [False, True]
    assert settled(recipe) == Decoupling(kind="mask")


@pytest.mark.parametrize("choice", [{"rank": 4}, {"scale": "none"}, {"lambda": 0.5}, {"kind": "paper"}])
def test_what_the_recipe_says_holds(tmp_path, choice):
    decoupling = settled(loras(tmp_path), **choice)
    assert decoupling == Decoupling.model_validate(choice) and decoupling.kind == choice.get("kind", "mask")


def test_full_experts_are_masked_by_default(tmp_path):
    run(world(tmp_path), tmp_path / "out")
    config = MMERConfig.from_pretrained(tmp_path / "out")
    assert config.decoupling == {"kind": "mask", "scale": "row", "rank": 8}
