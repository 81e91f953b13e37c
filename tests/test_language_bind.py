"""LanguageBind's video encoder: values against the formulas, the original's names, and clips from file to features."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from configuration_mmer.composed_config_mmer import ComposedConfig
from modeling_mmer.composed_mmer import ComposedForConditionalGeneration
from modeling_mmer.language_bind_mmer import LanguageBindVideo
from modeling_mmer.towers_mmer import build_tower, tower_features
from processing_mmer import MMERProcessor
from processing_mmer.composed_processor_mmer import ComposedProcessor
from processing_mmer.expert_processors_mmer import ExpertProcessor
from processing_mmer.video_frames_mmer import LanguageBindVideoProcessor

from .tiny_models import text_config
from .tiny_processors import make_tokenizer, text, user, video

WIDTH, HEADS, FRAMES, SIZE, PATCH = 16, 2, 3, 16, 8
TOKENS = 1 + (SIZE // PATCH) ** 2
TINY = dict(hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=HEADS)
TINY |= dict(image_size=SIZE, patch_size=PATCH, initializer_range=0.3)


def encoder(seed=0, config=None, **settings) -> LanguageBindVideo:
    torch.manual_seed(seed)
    made = LanguageBindVideo({"config": {**TINY, **(config or {})}, "frames": FRAMES, **settings}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def pixels(clips=2, frames=FRAMES, seed=1) -> torch.Tensor:
    return torch.randn((clips, frames, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))


# the formulas, one frame, one head, one query at a time, in float64


def linear(x, state, name):
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def normed(x, state, name, eps=1e-5):
    spread = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / torch.sqrt(spread + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def attended(tokens, state, name):
    size = WIDTH // HEADS
    query, key, value = ([linear(x, state, f"{name}.{kind}_proj") for x in tokens] for kind in "qkv")
    out = []
    for asking in query:
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            weights = [math.exp(float(asking[part] @ other[part]) / math.sqrt(size)) for other in key]
            heads.append(sum(w / sum(weights) * other[part] for w, other in zip(weights, value)))
        out.append(linear(torch.cat(heads), state, f"{name}.out_proj"))
    return out


def embedded(frame, state):
    """(3, height, width) -> the class token and one token a patch, row after row."""
    tokens = [state["vision.embeddings.class_embedding"]]
    for row in range(SIZE // PATCH):
        for column in range(SIZE // PATCH):
            patch = frame[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            kernels = state["vision.embeddings.patch_embedding.weight"]
            tokens.append(torch.stack([(kernel * patch).sum() for kernel in kernels]))
    places = state["vision.embeddings.position_embedding.weight"]
    return [normed(token + place, state, "vision.pre_layrnorm") for token, place in zip(tokens, places)]


def layer_by_hand(clip, state, name):
    """clip[frame][token] -> the same, after one layer."""
    in_time = {}
    for place in range(TOKENS):
        column = [clip[t][place] + state[f"{name}.temporal_embedding"][0, t] for t in range(len(clip))]
        mixed = attended(
            [normed(x, state, f"{name}.temporal_layer_norm1") for x in column], state, f"{name}.temporal_attn"
        )
        for t, (x, more) in enumerate(zip(column, mixed)):
            in_time[t, place] = x + more
    out = []
    for t in range(len(clip)):
        frame = [in_time[t, place] for place in range(TOKENS)]
        mixed = attended([normed(x, state, f"{name}.layer_norm1") for x in frame], state, f"{name}.self_attn")
        frame = [x + more for x, more in zip(frame, mixed)]
        for place, x in enumerate(frame):
            inner = linear(normed(x, state, f"{name}.layer_norm2"), state, f"{name}.mlp.fc1")
            inner = torch.stack([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in inner])
            frame[place] = x + linear(inner, state, f"{name}.mlp.fc2")
        out.append(frame)
    return out


def by_hand(clip, state, layers):
    hidden = [embedded(frame, state) for frame in clip]
    for layer in range(layers):
        hidden = layer_by_hand(hidden, state, f"vision.encoder.layers.{layer}")
    return torch.stack([token for frame in hidden for token in frame])


@pytest.mark.parametrize(("layer", "layers"), [(-2, 1), (-1, 2), (2, 2), (0, 0)])
def test_features_are_those_of_the_formulas(layer, layers):
    own = encoder(layer=layer).double()
    clips = pixels().double()
    state = {name: value.detach() for name, value in own.state_dict().items()}
    with torch.no_grad():
        made = own(clips)
        assert made.shape == (2, FRAMES * TOKENS, WIDTH) == (2, own.tokens, own.width)
        assert torch.allclose(made, torch.stack([by_hand(clip, state, layers) for clip in clips]), atol=1e-10)


def test_without_class_tokens_the_patches_stay():
    clips = pixels()
    with torch.no_grad():
        whole, patches = encoder()(clips), encoder(class_token=False)(clips)
    kept = [place for place in range(FRAMES * TOKENS) if place % TOKENS]
    assert patches.shape[1] == encoder(class_token=False).tokens == FRAMES * (TOKENS - 1)
    assert torch.equal(patches, whole[:, kept])


def test_where_time_does_nothing_each_frame_is_clips():
    own = encoder(layer=-1)
    with torch.no_grad():
        for layer in own.vision.encoder["layers"]:
            layer.temporal_embedding.zero_()
            layer.temporal_attn.out_proj.weight.zero_()
            layer.temporal_attn.out_proj.bias.zero_()
    clip = CLIPVisionModel(CLIPVisionConfig(**TINY, hidden_act="gelu")).eval()
    state = {name.removeprefix("vision."): value for name, value in own.state_dict().items() if "temporal" not in name}
    names = {name.removeprefix("vision_model."): name for name in clip.state_dict()}
    clip.load_state_dict({names[name]: value for name, value in state.items()})
    clips = pixels()
    with torch.no_grad():
        frames = clip(clips.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(own(clips), frames.reshape(2, -1, WIDTH), atol=1e-5)


def test_the_order_of_the_frames_matters_and_the_neighbours_in_a_batch_do_not():
    own, clips = encoder().double(), pixels(3).double()
    with torch.no_grad():
        together = own(clips)
        for place, clip in enumerate(clips):
            assert torch.allclose(own(clip[None])[0], together[place], atol=1e-12)
        turned = own(clips.flip(1)).reshape(3, FRAMES, TOKENS, WIDTH).flip(1).flatten(1, 2)
    assert not torch.allclose(turned, together, atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_drawn_at_random(training):
    own, clips = encoder(config={"force_patch_dropout": 0.5}).train(training), pixels()
    with torch.no_grad():
        assert torch.equal(own(clips), own(clips))


# the original

ORIGINAL = """
embeddings.class_embedding embeddings.patch_embedding.weight embeddings.position_embedding.weight
pre_layrnorm.weight pre_layrnorm.bias post_layernorm.weight post_layernorm.bias
encoder.layers.0.temporal_embedding
encoder.layers.0.temporal_layer_norm1.weight encoder.layers.0.temporal_layer_norm1.bias
encoder.layers.0.temporal_attn.q_proj.weight encoder.layers.0.temporal_attn.q_proj.bias
encoder.layers.0.temporal_attn.k_proj.weight encoder.layers.0.temporal_attn.k_proj.bias
encoder.layers.0.temporal_attn.v_proj.weight encoder.layers.0.temporal_attn.v_proj.bias
encoder.layers.0.temporal_attn.out_proj.weight encoder.layers.0.temporal_attn.out_proj.bias
encoder.layers.0.self_attn.q_proj.weight encoder.layers.0.self_attn.q_proj.bias
encoder.layers.0.self_attn.k_proj.weight encoder.layers.0.self_attn.k_proj.bias
encoder.layers.0.self_attn.v_proj.weight encoder.layers.0.self_attn.v_proj.bias
encoder.layers.0.self_attn.out_proj.weight encoder.layers.0.self_attn.out_proj.bias
encoder.layers.0.layer_norm1.weight encoder.layers.0.layer_norm1.bias
encoder.layers.0.layer_norm2.weight encoder.layers.0.layer_norm2.bias
encoder.layers.0.mlp.fc1.weight encoder.layers.0.mlp.fc1.bias
encoder.layers.0.mlp.fc2.weight encoder.layers.0.mlp.fc2.bias
""".split()


def test_the_originals_names_load_under_another_prefix():
    own, source = (encoder(seed, {"num_hidden_layers": 1}, layer=-1) for seed in (0, 5))
    original = {f"vision_model.{name}": source.state_dict()[f"vision.{name}"] for name in ORIGINAL}
    renamed = {name.replace("vision_model.", "vision.", 1): value for name, value in original.items()}
    own.load_state_dict(renamed, strict=True)
    with torch.no_grad():
        assert torch.equal(own(pixels()), source(pixels()))


def test_the_defaults_are_the_originals_sizes():
    with torch.device("meta"):
        own = LanguageBindVideo({"kind": "language_bind_video"})
    assert (own.tokens, own.width, own.layers) == (2056, 1024, 23)
    shapes = {name: tuple(value.shape) for name, value in own.state_dict().items()}
    layers = 24 * len([name for name in ORIGINAL if ".layers." in name])
    assert len(shapes) == layers + len([name for name in ORIGINAL if ".layers." not in name])
    assert shapes["vision.embeddings.position_embedding.weight"] == (257, 1024)
    assert shapes["vision.encoder.layers.23.temporal_embedding"] == (1, 8, 1024)
    assert shapes["vision.encoder.layers.0.mlp.fc1.weight"] == (4096, 1024)
    assert own.vision.config.hidden_act == "gelu"
    assert encoder(config={"num_frames": 5}).frames == FRAMES
    assert LanguageBindVideo({"config": {**TINY, "num_frames": 5, "add_time_attn": True}}).frames == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 3}, r"unknown settings \['depth'\]"),
        ({"frames": 1}, "found 1 frames"),
        ({"config": {**TINY, "add_time_attn": False}}, "add_time_attn False.*kind clip_vision"),
        ({"config": TINY, "layer": -4}, "layer -4, but 2 layers have the hidden states -3 … 2"),
    ],
)
def test_settings_that_make_no_encoder_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LanguageBindVideo(settings)


@pytest.mark.parametrize("shape", [(1, 4, 3, 16, 16), (3, 3, 16, 16), (1, 3, 3, 16, 24), (1, 3, FRAMES + 1, 16, 16)])
def test_clips_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"found shape .*expected \(clips, 3, 3, 16, 16\)"):
        encoder()(torch.zeros(shape))


# its pixels


def pixels_by_hand(frame, size, mean, deviation):
    """(H, W, 3) uint8 -> (3, size, size): bilinear between pixel centres, then the middle."""
    height, width = frame.shape[:2]
    tall = size if height <= width else math.floor(height / width * size)
    wide = size if width <= height else math.floor(width / height * size)
    values = (frame / 255 - mean) / deviation
    top, left = (round(Fraction(side - size, 2)) for side in (tall, wide))
    out = np.zeros((3, size, size))
    for y in range(size):
        for x in range(size):
            down, right = (
                max((p + 0.5) * a / b - 0.5, 0) for p, a, b in ((y + top, height, tall), (x + left, width, wide))
            )
            rows = (int(down), min(int(down) + 1, height - 1), down - int(down))
            columns = (int(right), min(int(right) + 1, width - 1), right - int(right))
            upper, lower = (
                (1 - columns[2]) * values[r, columns[0]] + columns[2] * values[r, columns[1]] for r in rows[:2]
            )
            out[:, y, x] = (1 - rows[2]) * upper + rows[2] * lower
    return out


@pytest.mark.parametrize(("height", "width"), [(20, 30), (31, 9), (5, 7), (8, 13), (8, 15), (8, 8)])
def test_pixels_are_those_of_the_formulas(height, width):
    frames = np.random.default_rng(height).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    made = LanguageBindVideoProcessor(num_frames=2, size=8)(frames)["pixel_values_videos"]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = [pixels_by_hand(frame, 8, np.array(mean), np.array(deviation)) for frame in frames]
    assert made.shape == (1, 2, 3, 8, 8) and made.dtype == torch.float32
    assert np.abs(made[0].numpy() - np.stack(expected)).max() < 1e-5


def test_a_clip_of_any_length_gives_its_frames():
    frames, own = video(0, 20), LanguageBindVideoProcessor(num_frames=8, size=16)
    chosen = own(frames[[0, 2, 5, 8, 10, 13, 16, 19]])["pixel_values_videos"]
    for given in (frames, torch.tensor(frames), list(frames), [frames]):
        assert torch.equal(own(given)["pixel_values_videos"], chosen)
    steps = LanguageBindVideoProcessor.from_dict({**own.to_dict(), "include_last": False})
    assert torch.equal(
        steps(frames)["pixel_values_videos"], own(frames[[0, 2, 5, 7, 10, 12, 15, 17]])["pixel_values_videos"]
    )
    assert isinstance(own(frames, return_tensors="np")["pixel_values_videos"], np.ndarray)
    with pytest.raises(ValueError, match=r"found float64 of shape \(2, 9, 9, 3\), expected uint8"):
        own(np.zeros((2, 9, 9, 3)))
    with pytest.raises(ValueError, match="found num_frames 0"):
        LanguageBindVideoProcessor(num_frames=0)


# file to features


def write_mp4(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ c['text'] if c['type'] == 'text' else '<video>' }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def expert():
    """A whole expert of 8 frames: its model and its processor."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("<video>", template=TEMPLATE)
    words = text_config("llama", vocab_size=len(tokenizer))
    config = ComposedConfig(
        text_config=words,
        encoders={"video": {"kind": "language_bind_video", "config": TINY, "frames": 8}},
        connectors={"video": {"widths": [WIDTH, 20, words.hidden_size]}},
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
    )
    processor = ComposedProcessor(
        tokenizer,
        parts={"video": LanguageBindVideoProcessor(num_frames=8, size=SIZE)},
        features={"video": {"count": 8 * TOKENS}},
        video_token="<video>",
    )
    return ComposedForConditionalGeneration(config).eval(), processor


