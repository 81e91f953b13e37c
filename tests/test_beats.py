"""BEATs by value against its formulas written out, names and checkpoints, masks, and an audio expert end to end."""

import math

import numpy as np
import pytest
import torch

from configuration_mmer.composed_config_mmer import ComposedConfig
from modeling_mmer.beats_mmer import Beats, distance_buckets
from modeling_mmer.composed_mmer import ComposedForConditionalGeneration
from modeling_mmer.towers_mmer import build_tower, tower_features
from processing_mmer.composed_processor_mmer import ComposedProcessor
from processing_mmer.fbank_mmer import FbankFeatureExtractor
from tests.tiny_models import text_config
from tests.tiny_processors import make_tokenizer

TINY = dict(
    mel_bins=8, input_patch_size=4, embed_dim=6, encoder_layers=2, encoder_embed_dim=8, encoder_ffn_embed_dim=12,
    encoder_attention_heads=2, conv_pos=4, conv_pos_groups=2, num_buckets=8, max_distance=6,
)  # fmt: skip
LAYER = [
    *[f"self_attn.{p}_proj.{kind}" for p in ("k", "v", "q", "out") for kind in ("weight", "bias")],
    "self_attn.grep_a", "self_attn.grep_linear.weight", "self_attn.grep_linear.bias",
    "self_attn_layer_norm.weight", "self_attn_layer_norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias",
    "final_layer_norm.weight", "final_layer_norm.bias",
]  # fmt: skip
BIAS = "self_attn.relative_attention_bias.weight"
NAMES = [
    "post_extract_proj.weight", "post_extract_proj.bias", "patch_embedding.weight", "encoder.pos_conv.0.bias",
    "encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v", "encoder.layer_norm.weight",
    "encoder.layer_norm.bias", "layer_norm.weight", "layer_norm.bias",
    *[f"encoder.layers.0.{name}" for name in [*LAYER, BIAS]],
]  # fmt: skip


def randomise(model, size=0.5):
    """All parameters random, so that each one counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_beats(**changes):
    return randomise(Beats({"kind": "beats", **TINY, **changes}).double())


def slow_bucket(distance, buckets, max_distance):
    """T5's rule: one bucket for each short distance, then by logarithm; keys ahead in the upper half."""
    half = buckets // 2
    exact, base = half // 2, half if distance > 0 else 0
    far = abs(distance)
    if far < exact:
        return base + far
    return base + min(half - 1, exact + int(math.log(far / exact) / math.log(max_distance / exact) * (half - exact)))


