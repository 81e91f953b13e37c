"""Bases such as Vicuna, whose repository holds tokenizer.model and no tokenizer.json."""

import json

import pytest
import sentencepiece
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from merging_mmer import Recipe, merge

from . import tiny_checkpoints as tiny
from . import tiny_world

LINES = [
    "hello world this is a test of words",
    "the quick brown fox jumps over the lazy dog",
    "what is in this picture ?",
]


@pytest.fixture
def world(tmp_path):
    recipe = tiny_world.make(tmp_path)
    base = tmp_path / "base"
    for file in base.glob("*token*"):
        file.unlink()
    (tmp_path / "lines.txt").write_text("\n".join(LINES * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(base / "tokenizer"), vocab_size=tiny.ROWS - 16,
        model_type="bpe", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (base / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    pictures = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    own = LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>", chat_template=tiny_world.TEMPLATE.replace("PLACEHOLDER", "<image>"),
    )  # fmt: skip
    own.save_pretrained(tmp_path / "image")
    config = json.loads((tmp_path / "image/config.json").read_text())
    config["image_token_index"] = config["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    (tmp_path / "image/config.json").write_text(json.dumps(config))
    return tmp_path, {**recipe, "experts": {"image": recipe["experts"]["image"]}}


def test_such_a_base_is_merged_and_its_text_stays_what_it_was(world):
    folder, recipe = world
    assert not (folder / "base/tokenizer.json").exists()
    merge(Recipe.from_dict(recipe), folder / "out", progress=False)
    base = AutoTokenizer.from_pretrained(folder / "base")
    processor = AutoProcessor.from_pretrained(folder / "out", trust_remote_code=True)
    for line in LINES:
        ids = base(line)["input_ids"]
        assert len(ids) > 5 and base.unk_token_id not in ids
        assert processor(text=line)["input_ids"].tolist() == [ids]
        assert processor.decode(ids, skip_special_tokens=True) == base.decode(ids, skip_special_tokens=True) == line
