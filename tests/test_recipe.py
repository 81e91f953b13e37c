"""Recipes: short and long forms, defaults, and errors that name the field."""

import pytest
import yaml

from merging_mmer.recipe import Recipe

FULL = """
base: lmsys/vicuna-7b-v1.5
experts:
  image: llava-hf/llava-1.5-7b-hf
  audio: {model: org/audio-expert, lambda: 0.8}
  medical: {model: org/llava-med, modality: image, weight: 2, density: 0.3}
  video: {lora: org/video-lora, tower: org/video-tower, modality: [image, video]}
  clips: {model: org/damc-video, encoder: {video: org/encoder}, lora_key: video, modality: video}
method: {name: ties, density: 0.5, scope: tensor, alpha: 1.0}
decoupling: {kind: mask, lambda: 1.2, scale: row, rank: 16}
text_route: auto
dtype: bfloat16
"""
SHORT = {"base": "org/base", "experts": {"image": "org/llava"}}


def load(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return Recipe.load(path)


def test_the_recipe_of_the_design(tmp_path):
    recipe = load(FULL, tmp_path)
    assert list(recipe.experts) == ["image", "audio", "medical", "video", "clips"]
    assert recipe.experts["clips"].encoder == {"video": "org/encoder"} and recipe.experts["clips"].lora_key == "video"
    assert recipe.experts["image"].model == "llava-hf/llava-1.5-7b-hf"
    assert recipe.experts["video"].modalities == ["image", "video"]
    assert (recipe.lam("audio"), recipe.lam("image")) == (0.8, 1.2)
    assert (recipe.density("medical"), recipe.density("image")) == (0.3, 0.5)


def test_defaults():
    recipe = Recipe.from_dict(SHORT)
    assert recipe.resolved() == {
        "base": "org/base",
        "experts": {
            "image": {"model": "org/llava", "tokenizer": "base", "lambda": 1.0, "weight": 1.0, "density": 1.0}
        },
        "method": {"name": "ties", "density": 1.0, "scope": "tensor", "alpha": 1.0},
        "decoupling": {"kind": "auto", "lambda": 1.0, "scale": "row", "rank": 8},
        "default_experts": {},
        "text_route": "auto",
        "dtype": None,
    }


def test_a_resolved_recipe_is_a_recipe(tmp_path):
    recipe = load(FULL, tmp_path)
    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert again.resolved() == recipe.resolved()


@pytest.mark.parametrize("kind", ["paper", "none", "exact"])
def test_kinds_that_fix_scale_and_rank(kind):
    recipe = Recipe.from_dict({**SHORT, "decoupling": {"kind": kind}})
    assert (recipe.decoupling.scale, recipe.decoupling.rank) == ("none", 0)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())).resolved() == recipe.resolved()
    for choice in ({"scale": "row"}, {"rank": 4}):
        with pytest.raises(ValueError, match=f"decoupling: kind '{kind}' leaves no choice"):
            Recipe.from_dict({**SHORT, "decoupling": {"kind": kind, **choice}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "base: "),
        ({"experts": {}}, "experts: "),
        ({"experts": {"image": 3}}, "experts.image: "),
        ({"experts": {"image": {"model": "a/b", "lamda": 1}}}, "experts.image.lamda: unknown field"),
        ({"experts": {"image": {"model": "a/b", "lambda": "x"}}}, r"experts.image.lambda: .*found 'x'"),
        ({"experts": {"image": {"model": "a/b", "lambda": -1}}}, r"experts.image.lambda: .*found -1"),
        ({"experts": {"image": {"model": "a/b", "weight": 0}}}, "experts.image.weight: "),
        ({"experts": {"image": {"model": "a/b", "density": 1.5}}}, "experts.image.density: "),
        ({"experts": {"image": {"model": "a/b", "modality": "smell"}}}, "experts.image.modality"),
        ({"experts": {"image": {"model": "a/b", "encoder": {"smell": "c/d"}}}}, "experts.image.encoder"),
        ({"experts": {"image": {"model": "a/b", "encoder": 3}}}, "experts.image.encoder"),
        ({"experts": {"image": {"model": "a/b", "lora_key": "text"}}}, r"experts.image.lora_key: .*found 'text'"),
        ({"experts": {"image": {"model": "a/b", "lora": "c/d"}}}, "experts.image: found both model and lora"),
        ({"experts": {"image": {"tower": "a/b"}}}, "experts.image: found neither model nor lora"),
        ({"experts": {"merged": "a/b"}}, "experts.merged: expected letters"),
        ({"experts": {"a.b": "a/b"}}, "experts.a.b: expected letters"),
        ({"method": {"name": "dare"}}, r"method.name: .*found 'dare'"),
        ({"method": {"density": 0}}, "method.density: "),
        ({"method": {"scope": "layer"}}, "method.scope: "),
        ({"method": {"name": "emr", "density": 0.5}}, r"method.name 'emr' does not trim.*\['image'\]"),
        ({"decoupling": {"kind": "masks"}}, "decoupling.kind: "),
        ({"decoupling": {"rank": -1}}, "decoupling.rank: "),
        ({"text_route": "audio"}, "text_route: found 'audio'"),
        ({"default_experts": {"image": "eyes"}}, r"default_experts.image: found 'eyes', expected one of \['image'\]"),
        ({"default_experts": {"smell": "image"}}, "default_experts.smell"),
        (
            {"experts": {"film": {"model": "a/b", "modality": "video"}}, "default_experts": {"image": "film"}},
            r"default_experts.image: expert 'film' is to bring \['video'\] alone",
        ),
        ({"dtype": "int8"}, "dtype: "),
        ({"bases": "x"}, "bases: unknown field"),
    ],
)
def test_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({**SHORT, **change})


def test_all_faults_are_listed_at_once():
    with pytest.raises(ValueError) as caught:
        Recipe.from_dict({"experts": {"image": {"model": "a/b", "weight": -1}}, "dtype": "x"})
    assert all(field in str(caught.value) for field in ("base", "experts.image.weight", "dtype"))


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load("base: [", tmp_path)
    with pytest.raises(ValueError, match="expected a mapping"):
        load("- a\n- b", tmp_path)
    with pytest.raises(ValueError, match="'image' is given twice"):
        load("base: a/b\nexperts:\n  image: a/b\n  image: c/d\n", tmp_path)