def test_an_expert_saved_and_loaded_gives_the_same(expert, tmp_path):
    model, processor = expert
    model.save_pretrained(tmp_path)
    loaded, told = ComposedForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = processor(
        text=["what? <video>", "<video> a dog"], videos=[video(0, 9), video(1, 4)], padding=True, return_tensors="pt"
    )
    assert inputs["pixel_values_videos"].shape == (2, 8, 3, SIZE, SIZE)
    clips = inputs["pixel_values_videos"]
    with torch.no_grad():
        features = model.model.get_video_features(clips)
        again = loaded.eval().model.get_video_features(clips)
        assert features.last_hidden_state.shape == (2, 8 * TOKENS, WIDTH)
        assert features.pooler_output.isfinite().all() and torch.equal(features.pooler_output, again.pooler_output)
        logits = model(**inputs).logits
        assert torch.equal(logits, loaded(**inputs).logits)
        other = model(**{**inputs, "pixel_values_videos": clips.flip(1)}).logits
    assert not torch.allclose(logits, other)
    with pytest.raises(ValueError, match=r"found shape \(2, 4, 3, 16, 16\), expected \(clips, 8, 3, 16, 16\)"):
        model(**{**inputs, "pixel_values_videos": clips[:, :4]})


def test_as_a_tower_it_gives_what_its_language_model_received(expert):
    model, processor = expert
    inputs = dict(processor(videos=[video(0, 9), video(1, 4)]))
    tower = build_tower(model.config).eval()
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    tower.load_state_dict({name: value for name, value in state.items() if name in tower.state_dict()}, strict=True)
    with torch.no_grad():
        wanted = model.model.get_video_features(**inputs).pooler_output.flatten(0, 1)
        assert torch.equal(tower_features(tower, "video", inputs), wanted)
        halved = tower_features(tower.to(torch.bfloat16), "video", inputs)
    assert halved.dtype == torch.bfloat16 and torch.allclose(halved.float(), wanted, atol=0.2)


