"""Merged models whose experts came in layouts of other code answer as the originals; mmer inspect and mmer verify."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from merging_mmer.inspection import inspect
from merging_mmer.verification import verify
from mmer import app

from . import tiny_checkpoints as tiny
from . import tiny_layouts as layouts
from . import tiny_several as several
from .layout_checks import WRITERS, encoder_of, opened, rewrite, small_point_berts
from .tiny_processors import clip, picture, sound, text, user


@pytest.fixture
def base(tmp_path, monkeypatch):
    small_point_berts(monkeypatch)
    return layouts.base_on_disk(tmp_path / "base")


# what the merged model answers


def point_cloud(seed=0):
    return np.random.default_rng(seed).random((40, 6)).astype(np.float32)


MEDIA = {
    "image": ("images", picture(0)["image"], "<image>"),
    "video": ("videos", clip(0)["video"], "<video>"),
    "audio": ("audio", sound(0), "<audio>"),
    "point_cloud": ("point_clouds", point_cloud(), "<point>"),
}


def check_answers(tmp_path, model, modality, written=None, **recipe):
    """The merged model gives the logits of `model`, the class of today with the numbers that were saved."""
    argument, medium, placeholder = MEDIA[modality]
    entry = {"model": str(tmp_path / "expert"), **recipe}
    merged, processor = several.merge_and_load(
        {"base": str(tmp_path / "base"), "experts": {"eye": entry}}, tmp_path / "mmer-merged"
    )
    ours = processor.apply_chat_template(
        [user({"type": modality, modality: medium}, text("what is this ?"))],
        tokenize=True, return_dict=True, add_generation_prompt=True,
    )  # fmt: skip
    own = opened(tmp_path, **recipe).load_processor()
    prompt = f"{layouts.SYSTEM} USER: {written or placeholder}\nwhat is this ? ASSISTANT:"
    theirs = own(text=[prompt], **{argument: [medium]}, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    # a placeholder has no row of its own, since features take its place
    model.resize_token_embeddings(tiny.ROWS + 3, mean_resizing=False)
    with torch.no_grad():
        got, want = merged(**ours).logits[0], model(**theirs).logits[0]
        plain = {name: value for name, value in ours.items() if name not in ("route_ids", "text_route")}
        base = merged(**plain, text_route="base").logits[0]
    several.same_logits(got[:, : tiny.ROWS], want[:, : tiny.ROWS])
    return got, base


ANSWERS = {"llava": "image", "point llm": "point_cloud", "video llava": "video", "video llava without towers": "image"}


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_merged_model_answers_as_the_original(kind, tmp_path, base):
    model, given = WRITERS[kind](tmp_path, base)
    written = "<point_patch>" if kind == "point llm" else None
    got, without = check_answers(tmp_path, model, ANSWERS[kind], written, encoder=encoder_of(tmp_path, given))
    assert (got - without)[:, : tiny.ROWS].abs().max() > 1e-2, "the expert's parameters are in use"


@torch.no_grad()
def with_lora(model, deltas):
    own = tiny.llm_of(model).state_dict()
    for name, delta in deltas.items():
        own[name].add_(delta)
    return model


@pytest.mark.parametrize("modal", ["audio", "point"])
def test_a_merged_naive_mc_expert_answers_as_the_original(modal, tmp_path, base):
    model, dense = layouts.write_model_compose(tmp_path / "expert", base, tmp_path / "model", modal, "same")
    encoder = str(tmp_path / "model" / layouts.ENCODER_FILES[modal])
    check_answers(tmp_path, with_lora(model, dense["default"]), layouts.OURS[modal], encoder=encoder)


def test_the_same_folder_given_twice_is_the_whole_damc_expert(tmp_path, base):
    """Vision tokens by one LoRA, text by the other, as ModelCompose computes it."""
    model, dense = layouts.write_model_compose(
        tmp_path / "expert", base, tmp_path / "model", "vision", "modal+language"
    )
    entry = {"model": str(tmp_path / "expert"), "encoder": str(tmp_path / "model" / layouts.ENCODER_FILES["vision"])}
    experts = {"eye": {**entry, "lora_key": "vision"}, "speech": {**entry, "lora_key": "default"}}
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "default_experts": {"image": "eye"}}
    merged, processor = several.merge_and_load({**recipe, "decoupling": {"kind": "exact"}}, tmp_path / "mmer-damc")
    ours = processor(text=["<image> what is this ?"], images=[picture(0)["image"]], text_route="speech")
    seen = ours["input_ids"][0] == tiny.ROWS
    assert int(seen.sum()) == 4 + 2 + 3

    def routed(name):
        by_kind = [dense[key][f"{name}.weight"] for key in ("default", "vision")]
        return lambda module, inputs, out: (
            out + torch.stack([by_kind[int(kind)] @ token for kind, token in zip(seen, inputs[0][0])])
        )

    for name in {key.removesuffix(".weight") for key in dense["vision"]}:
        model.get_decoder().get_submodule(name).register_forward_hook(routed(name))
    model.resize_token_embeddings(tiny.ROWS + 3, mean_resizing=False)
    with torch.no_grad():
        want = model(input_ids=ours["input_ids"], pixel_values=ours["eye.pixel_values"]).logits[0]
        got = merged(**ours).logits[0]
    several.same_logits(got[:, : tiny.ROWS], want[:, : tiny.ROWS])


# mmer inspect


def test_inspect_describes_it_by_its_layout(tmp_path, base):
    layouts.write_model_compose(tmp_path / "expert", base, tmp_path / "model", "vision", "same")
    encoder = str(tmp_path / "model" / layouts.ENCODER_FILES["vision"])
    found = inspect(tmp_path / "expert", base=str(tmp_path / "base"), encoder=encoder)
    assert found.ok, (found.problems, found.fit)
    assert found.architecture == "ModelCompose, as ComposedForConditionalGeneration"
    assert found.adapter == {"rank": 4, "alpha": 6, "tensors": 28} and found.words.placeholders["image"]["id"] == 96
    assert {"tower: encoders", "tower: connectors", "tower: soft_tokens"} <= {group.name for group in found.groups}
    assert found.fit.fits and found.fit.distance > 0 and any("prefix_tokens.default" in note for note in found.notes)
    rewrite(tmp_path / "expert", mm_vision_encoder="model/our-own-clip")
    alone = inspect(tmp_path / "expert", base=str(tmp_path / "base"))
    assert not alone.ok and "Set encoder: to its Hub id" in alone.problems[0] and not alone.fit.fits
    words = ["inspect", str(tmp_path / "expert"), "--base", str(tmp_path / "base")]
    assert CliRunner().invoke(app, words).exit_code == 1
    for given in (encoder, f"image={encoder}"):
        done = CliRunner().invoke(app, [*words, "--encoder", given])
        assert done.exit_code == 0 and "fits" in done.output, done.output
    done = CliRunner().invoke(app, [*words, "--encoder", f"smell={encoder}"])
    assert done.exit_code == 1 and "'smell'" in done.stderr and "MODALITY=SOURCE" in done.stderr


def test_verify_compares_with_the_original_files(tmp_path, base):
    layouts.write_llava(tmp_path / "expert", base, tmp_path / "clip")
    entry = {"model": str(tmp_path / "expert"), "encoder": str(tmp_path / "clip")}
    recipe = {"base": str(tmp_path / "base"), "experts": {"eye": entry}}
    several.run(recipe, tmp_path / "mmer-verified")
    found = verify(tmp_path / "mmer-verified", originals=True)
    assert found.ok and {check.status for check in found.checks if check.name in ("sources", "towers")} == {"passed"}
    with (tmp_path / "clip" / "preprocessor_config.json").open("a") as file:
        file.write(" ")
    changed = verify(tmp_path / "mmer-verified", originals=True)
    assert not changed.ok and "preprocessor_config.json" in changed["sources"].found
