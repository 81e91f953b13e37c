"""The benchmark of what a model holds: entropies by hand, and bytes that are those of the tensors."""

import sys
from pathlib import Path

import pytest
import torch

from modeling_mmer import MMERForConditionalGeneration

from .tiny_models import mmer_model

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import resident  # noqa: E402


def test_entropy_by_hand():
    assert resident.entropy(torch.tensor([3, 3, 3])) == 0
    assert resident.entropy(torch.tensor([0, 1, 2, 3])) == pytest.approx(2)
    assert resident.entropy(torch.tensor([0, 0, 0, 5])) == pytest.approx(0.75 * 0.4150375 + 0.25 * 2)


def test_sizes_are_those_of_the_tensors_that_are_left(tmp_path, monkeypatch):
    made = mmer_model()
    made.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(resident, "EXPERT", "image")
    rows = {
        name: int(megabytes) for _, name, megabytes, _ in resident.sizes(made.model.language_model, tmp_path / "model")
    }
    assert set(rows) == set(resident.ways("image"))
    model = MMERForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    whole = [*model.parameters(), *model.buffers()]
    towers = {id(tensor) for tensor in (*model.model.experts.parameters(), *model.model.experts.buffers())}
    own = {id(tensor): tensor.nbytes for tensor in whole if id(tensor) not in towers}
    assert resident.language_bytes(model) == sum(own.values())
    model.only_routes(["image"])
    assert resident.language_bytes(model) < sum(own.values())


def test_other_forms_count_the_entries_without_a_bit(tmp_path):
    mmer_model().save_pretrained(tmp_path / "model")
    rows = {form: bits for form, bits, _ in resident.other_forms(tmp_path / "model")}
    assert rows["bf16, as it is"] == "16.0" and float(rows["entropy of the 65,536 bf16 patterns"]) <= 16
    assert any(form.startswith("zlib, level 1") for form in rows)
