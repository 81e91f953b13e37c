"""The counts behind the plots, by a slow count; the plots: whole PNGs that change with what they show."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hub_cards import mask_counts, write_card
from hub_cards.plots import WIDTH
from mmer import merge
from tests import tiny_world
from tests.evaluation_rows import OTHER, ROW

EXPERTS = ["image", "audio"]
NAMES = {"residual_by_layer.png", "mask_density.png", "mask_overlap.png"}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    merge(tiny_world.make(folder / "world"), folder / "merged", progress=False, max_shard_size="60KB")
    return folder / "merged"


@pytest.fixture
def copied(merged, tmp_path):
    return shutil.copytree(merged, tmp_path / "merged")


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def modules(folder):
    return json.loads((folder / "config.json").read_text())["delta_modules"]


def pictures(folder):
    return {path.name: path.read_bytes() for path in (folder / "plots").iterdir()}


def test_counts_are_those_of_a_slow_count(merged, monkeypatch):
    monkeypatch.setattr(mask_counts, "_BLOCK", 40)  # several blocks a matrix
    counts = mask_counts.count_masks(merged, EXPERTS, modules(merged))
    every, both, of_all = tensors(merged), np.zeros((2, 2)), 0
    for name, masks in every.items():
        if not name.endswith(".masks") or name.startswith("model.experts."):
            continue
        columns = every[name.removesuffix("masks") + "delta"].shape[1]
        bits = np.unpackbits(masks, axis=-1, bitorder="little")[..., :columns]
        kind = name.removesuffix(".masks").removeprefix("model.language_model.")
        layer = None
        if kind.startswith("layers."):
            _, number, kind = kind.split(".", 2)
            layer = int(number)
        for place, own in enumerate(bits):
            assert counts.by_matrix[kind, layer][place] == own.sum()
            assert counts.density(place, kind, layer) == pytest.approx(own.mean())
        both += np.array([[(a & b).sum() for b in bits] for a in bits])
        of_all += 1
    assert (
        of_all == len(counts.by_matrix)
        and len(counts.layers) == 2
        and counts.kinds[:4] == [f"self_attn.{c}_proj" for c in "qkvo"]
        and len(counts.kinds) == 7
    )
    assert (counts.both == both).all()
    either = both[0, 0] + both[1, 1] - both[0, 1]
    assert counts.overlap()[0, 1] == counts.overlap()[1, 0] == pytest.approx(both[0, 1] / either)
    assert counts.overlap()[0, 0] == 1
    assert counts.grid(1).shape == (7, 2)


def test_masks_of_other_experts_are_refused(merged):
    with pytest.raises(ValueError, match="has masks of 2 experts, expected 3"):
        mask_counts.count_masks(merged, [*EXPERTS, "third"], modules(merged))


def test_ones_without_numpys_own_count(monkeypatch):
    mask = np.random.default_rng(0).integers(0, 256, (7, 5), dtype=np.uint8)
    expected = int(np.unpackbits(mask).sum())
    assert mask_counts.ones(mask) == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert mask_counts.ones(mask) == expected


def test_a_card_shows_its_plots(copied):
    (copied / "evaluation.json").write_text(json.dumps({"mmer": "0", "tasks": [ROW, OTHER]}))
    write_card(copied, plots=True)
    assert set(pictures(copied)) == {*NAMES, "retention.png"}
    text = (copied / "README.md").read_text()
    for name in pictures(copied):
        with Image.open(copied / "plots" / name) as image:
            image.verify()
            assert image.format == "PNG" and image.width == WIDTH and 150 <= image.height <= 1400, name
        assert (copied / "plots" / name).stat().st_size < 200_000
        assert f"](plots/{name})" in text
    assert "![Bars of retention by task: clothes 99.8%]" in text and "captions 1" not in text
    # and goes without them, also of an earlier time
    write_card(copied)
    assert not (copied / "plots").exists() and "](plots/" not in (copied / "README.md").read_text()


def test_plots_change_with_what_they_show_and_with_nothing_else(copied):
    write_card(copied, plots=True)
    assert set(pictures(copied)) == NAMES, "no evaluation, no bars"
    before = pictures(copied)
    write_card(copied, plots=True)
    assert pictures(copied) == before

    def changed():
        write_card(copied, plots=True)
        after = pictures(copied)
        return {name for name in {*before, *after} if before.get(name) != after.get(name)}

    report = json.loads((copied / "merge_report.json").read_text())
    report["experts"]["audio"]["layers"]["1"]["residual"] *= 0.5
    (copied / "merge_report.json").write_text(json.dumps(report))
    assert changed() == {"residual_by_layer.png"}
    before = pictures(copied)

    place = next(
        p for p in copied.glob("*.safetensors") if any(name.endswith("q_proj.masks") for name in load_file(p))
    )
    values = load_file(place)
    name = next(name for name in values if name.endswith("q_proj.masks"))
    values[name] = values[name].copy()
    values[name][0] = 255
    save_file(values, place, metadata={"format": "pt"})
    assert changed() == {"mask_density.png", "mask_overlap.png"}
    before = pictures(copied)

    (copied / "evaluation.json").write_text(json.dumps({"mmer": "0", "tasks": [ROW]}))
    assert changed() == {"retention.png"}
    before = pictures(copied)
    (copied / "evaluation.json").write_text(json.dumps({"mmer": "0", "tasks": [ROW | {"retention": 0.5}]}))
    assert changed() == {"retention.png"}


def test_without_matplotlib_a_card_has_no_plots(copied, monkeypatch):
    monkeypatch.setattr("hub_cards.card.can_draw", lambda: False)
    before = (copied / "README.md").read_bytes()
    with pytest.raises(ValueError, match="pip install matplotlib"):
        write_card(copied, plots=True)
    assert (copied / "README.md").read_bytes() == before
    write_card(copied)


def test_a_folder_without_masks_has_none_of_their_plots(tmp_path):
    world = tiny_world.make(tmp_path / "w") | {"decoupling": {"kind": "none"}}
    merge(world, tmp_path / "static", progress=False)
    write_card(tmp_path / "static", plots=True)
    assert set(pictures(tmp_path / "static")) == {"residual_by_layer.png"}
    assert "nothing of its own is kept" in (tmp_path / "static/README.md").read_text()