def slow_beats(state, sound, own):
    """sound (frames, bins) -> (tokens, width) in numpy's float64, by loops over tokens, taps and heads."""
    state = {name: value.numpy() for name, value in state.items()}

    def norm(name, rows):
        spread = np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
        return (rows - rows.mean(-1, keepdims=True)) / spread * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name, rows):
        return rows @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    patch, width, heads = own["input_patch_size"], own["encoder_embed_dim"], own["encoder_attention_heads"]
    tokens = []
    for t in range(len(sound) // patch):
        for f in range(own["mel_bins"] // patch):
            piece = sound[t * patch : (t + 1) * patch, f * patch : (f + 1) * patch].numpy()
            tokens.append([(kernel[0] * piece).sum() for kernel in state["patch_embedding.weight"]])
    hidden = linear("post_extract_proj", norm("layer_norm", np.array(tokens)))
    count = len(hidden)

    taps, groups = own["conv_pos"], own["conv_pos_groups"]
    g, v = state["encoder.pos_conv.0.weight_g"], state["encoder.pos_conv.0.weight_v"]
    conv = np.zeros_like(hidden)
    for o in range(width):
        first = o // (width // groups) * (width // groups)
        for t in range(count):
            total = state["encoder.pos_conv.0.bias"][o]
            for k in range(taps):
                at = t + k - taps // 2
                if 0 <= at < count:
                    tap = g[0, 0, k] * v[o, :, k] / math.sqrt((v[:, :, k] ** 2).sum())
                    total += tap @ hidden[at, first : first + width // groups]
            conv[t, o] = total
    hidden = norm("encoder.layer_norm", hidden + gelu(conv))

    alpha = (2 * own["encoder_layers"]) ** 0.25 if own.get("deep_norm", True) else 1
    table, size = state[f"encoder.layers.0.{BIAS}"], width // heads
    for layer in range(own["encoder_layers"]):
        here = f"encoder.layers.{layer}."
        query, key, value = (linear(f"{here}self_attn.{p}_proj", hidden) for p in "qkv")
        mixed = np.zeros_like(hidden)
        for h in range(heads):
            mine = slice(h * size, (h + 1) * size)
            for i in range(count):
                gate = 1.0
                if own.get("gru_rel_pos", True):
                    eight = linear(f"{here}self_attn.grep_linear", query[i, mine])
                    a, b = (1 / (1 + math.exp(-eight[part].sum())) for part in (slice(0, 4), slice(4, 8)))
                    gate = a * (b * state[f"{here}self_attn.grep_a"][0, h, 0, 0] - 1) + 2
                scores = []
                for j in range(count):
                    bias = table[slow_bucket(j - i, own["num_buckets"], own["max_distance"]), h]
                    scores.append(query[i, mine] @ key[j, mine] / math.sqrt(size) + gate * bias)
                weights = np.exp(np.array(scores))
                mixed[i, mine] = weights @ value[:, mine] / weights.sum()
        hidden = norm(f"{here}self_attn_layer_norm", alpha * hidden + linear(f"{here}self_attn.out_proj", mixed))
        inner = linear(f"{here}fc2", gelu(linear(f"{here}fc1", hidden)))
        hidden = norm(f"{here}final_layer_norm", alpha * hidden + inner)
    return torch.from_numpy(hidden)


@pytest.mark.parametrize("changes", [{}, {"deep_norm": False, "conv_pos": 5}, {"gru_rel_pos": False}])
def test_it_is_beats(changes):
    model, own = tiny_beats(**changes), {**TINY, **changes}
    sounds = torch.randn(2, 18, 8, dtype=torch.float64)  # the last two frames fill no patch
    got = model(sounds)
    assert got.shape == (2, 8, 8)
    for one, sound in zip(got, sounds):
        assert torch.allclose(one, slow_beats(model.state_dict(), sound, own), atol=1e-10)


def test_buckets_of_the_published_model():
    buckets = distance_buckets(1000, 320, 800)
    # row: query, column: key; 80 + ⌊80 · log(d/80)/log 10⌋ by hand, and the last bucket of each half beyond 800
    by_hand = {0: 0, 1: 161, 79: 239, 80: 240, 100: 247, 400: 295, 799: 319, 999: 319}
    assert [int(buckets[0, d]) for d in by_hand] == list(by_hand.values())
    assert [int(buckets[d, 0]) for d in by_hand if d] == [b - 160 for d, b in by_hand.items() if d]
    wrong = [d for d in range(-999, 1000) if int(buckets[max(-d, 0), max(d, 0)]) != slow_bucket(d, 320, 800)]
    assert not wrong
    assert all(torch.equal(buckets.diagonal(d), buckets[max(-d, 0), max(d, 0)].expand(1000 - abs(d))) for d in (-3, 7))


def test_padding_and_neighbours_change_nothing():
    model = tiny_beats()
    short, long = torch.randn(11, 8, dtype=torch.float64), torch.randn(22, 8, dtype=torch.float64)
    batch, mask = torch.full((2, 22, 8), 5.0, dtype=torch.float64), torch.ones(2, 22, dtype=torch.long)
    batch[0, :11], batch[1], mask[0, 11:] = short, long, 0
    got = model(batch, mask)
    assert model.token_mask(mask).tolist() == [[True] * 4 + [False] * 6, [True] * 10]
    assert torch.allclose(got[:1, :4], model(short[None]), atol=1e-12)
    assert torch.allclose(got[1:], model(long[None]), atol=1e-12)
    assert not torch.allclose(model(batch)[:1, :4], got[:1, :4], atol=1e-3)


def test_nothing_is_random_and_half_precision_is_close():
    model, sound = Beats(TINY).train(), torch.randn(1, 16, 8)
    assert torch.equal(model(sound), model(sound))
    whole = model(sound).detach()
    half = model.bfloat16()(sound, torch.ones(1, 16)).detach()
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), whole, atol=0.1)
    without = Beats({**TINY, "relative_position_embedding": False})
    assert not [name for name in without.state_dict() if "relative_attention_bias" in name]
    assert without(sound, torch.ones(1, 16)).shape == (1, 8, 8)


def test_a_published_checkpoint_loads_under_its_own_names():
    with torch.device("meta"):
        full = Beats({"encoder_layers": 1})
    shapes = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    assert sorted(shapes) == sorted(NAMES)
    assert shapes["encoder.pos_conv.0.weight_g"] == (1, 1, 128)
    assert shapes["encoder.pos_conv.0.weight_v"] == (768, 48, 128)
    assert shapes["patch_embedding.weight"] == (512, 1, 16, 16)
    assert shapes["post_extract_proj.weight"] == (768, 512)
    assert shapes[f"encoder.layers.0.{BIAS}"] == (320, 12)
    assert shapes["encoder.layers.0.self_attn.grep_linear.weight"] == (8, 64)
    assert shapes["encoder.layers.0.self_attn.grep_a"] == (1, 12, 1, 1)

    # torch's own weight norm, over the taps, is what was saved
    model, sound = tiny_beats(encoder_layers=1), torch.randn(1, 16, 8, dtype=torch.float64)
    saved = {name: value.clone() for name, value in tiny_beats(encoder_layers=1).state_dict().items()}
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(8, 8, 4, padding=2, groups=2), dim=2).double()
    with torch.no_grad():
        inside = {n: saved[f"encoder.pos_conv.0.{n}"] for n in ("weight_g", "weight_v", "bias")}
        conv.load_state_dict(inside)
        hidden = torch.randn(1, 5, 8, dtype=torch.float64)
        wanted = torch.nn.functional.gelu(conv(hidden.mT)[..., :-1]).mT
    randomise(model, 0.1).load_state_dict(saved, strict=True)
    assert torch.allclose(model.encoder.pos_conv(hidden), wanted, atol=1e-12)
    assert torch.equal(model(sound), tiny_beats(encoder_layers=1)(sound))


