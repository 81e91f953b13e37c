"""Log mel energies by value against Kaldi's recipe written out; batches, masks, and sounds that do not fit."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from processing_mmer import MMERProcessor
from processing_mmer.composed_processor_mmer import ComposedProcessor
from processing_mmer.expert_processors_mmer import ExpertProcessor
from processing_mmer.fbank_mmer import FbankFeatureExtractor, log_mel_energies
from tests.tiny_processors import make_tokenizer

RATE, LENGTH, STEP, FFT = 16_000, 400, 160, 512


def sound(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def mel(hertz):
    return 1127 * math.log(1 + hertz / 700)


def slow_energies(wave, bins):
    """Frame by frame, frequency by frequency, triangle by triangle."""
    window = [(0.5 - 0.5 * math.cos(2 * math.pi * i / (LENGTH - 1))) ** 0.85 for i in range(LENGTH)]
    low, high = mel(20), mel(RATE / 2)
    gap = (high - low) / (bins + 1)
    rows = []
    for start in range(0, len(wave) - LENGTH + 1, STEP):
        frame = [float(x) * 32768 for x in wave[start : start + LENGTH]]
        average = sum(frame) / LENGTH
        frame = [x - average for x in frame]
        frame = [frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(LENGTH)]
        frame = np.array([x * w for x, w in zip(frame, window)])
        power = []
        for k in range(FFT // 2 + 1):
            angle = 2 * np.pi * k * np.arange(LENGTH) / FFT
            power.append((frame * np.cos(angle)).sum() ** 2 + (frame * np.sin(angle)).sum() ** 2)
        row = []
        for b in range(bins):
            left, centre, right = low + b * gap, low + (b + 1) * gap, low + (b + 2) * gap
            energy = 0.0
            for k, p in enumerate(power[:-1]):  # Kaldi leaves out the last frequency, where every triangle is 0
                here = mel(k * RATE / FFT)
                energy += p * max(0.0, min((here - left) / (centre - left), (right - here) / (right - centre)))
            row.append(math.log(max(energy, 2.0**-23)))
        rows.append(row)
    return np.array(rows)


def test_energies_are_kaldis():
    wave = sound(LENGTH + 4 * STEP + 100) + 0.2
    for bins in (128, 23):
        got = log_mel_energies(wave, RATE, bins)
        assert got.shape == (5, bins) and got.dtype == np.float32
        assert np.allclose(got, slow_energies(wave, bins), atol=2e-5)


def test_a_tone_is_loud_where_it_lies_and_silence_is_the_floor():
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    nearest = round((mel(1000) - mel(20)) / ((mel(8000) - mel(20)) / 129)) - 1
    assert (np.abs(log_mel_energies(tone).argmax(1) - nearest) <= 1).all()
    made = FbankFeatureExtractor()(np.zeros(RATE))
    assert np.allclose(made["input_features"], (-23 * math.log(2) - 15.41663) / (2 * 6.55582), atol=1e-6)
    assert made["input_features"].shape == (1, 98, 128)


def test_the_lowest_filters_are_empty_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energies = log_mel_energies(sound(RATE), 16_000, 127)  # another number of bins: nothing kept from before
    assert (energies == np.log(np.float32(2.0**-23))).all(0).sum() > 0


def test_sounds_of_a_batch_are_what_they_are_alone_and_the_mask_tells():
    extract = FbankFeatureExtractor(num_mel_bins=16)
    short, long = sound(LENGTH + 15 * STEP), sound(LENGTH + 29 * STEP + 159, seed=1)
    both = extract([short, long])
    assert both["input_features"].shape == (2, 30, 16) and both["input_features"].dtype == torch.float32
    assert both["feature_attention_mask"].sum(1).tolist() == [16, 30]
    assert both["feature_attention_mask"][0].tolist() == [1] * 16 + [0] * 14
    assert torch.equal(both["input_features"][:1, :16], extract(short)["input_features"])
    assert torch.equal(both["input_features"][1:], extract(torch.from_numpy(long))["input_features"])
    assert (both["input_features"][0, 16:] == 0).all()
    as_numpy = extract([short.tolist(), long], return_tensors="np")
    assert np.array_equal(as_numpy["input_features"], both["input_features"].numpy())


def test_padding_that_is_heard_fills_every_sound():
    extract = FbankFeatureExtractor(num_mel_bins=16, max_seconds=0.4, min_frames=1, hear_padding=True)
    made = extract(sound(LENGTH))
    assert made["input_features"].shape == (1, 40, 16) and (made["input_features"][0, 1:] == 0).all()
    assert made["feature_attention_mask"].all()


def test_a_long_sound_is_refused_or_cut_when_asked():
    extract = FbankFeatureExtractor(num_mel_bins=16, max_seconds=0.4)
    fits, long = sound(LENGTH + 39 * STEP + 159), sound(LENGTH + 40 * STEP)
    assert extract(fits)["input_features"].shape[1] == 40
    with pytest.raises(
        ValueError, match=r"audio\[1\]: found 0\.42 s, expected at most 0\.4 s; .*\"truncation\": True"
    ):
        extract([fits, long])
    cut = extract(long, truncation=True)["input_features"]
    assert torch.equal(cut, extract(long[: LENGTH + 39 * STEP])["input_features"])
    willing = FbankFeatureExtractor(num_mel_bins=16, max_seconds=0.4, truncation=True)
    assert torch.equal(willing(long)["input_features"], cut)
    with pytest.raises(ValueError, match="at most 0.4 s"):
        willing(long, truncation=False)
    assert FbankFeatureExtractor().max_frames == 1024


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (sound(LENGTH + 15 * STEP - 1), r"audio\[0\]: found 2799 samples, 15 frames; .*at least 16 frames, 2800"),
        ([sound(4000), np.zeros(10)], r"audio\[1\]: found 10 samples, 0 frames"),
        ([np.zeros((2, 4000))], r"audio\[0\]: found float64 of shape \(2, 4000\)"),
        (np.zeros(4000, np.int16), "found int16 .*divide whole numbers"),
        (np.full(4000, np.nan), "expected finite floats"),
        (["dog.wav"], "expected finite floats"),
        ([], "found no sound"),
    ],
)
def test_what_is_no_sound_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FbankFeatureExtractor()(given)


def test_settings_and_rates_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="found 8000, expected 16000"):
        FbankFeatureExtractor()(sound(4000), sampling_rate=8000)
    for wrong in (dict(sampling_rate=0), dict(num_mel_bins=0), dict(max_seconds=0.1), dict(std=0.0)):
        with pytest.raises(ValueError, match="expected at least 1000 Hz"):
            FbankFeatureExtractor(**wrong)


def test_it_is_a_part_of_a_processor_and_survives_json(tmp_path):
    tokenizer = make_tokenizer("<audio>")
    part = FbankFeatureExtractor(num_mel_bins=16, max_seconds=0.5, hear_padding=True)
    processor = ComposedProcessor(
        tokenizer, parts={"audio": part}, features={"audio": {"count": 3}}, audio_token="<audio>"
    )
    assert {"input_features", "feature_attention_mask"} < set(processor.model_input_names)
    long = sound(9000)
    with pytest.raises(ValueError, match="at most 0.5 s"):
        processor(text="<audio> a dog", audio=[long], return_tensors="pt")
    wanted = processor(text="<audio> a dog", audio=[long], audio_kwargs={"truncation": True}, return_tensors="pt")
    assert (wanted["input_ids"] == tokenizer.convert_tokens_to_ids("<audio>")).sum() == 3
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())["parts"]["audio"]
    assert stored == {"class": "FbankFeatureExtractor", "settings": part.to_dict()}
    again = ComposedProcessor(tokenizer, parts={"audio": stored}, features=processor.features, audio_token="<audio>")
    got = again(text="<audio> a dog", audio=[long], audio_kwargs={"truncation": True}, return_tensors="pt")
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)

    placeholders = {"audio": {"token": "<audio>", "id": tokenizer.convert_tokens_to_ids("<audio>")}}
    expert = ExpertProcessor("ears", processor, placeholders)
    rebuilt = ExpertProcessor.from_dict(expert.to_dict(), tokenizer, None)
    assert rebuilt.sampling_rate == 16_000
    for one in (expert, rebuilt):
        made, written = one.encode(
            "audio", [[long]], False, {"audio_kwargs": {"truncation": True, "sampling_rate": 16_000}}
        )
        assert torch.equal(made["input_features"], wanted["input_features"]) and written == ["<audio>" * 3]
    merged = MMERProcessor(tokenizer, [rebuilt])
    with pytest.raises(ValueError, match="at most 0.5 s"):
        merged(text="<audio>", audio=long)
    made = merged(text="<audio>", audio=np.repeat(long, 2), sampling_rate=32_000, audio_kwargs={"truncation": True})
    assert made["ears.input_features"].shape == (1, 50, 16) and made["ears.feature_attention_mask"].all()