def test_checkpointing_changes_no_gradient(expert):
    model, processor = expert
    clips = processor(videos=video(0, 8))["pixel_values_videos"]
    gradients = []
    for enabled in (False, True):
        model.activation_checkpointing_enable() if enabled else model.activation_checkpointing_disable()
        model.train().zero_grad()
        model.model.get_video_features(clips).pooler_output.square().sum().backward()
        layer = model.model.encoders["video"].vision.encoder["layers"][0]
        gradients.append([layer.temporal_embedding.grad.clone(), layer.mlp.fc1.weight.grad.clone()])
    model.activation_checkpointing_disable()
    model.eval().zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients)) and gradients[0][0].any()


def test_a_clip_from_a_file_fills_its_placeholders(expert, tmp_path):
    own = expert[1]
    path = tmp_path / "walk.mp4"
    frames = write_mp4(path, np.sort(video(0, 20), axis=0))
    assert len(frames) == 20
    token = {"token": "<video>", "id": own.tokenizer.convert_tokens_to_ids("<video>")}
    merged = MMERProcessor(own.tokenizer, [ExpertProcessor("film", own, {"video": token})], chat_template=TEMPLATE)
    merged.save_pretrained(tmp_path / "saved")
    loaded = MMERProcessor.from_pretrained(tmp_path / "saved")
    expected = own(videos=frames[[0, 2, 5, 8, 10, 13, 16, 19]])["pixel_values_videos"]
    for processor in (merged, loaded):
        for given in (path, str(path), frames, list(frames)):
            out = processor(text="what? <video>", videos=given)
            assert torch.equal(out["film.pixel_values_videos"], expected)
            assert (out["mm_token_type_ids"] == 2).sum() == 8 * TOKENS
        two = processor(text=["<video>", "a <video>"], videos=[path, frames[:3]])
        assert two["film.pixel_values_videos"].shape == (2, 8, 3, SIZE, SIZE)
        assert (two["mm_token_type_ids"] == 2).sum(-1).tolist() == [8 * TOKENS] * 2
        block = [user({"type": "video", "path": str(path)}, text("what?"))]
        chat = processor.apply_chat_template(block, tokenize=True, return_dict=True)
        assert torch.equal(chat["film.pixel_values_videos"], expected)
    for given in (path, str(path), [str(path)]):
        out = own(text="<video>", videos=given, return_tensors="pt")
        assert torch.equal(out["pixel_values_videos"], expected)
        assert (out["input_ids"] == token["id"]).sum() == 8 * TOKENS