def test_the_shared_bias_is_repeated_in_a_checkpoint():
    saved = tiny_beats().state_dict()
    assert f"encoder.layers.1.{BIAS}" not in saved
    repeated = {**saved, f"encoder.layers.1.{BIAS}": saved[f"encoder.layers.0.{BIAS}"].clone()}
    model, sound = randomise(tiny_beats(), 0.1), torch.randn(1, 16, 8, dtype=torch.float64)
    model.load_state_dict(repeated, strict=True)
    assert torch.equal(model(sound), tiny_beats()(sound)) and len(repeated) == len(saved) + 1
    repeated[f"encoder.layers.1.{BIAS}"] += 1
    with pytest.raises(RuntimeError, match="all layers of BEATs share one distance bias"):
        model.load_state_dict(repeated, strict=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 2}, r"unknown settings \['layers'\]"),
        ({"activation_fn": "relu"}, "activation_fn is 'relu', only 'gelu'"),
        ({"layer_norm_first": True}, "layer_norm_first is True, only False"),
        ({"encoder_attention_heads": 3}, "encoder_attention_heads 3 does not divide"),
        ({"conv_pos_groups": 3}, "conv_pos_groups 3 does not divide"),
        ({"mel_bins": 10}, "input_patch_size 4 does not divide mel_bins 10"),
        ({"max_distance": 2}, "found num_buckets 8 and max_distance 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Beats({**TINY, **settings})


def test_inputs_that_do_not_fit_are_refused():
    model = Beats(TINY)
    for shape in [(1, 8, 16), (16, 8), (1, 3, 8)]:
        with pytest.raises(ValueError, match=r"expected \(batch, frames, 8\) with at least 4 frames"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"feature_attention_mask: found shape \(1, 15\), expected \(1, 16\)"):
        model(torch.zeros(1, 16, 8), torch.ones(1, 15))
    mask = torch.ones(2, 16)
    mask[1, 3:] = 0
    with pytest.raises(ValueError, match=r"sounds \[1\] have no patch of 4 frames"):
        model(torch.zeros(2, 16, 8), mask)


# an audio expert


def audio_config(tokenizer, **connector):
    connector = connector or dict(
        kind="qformer", widths=[8, 32], queries=3, hidden_size=8, attention_heads=2, intermediate_size=12, positions=60
    )
    return ComposedConfig(
        text_config=text_config(vocab_size=len(tokenizer)),
        encoders={"audio": {"kind": "beats", **TINY, "mel_bins": 16, "encoder_layers": 1}},
        connectors={"audio": connector},
        soft_tokens={"audio": {"prefix": 1, "suffix": 1}},
        audio_token_id=tokenizer.convert_tokens_to_ids("<audio>"),
    )


def sound(seconds, seed):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(16_000 * seconds))).astype(np.float32)


