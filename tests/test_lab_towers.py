"""The lab's converters and towers in miniature, with the real classes; and, under `slow`, the real ones."""

import json
import struct

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2AudioEncoder,
    Qwen2AudioEncoderConfig,
)

from evaluation_mmer import demo
from evaluation_mmer.lab import datasets, experts, smollm2, towers, whisper
from evaluation_mmer.lab.cache import LabError
from evaluation_mmer.lab.layouts import LAYOUTS
from modeling_mmer.point_bert_mmer import PointBert
from processing_mmer.media_mmer import read_video
from processing_mmer.point_clouds_mmer import read_point_cloud

NAMES = tuple(LAYOUTS)
PICTURES = ("image", "digits")
TOKENS = {"image": 16, "digits": 16, "video": 8 * 4 + 1, "point_cloud": 9}


def ctranslate2(variables: dict[str, np.ndarray], spec: str = "WhisperSpec") -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = struct.pack("<I", 6) + text(spec) + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        kind = {np.dtype(dtype): code for code, dtype in whisper.DTYPES.items()}[array.dtype]
        out += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += struct.pack("<BI", kind, array.nbytes) + array.tobytes()
    return out + struct.pack("<I", 0)


def test_a_ctranslate2_file_is_read_back_and_a_truncated_one_refused(tmp_path):
    variables = {"encoder/a": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.array(3, dtype=np.int8)}
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate2(variables))
    read = whisper.read_ctranslate2(path)
    assert all((read[name] == value).all() and read[name].dtype == value.dtype for name, value in variables.items())
    path.write_bytes(ctranslate2(variables)[:60])
    with pytest.raises(RuntimeError, match="truncated"):
        whisper.read_ctranslate2(path)
    path.write_bytes(ctranslate2(variables, "TransformerSpec"))
    with pytest.raises(RuntimeError, match="TransformerSpec, expected a WhisperSpec"):
        whisper.read_ctranslate2(path)


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    """A base, and the two encoders, with the real classes and tiny widths; the tokenizer knows bytes only."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("miniatures")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = {**letters, "<|im_start|>": 256, "<|im_end|>": 257}
    bytes_only = Tokenizer(models.BPE(vocab=words, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    sizes = dict(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    config = LlamaConfig(**sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    Dinov2Model(
        Dinov2Config(hidden_size=8, num_hidden_layers=12, num_attention_heads=2, image_size=70)
    ).save_pretrained(root / "dino")
    settings = {"kind": "point_bert", "point_dims": 3, "groups": 8, "group_size": 4, "group_width": 8}
    settings.update(width=8, heads=2, depth=1)
    (root / "point_cloud").mkdir()
    (root / "point_cloud" / "encoder.json").write_text(json.dumps(settings))
    save_file(PointBert(settings).state_dict(), root / "point_cloud" / "encoder.safetensors")
    Qwen2AudioEncoder(
        Qwen2AudioEncoderConfig(
            d_model=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8
        )
    ).save_pretrained(root / "audio")
    return root


@pytest.fixture(scope="module", params=NAMES)
def tower(request, miniatures):
    name = request.param
    base, folder = miniatures / "base", miniatures / f"{name}-tower"
    encoder = miniatures / (name if name in ("audio", "point_cloud") else "dino")
    folder.mkdir(exist_ok=True)
    connector = towers.new_connector(name, base, encoder, seed=0)
    towers.write_tower(name, base, encoder, connector, folder)
    model, found = towers.LAYOUTS[name].model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return name, model.eval(), AutoProcessor.from_pretrained(folder), connector


def test_a_tower_is_a_stock_checkpoint_whose_text_is_the_bases(tower, miniatures):
    name, model, _, connector = tower
    base = AutoModelForCausalLM.from_pretrained(miniatures / "base", dtype=torch.float32)
    ids = torch.randint(0, 258, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :258], base(input_ids=ids).logits)
    rows = model.get_input_embeddings().weight
    assert (rows[:258] == base.get_input_embeddings().weight).all()
    assert (rows[258:] == connector["added_embeddings"].bfloat16()).all()
    assert (model.get_output_embeddings().weight == rows).all()


def test_a_towers_processor_gives_as_many_placeholders_as_there_are_features(tower):
    name, model, processor, _ = tower
    generator = np.random.default_rng(0)
    pictures = [Image.new("RGB", (28, 28), color) for color in ("red", "white")]
    media = {
        "image": pictures,
        "digits": pictures,
        "audio": [np.sin(np.arange(length) / 9).astype(np.float32) for length in (16000, 7000)],
        "video": list(generator.integers(0, 256, (2, 8, 56, 56, 3), dtype=np.uint8)),
        "point_cloud": [generator.normal(size=(count, 3)).astype(np.float32) for count in (700, 600)],
    }[name]
    items = [datasets.LabItem(one, "What?", "") for one in media]
    inputs = experts.processor_inputs(processor, items)
    counts = (inputs["input_ids"] == 258).sum(1).tolist()
    assert counts == ([25, 11] if name == "audio" else [TOKENS[name]] * 2)
    assert inputs["attention_mask"][:, -1].all()  # padded on the left
    alone = [experts.answer(model, processor, [item])[0] for item in items]
    assert experts.answer(model, processor, items) == alone


def test_the_image_features_are_hidden_state_10_of_the_whole_encoder(miniatures, tower):
    name, model, _, _ = tower
    if name not in PICTURES:
        pytest.skip("about the image tower")
    whole = Dinov2Model.from_pretrained(miniatures / "dino", dtype=torch.bfloat16).float()
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        states = whole(pixels, output_hidden_states=True).hidden_states[10][:, 1:]
        wanted = model.model.multi_modal_projector(states)
        found = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(found, wanted)
    assert model.config.vision_config.num_hidden_layers == 10


def test_the_template_is_the_bases_for_plain_text(tower):
    name, _, processor, _ = tower
    block, chat = towers.LAYOUTS[name].media, experts.conversation(towers.LAYOUTS[name].media_type, "Hm?")
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        f"<|im_start|>system\n{towers.SYSTEM}<|im_end|>\n<|im_start|>user\n{block}\nHm?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hm?"}]
    text = processor.apply_chat_template(plain, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHm?<|im_end|>\n"


# --- the real ones


@pytest.mark.slow
def test_the_real_base_speaks_and_its_template_is_ours():
    base = experts.build_base()
    assert base == smollm2.build()
    assert AutoConfig.from_pretrained(base).vocab_size == 49152
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).generate(
        **inputs, max_new_tokens=12, do_sample=False
    )
    assert "Paris" in tokenizer.decode(tokens[0])
    for name in NAMES:
        processor = AutoProcessor.from_pretrained(experts.build_expert(name).tower)
        ours = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert ours == tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def read_sample(entry):
    """A sample of the package as its expert's data set has it."""
    path, modality = entry["file"], entry["modality"]
    if modality == "image":
        return Image.open(path).convert("RGB")
    if modality == "audio":
        return soundfile.read(path)[0]
    return read_video(path)[0] if modality == "video" else read_point_cloud(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_real_experts_answer_what_ships_with_them(name):
    """Every sample of the package, by the original expert as anyone would load it."""
    model, processor = experts.load_expert(name, torch.float32)
    items = []
    for entry in demo.samples()[name]:
        items.append(datasets.LabItem(read_sample(entry), entry["question"], entry["answer"]))
    replies = [datasets.normalise(reply) for reply in experts.answer(model, processor, items)]
    right = sum(reply == item.answer for reply, item in zip(replies, items, strict=True))
    # chosen blindly, so that not every one is answered; of the pictures and words all are
    assert len(items) >= 6 and right >= (len(items) if name in ("image", "audio") else 0.6 * len(items)), replies


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_real_experts_are_as_good_as_their_facts_say(name):
    try:
        items = datasets.load_items(name, "test", 64, seed=0)
    except LabError as error:  # the data sets come with Debian's packages, the experts do not
        pytest.skip(str(error))
    model, processor = experts.load_expert(name, torch.float32)
    facts = json.loads((experts.STORED / name / "expert.json").read_text())["test"]
    replies = experts.answer(model, processor, items)
    right = sum(datasets.score(reply, item.answer) for reply, item in zip(replies, items))
    assert right / 64 > facts["accuracy"] - 0.12  # about 2.5 standard errors
