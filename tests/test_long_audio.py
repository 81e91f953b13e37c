"""Sounds longer than an expert hears: told, with what to do; never cut in silence, cut when asked."""

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    AudioFlamingo3Processor,
    Gemma3nAudioFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from processing_mmer import MMERProcessor
from processing_mmer.composed_processor_mmer import ComposedProcessor
from processing_mmer.expert_processors_mmer import ExpertProcessor

from .tiny_processors import image, make_tokenizer, merged, noise, sound, text, user

RATE = 16000
SECOND = "audio array: found 1.50 seconds, but expert 'audio' hears 1.00 .*cut the sound into pieces"
CUT = {"audio_kwargs": {"truncation": True}}


@pytest.fixture(scope="module")
def ear():
    """Its extractor takes one second and cuts the rest; there is an expert for images beside it."""
    return merged({"audio": "qwen_audio", "image": "llava"})[0]


def alone(processor, token: str, name: str = "ear") -> MMERProcessor:
    entry = {"token": token, "id": processor.tokenizer.convert_tokens_to_ids(token)}
    return MMERProcessor(processor.tokenizer, [ExpertProcessor(name, processor, {"audio": entry})])


def composed(extractor) -> MMERProcessor:
    tokenizer = make_tokenizer("<audio>")
    features = {"audio": {"count": 3}}
    return alone(ComposedProcessor(tokenizer, {"audio": extractor}, features, audio_token="<audio>"), "<audio>")


@pytest.mark.parametrize("samples", [RATE // 10, RATE - 1, RATE])
def test_what_fits_is_heard(ear, samples):
    assert ear(text="<|AUDIO|>", audio=sound(0, samples))["audio.input_features"].shape == (1, 16, 100)


def test_what_is_too_short_for_a_feature_is_told(ear):
    with pytest.raises(ValueError, match="too short to make one feature"):
        ear(text="<|AUDIO|>", audio=sound(0, 1))


def test_what_does_not_fit_is_told(ear, tmp_path):
    long = sound(0, RATE * 3 // 2)
    for given in (long, long.tolist(), torch.tensor(long), {"array": np.repeat(long, 2), "sampling_rate": 2 * RATE}):
        with pytest.raises(ValueError, match=SECOND):
            ear(text="<|AUDIO|>", audio=given)
    with pytest.raises(ValueError, match=r'pass audio_kwargs=\{"truncation": True\}'):
        ear(audio=long)
    with pytest.raises(ValueError, match=SECOND):
        ear(text=["<|AUDIO|>", "<image>", "<|AUDIO|>"], audio=[sound(1), long], images=image(0))
    with pytest.raises(ValueError, match=SECOND):
        ear.apply_chat_template([user(noise(0, len(long)), text("what?"))], tokenize=True, return_dict=True)
    soundfile.write(tmp_path / "rain.wav", sound(0, 8000 * 5 // 2), 8000)
    with pytest.raises(ValueError, match=r"rain\.wav: found 2\.50 seconds, but expert 'audio' hears 1\.00"):
        ear(text="<|AUDIO|>", audio=tmp_path / "rain.wav")


def test_its_start_is_heard_when_asked(ear):
    long = sound(0, RATE * 3 // 2)
    start = ear(text="what <|AUDIO|>", audio=long[:RATE])
    assert all(
        torch.equal(value, start[name]) for name, value in ear(text="what <|AUDIO|>", audio=long, **CUT).items()
    )
    chat = [user(noise(0, len(long)), text("what?"))]
    asked = ear.apply_chat_template(chat, tokenize=True, return_dict=True, processor_kwargs=CUT)
    assert torch.equal(asked["audio.input_features"], start["audio.input_features"])
    half = ear(text="<|AUDIO|>", audio=long, audio_kwargs={"max_length": RATE // 2})
    assert half["audio.input_features"].shape == (1, 16, 50)


def test_an_end_shorter_than_a_step_of_the_extractor_is_no_loss(ear):
    wave = sound(0, RATE + 160)
    assert torch.equal(*(ear(audio=wave[:end])["audio.input_features"] for end in (RATE, RATE + 159)))
    with pytest.raises(ValueError, match="found 1.01 seconds"):
        ear(audio=wave)


def test_an_extractor_told_not_to_cut_hears_all(ear):
    made = ear(audio=sound(0, 2 * RATE), audio_kwargs={"truncation": False})
    assert made["audio.input_features"].shape == (1, 16, 200)


def test_whispers_own_half_minute():
    whisper = composed(WhisperFeatureExtractor(feature_size=8))
    assert whisper.experts["ear"].audio_limit == 30 * RATE
    whisper(text="<audio>", audio=sound(0, 30 * RATE))
    with pytest.raises(ValueError, match="found 31.00 seconds, but expert 'ear' hears 30.00"):
        whisper(text="<audio>", audio=sound(0, 31 * RATE))


def test_a_length_that_only_the_call_names():
    gemma = composed(Gemma3nAudioFeatureExtractor(feature_size=8))
    assert gemma.experts["ear"].audio_limit == 30 * RATE
    gemma(text="<audio>", audio=sound(0, RATE))
    with pytest.raises(ValueError, match="found 32.00 seconds, but expert 'ear' hears 30.00"):
        gemma(text="<audio>", audio=sound(0, 32 * RATE))


def test_a_processor_that_takes_pieces_hears_as_many_as_it_says():
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    pieces = alone(AudioFlamingo3Processor(extractor, make_tokenizer("<sound>"), max_audio_len=2.5), "<sound>")
    assert pieces.experts["ear"].audio_limit == 2 * RATE
    made = pieces(text="<sound>", audio=sound(0, RATE * 3 // 2))
    assert made["ear.input_features"].shape == (2, 8, 100)
    with pytest.raises(ValueError, match="found 3.00 seconds, but expert 'ear' hears 2.00"):
        pieces(text="<sound>", audio=sound(0, 3 * RATE))


def test_extractors_without_a_limit_are_left_alone():
    wide = composed(Wav2Vec2FeatureExtractor())
    assert wide.experts["ear"].audio_limit is None
    assert wide(text="<audio>", audio=sound(0, 40 * RATE))["ear.input_values"].shape == (1, 40 * RATE)


def test_an_expert_without_ears_has_no_limit(ear):
    assert ear.experts["image"].audio_limit is None