def test_an_audio_expert_end_to_end(tmp_path):
    tokenizer = make_tokenizer("<audio>")
    processor = ComposedProcessor(
        tokenizer,
        parts={"audio": FbankFeatureExtractor(num_mel_bins=16, max_seconds=0.8, min_frames=4)},
        features={"audio": {"count": 5}},
        audio_token="<audio>",
    )
    model = randomise(ComposedForConditionalGeneration(audio_config(tokenizer)).eval(), 0.3)
    texts, sounds = ["<audio> a dog", "two cups <audio>"], [sound(0.3, 0), sound(0.6, 1)]
    together = processor(text=texts, audio=sounds, padding=True, return_tensors="pt")
    media = {name: together[name] for name in ("input_features", "feature_attention_mask")}
    with torch.no_grad():
        features = model.model.get_audio_features(**media).pooler_output
        logits = model(**together).logits
        assert features.shape == (2, 5, 32)
        for i in range(2):
            alone = processor(text=texts[i], audio=sounds[i], return_tensors="pt")
            own = {name: alone[name] for name in media}
            assert torch.allclose(model.model.get_audio_features(**own).pooler_output, features[i : i + 1], atol=1e-5)
            assert torch.allclose(model(**alone).logits[0, -1], logits[i, -1], atol=1e-4)
        quiet = model.model.get_audio_features(torch.zeros(1, 40, 16)).pooler_output
        assert not torch.allclose(quiet, features[:1], atol=1e-2)

        model.save_pretrained(tmp_path)
        again, report = ComposedForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(again.eval().model.get_audio_features(**media).pooler_output, features)

        tower = build_tower(model.config)
        tower.load_state_dict(
            {n: v for n, v in model.model.state_dict().items() if not n.startswith("language_model.")}, strict=True
        )
        assert torch.equal(tower_features(tower.eval(), "audio", media), features.flatten(0, 1))


def test_what_a_checkpoint_lacks_is_drawn_not_left_to_chance(tmp_path):
    tokenizer = make_tokenizer("<audio>")
    model = ComposedForConditionalGeneration(audio_config(tokenizer))
    kept = {name: value for name, value in model.state_dict().items() if ".audio." not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    again, report = ComposedForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert any("weight_v" in name for name in report["missing_keys"])
    tensors = dict(again.named_parameters())
    ears, joined = "model.encoders.audio.encoder.", "model.connectors.audio."
    assert all(value.isfinite().all() for value in tensors.values())
    assert (tensors[f"{ears}layers.0.self_attn.grep_a"] == 1).all()
    conv = {n: tensors[f"{ears}pos_conv.0.{n}"] for n in ("weight_g", "weight_v", "bias")}
    assert torch.allclose(conv["weight_g"], conv["weight_v"].norm(dim=(0, 1), keepdim=True)) and not conv["bias"].any()
    assert 0.1 < conv["weight_v"].std() / math.sqrt(4 / (4 * 8)) < 2
    assert 0.005 < tensors[f"{joined}audio_query_tokens"].std() < 0.05


def test_linear_layers_after_beats_take_no_padding():
    config = audio_config(make_tokenizer("<audio>"), widths=[8, 32])
    model = ComposedForConditionalGeneration(config).model.eval()
    features, mask = torch.randn(2, 16, 16), torch.ones(2, 16)
    assert model.get_audio_features(features, mask).pooler_output.shape == (2, 4 * 4 + 2, 32)
    mask[1, 8:] = 0
    with pytest.raises(ValueError, match="this connector makes a feature of each token, padding too"):
        model.get_audio_features(features, mask)
