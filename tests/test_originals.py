"""The originals of an evaluation: by transformers and PEFT where they can, else as the merge read them."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMultimodalLM, AutoProcessor, LlavaForConditionalGeneration

from evaluation_mmer import originals as room
from evaluation_mmer.evaluating import evaluate
from evaluation_mmer.originals import Originals
from evaluation_mmer.subjects import MergedSubject
from evaluation_mmer.tasks import load_items, load_tasks
from merging_mmer.stored import open_folder, read_processor
from mmer import merge
from modeling_mmer import MMERForConditionalGeneration

from . import tiny_growing as growing
from . import tiny_layouts as layouts
from . import tiny_several as several
from . import tiny_tasks as tiny
from .layout_checks import small_point_berts
from .test_media import write_video
from .tiny_processors import video


def opened(out):
    merged = open_folder(out)
    found = Originals(merged.recipe, read_processor(merged))
    found.open(merged.recipe.experts)
    return found


def task_of(folder, rows, **fields):
    tiny.write_rows(folder / "rows.jsonl", rows)
    (task,) = load_tasks(tiny.write_tasks(folder / "tasks.yaml", {"name": "t", "data": "rows.jsonl", **fields}))
    return task


@torch.no_grad()
def same_as_merged(out, task, expert, modality_rows=2):
    """The original and the merged model's route of it give the same logits for the same items."""
    merged = open_folder(out)
    processor = read_processor(merged)
    model = MMERForConditionalGeneration.from_pretrained(out)
    items = load_items(task, modality_rows)
    ours = MergedSubject(model, processor, task, "auto")
    original = opened(out).load(expert, torch.float32, "cpu")
    here, there = ours.inputs(items), original.inputs(items)
    got, want = model(**here).logits[:, -1], original.model(**there).logits[:, -1]
    several.same_logits(got[:, :40], want[:, :40])
    return original


def test_a_lora_is_peft_s(tmp_path):
    recipe = growing.make_loras(tmp_path, {"one": 4, "two": 4})
    merge(recipe, tmp_path / "out", progress=False)
    tiny.write_media(tmp_path / "media", 2)
    rows = [{"image": f"media/a{n}.png", "question": "what is this ?", "answers": "red"} for n in range(2)]
    original = same_as_merged(tmp_path / "out", task_of(tmp_path, rows), "one")
    assert isinstance(original.model, PeftModel) and original.name == "one"
    own = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(tmp_path / "one"), tmp_path / "one-lora")
    asked = original.inputs(load_items(task_of(tmp_path, rows)))
    with torch.no_grad():
        assert torch.equal(original.model(**asked).logits, own.eval()(**asked).logits)


def test_what_peft_cannot_place_is_filled_in(tmp_path, monkeypatch):
    """The same expert with its factors folded in computes the same, up to rounding."""
    recipe = growing.make_loras(tmp_path, {"one": 4})
    merge(recipe, tmp_path / "out", progress=False)
    tiny.write_media(tmp_path / "media", 1)
    rows = [{"image": "media/a0.png", "question": "what is this ?", "answers": "red"}]
    items = load_items(task_of(tmp_path, rows))
    by_peft = opened(tmp_path / "out").load("one", torch.float32, "cpu")
    monkeypatch.setattr(room, "get_peft_model_state_dict", lambda model: {})
    filled = opened(tmp_path / "out").load("one", torch.float32, "cpu")
    assert isinstance(filled.model, LlavaForConditionalGeneration)
    with torch.no_grad():
        one, other = (s.model(**s.inputs(items)).logits for s in (by_peft, filled))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_other_code(tmp_path, monkeypatch):
    """Original LLaVA, whose placeholder has no row: read as the merge reads it, and never written."""
    small_point_berts(monkeypatch)
    base = layouts.base_on_disk(tmp_path / "base")
    layouts.write_llava(tmp_path / "expert", base, tmp_path / "clip")
    entry = {"model": str(tmp_path / "expert"), "encoder": str(tmp_path / "clip")}
    several.run(
        {"base": str(tmp_path / "base"), "experts": {"eye": entry}, "decoupling": several.WHOLE}, tmp_path / "out"
    )
    tiny.write_media(tmp_path / "media", 2)
    rows = [{"image": f"media/a{n}.png", "question": "what is this ?", "answers": "red"} for n in range(2)]
    original = same_as_merged(tmp_path / "out", task_of(tmp_path, rows), "eye")
    rows_of = len(original.model.get_input_embeddings().weight)
    assert original.model.generation_config.suppress_tokens == list(range(several.tiny.ROWS, rows_of))


def test_clips_are_read_alike(tmp_path):
    base = several.save_base(tmp_path / "base")
    several.save_expert(tmp_path / "film", "video_llava", base, seed=3, noise=0.1)
    recipe = {"base": str(tmp_path / "base"), "experts": {"film": str(tmp_path / "film")}, "decoupling": several.WHOLE}
    several.run(recipe, tmp_path / "out")
    for number in range(2):
        write_video(tmp_path / f"c{number}.mkv", video(number, frames=12))
    rows = [{"video": f"c{n}.mkv", "question": "what is this ?", "answers": "red"} for n in range(2)]
    same_as_merged(tmp_path / "out", task_of(tmp_path, rows), "film")


def test_point_clouds(tmp_path, monkeypatch):
    small_point_berts(monkeypatch)
    base = layouts.base_on_disk(tmp_path / "base")
    layouts.write_point_llm(tmp_path / "expert", base)
    recipe = {
        "base": str(tmp_path / "base"),
        "experts": {"eye": str(tmp_path / "expert")},
        "decoupling": several.WHOLE,
    }
    several.run(recipe, tmp_path / "out")
    for number in range(2):
        np.save(tmp_path / f"p{number}.npy", np.random.default_rng(number).random((40, 6)).astype(np.float32))
    rows = [{"point_cloud": f"p{n}.npy", "question": "what is this ?", "answers": "red"} for n in range(2)]
    task = task_of(tmp_path, rows, max_new_tokens=3)
    same_as_merged(tmp_path / "out", task, "eye")
    (result,) = evaluate(tmp_path / "out", tmp_path / "tasks.yaml", "originals", progress=False).results
    assert result.original.name == "eye" and result.task_type == "any-to-any"


def test_an_original_without_a_chat_template(tmp_path):
    recipe = growing.make_loras(tmp_path, {"one": 4})
    merge(recipe, tmp_path / "out", progress=False)
    found = opened(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "one")
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the original of 'one' has no chat template"):
        room.OriginalSubject("one", found.load("one", "auto", "cpu").model, processor, found.processor.experts["one"])
    with pytest.raises(ValueError, match=r"no expert 'two', only \['one'\]"):
        found.open(["two"])
