"""Experts of other code's layouts, opened from tiny files and compared with the class of today that they are."""

import json

import torch

from merging_mmer import point_llm_layout
from merging_mmer.experts import Base, open_expert
from merging_mmer.recipe import ExpertRecipe

from . import tiny_checkpoints as tiny
from . import tiny_layouts as layouts

PUBLISHED = dict(point_llm_layout.POINT_BERTS[point_llm_layout.VERSION_1_2])


def small_point_berts(monkeypatch):
    """Groups and heads are in no checkpoint: the tiny ones' take the place of the published."""
    sizes = {key: layouts.POINTS[key] for key in PUBLISHED}
    monkeypatch.setitem(point_llm_layout.POINT_BERTS, "PointTransformer_tiny", sizes)
    monkeypatch.setitem(point_llm_layout.POINT_BERTS, point_llm_layout.VERSION_1_2, sizes)


def opened(tmp_path, folder="expert", **recipe):
    return open_expert("eye", ExpertRecipe(model=str(tmp_path / folder), **recipe), Base(str(tmp_path / "base")))


def check_all(expert, model, deltas=None):
    """Every tensor of the expert is the model's, and every tensor of the model is the expert's."""
    core = {**tiny.llm_of(model).state_dict(), "lm_head.weight": model.lm_head.weight.detach()}
    assert set(expert.llm) == set(core)
    for name, theta in core.items():
        wanted = theta + deltas[name] if name in (deltas or {}) else theta
        torch.testing.assert_close(expert.exact_tensor(name).float(), wanted, rtol=0, atol=1e-6 if deltas else 0)
    whole = model.base_model.state_dict()
    tower = {name for name in whole if not name.startswith("language_model.")}
    assert set(expert.tower) == tower
    for name in tower:
        assert torch.equal(expert.tower_tensor(name).float(), whole[name].float()), name


def check_config(found, wanted):
    """What the class computes is the same: it was built from the same settings."""
    own, theirs = found.to_dict(), wanted.to_dict()
    for name in ("encoders", "connectors", "soft_tokens", "vision_feature_layer", "vision_feature_select_strategy"):
        parts = [values.get(name) or {} for values in (own, theirs)]
        if name != "encoders":
            assert parts[0] == parts[1], name
            continue
        for modality, settings in parts[1].items():
            known = {**parts[0][modality], **parts[0][modality].get("config", {})}
            asked = {**settings, **settings.get("config", {})}
            assert {key: known.get(key) for key in asked if key != "config"} == {
                key: value for key, value in asked.items() if key != "config"
            }
    for key in ("image_token_id", "video_token_id", "audio_token_id", "point_cloud_token_id", "image_token_index"):
        assert own.get(key) == theirs.get(key), key
    if "vision_config" in theirs:
        assert {key: own["vision_config"][key] for key in layouts.CLIP} == layouts.CLIP


WRITERS = {
    "llava": lambda p, b: (layouts.write_llava(p / "expert", b, p / "clip"), "clip"),
    "llava with its tower": lambda p, b: (layouts.write_llava(p / "expert", b, p / "clip", tower_inside=True), "clip"),
    "llava v1": lambda p, b: (layouts.write_llava(p / "expert", b, p / "clip", projector="linear"), "clip"),
    "point llm": lambda p, b: (layouts.write_point_llm(p / "expert", b), None),
    "point llm v1.1": lambda p, b: (layouts.write_point_llm(p / "expert", b, hidden=()), None),
    "video llava": lambda p, b: (layouts.write_video_llava(p / "expert", b, p), {}),
    "video llava without towers": lambda p, b: (layouts.write_video_llava(p / "expert", b, p, False), {}),
}


def encoder_of(tmp_path, given):
    if given == {}:
        names = {"image": "LanguageBind_Image", "video": "LanguageBind_Video_merge"}
        return {modality: str(tmp_path / name) for modality, name in names.items()}
    return None if given is None else str(tmp_path / given)


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
