"""from_pretrained in every way: spread over a CPU and a disk, in another dtype, and saved again as it was."""

import hashlib
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, core_model_loading

from modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.loading_mmer import _Renaming
from tests.tiny_models import AUDIO, IMAGE, media, mmer_model

PLAIN = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=3)
SPREAD = {
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "model.experts.image": "disk",
    "model.experts.audio": "cpu",
    "model.added_embeddings": "cpu",
    "lm_head": "cpu",
    "added_head": "cpu",
}


def mixed_prompt() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[10, *[IMAGE] * 4, 11, *[AUDIO] * 5, 12, 13]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media(1, 1)}


def masks_of(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.endswith(".masks")}


def hashes(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, folder = mmer_model(), tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("keep", [False, True], ids=["made", "kept"])
@pytest.mark.parametrize("device_map", ["auto", "cpu", SPREAD], ids=["auto", "cpu", "disk"])
def test_a_device_map_changes_no_number(saved, tmp_path, device_map, keep):
    model, folder = saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = MMERForConditionalGeneration.from_pretrained(
            folder, device_map=device_map, offload_folder=tmp_path / "off"
        ).eval()
    if device_map is SPREAD:
        assert any(parameter.is_meta for parameter in loaded.parameters()), "nothing is on the disk: shows nothing"
    if keep:
        loaded.keep_routes(["merged", "image", "audio"])
    for changes in ({}, {"text_route": "image"}, {"text_route": "audio"}, {"text_route": "merged"}):
        batch = {**mixed_prompt(), **changes}
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert torch.equal(loaded.generate(**batch, **PLAIN), model.generate(**batch, **PLAIN))
    assert all(module.masks.dtype == torch.uint8 for module in loaded.modules() if hasattr(module, "masks"))
    loaded.save_pretrained(tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(folder)


def test_sharded_files_are_the_model(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = MMERForConditionalGeneration.from_pretrained(tmp_path)
    want = model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["load", "to", "short"])
def test_another_dtype_leaves_the_masks_alone(saved, dtype, how):
    model, folder = saved
    if how == "load":
        other = MMERForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    else:
        other = MMERForConditionalGeneration.from_pretrained(folder)
        short = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half"}[dtype]
        other = other.to(dtype) if how == "to" else getattr(other, short)()
    masks = masks_of(model)
    assert masks
    for name, value in masks_of(other).items():
        assert value.dtype == torch.uint8 and torch.equal(value, masks[name])
    floats = {p.dtype for p in other.parameters() if p.is_floating_point()}
    assert floats == {dtype}
    with torch.no_grad():
        got, want = other(**mixed_prompt()).logits, model(**mixed_prompt()).logits
    assert got.dtype == dtype
    finite = torch.isfinite(want)
    assert torch.equal(finite, torch.isfinite(got))
    error = (got[finite].float() - want[finite]).norm() / want[finite].norm()
    assert error <= {torch.float32: 0, torch.float16: 0.02, torch.bfloat16: 0.12}[dtype], float(error)


def test_the_auto_dtype_is_the_one_that_was_saved(saved, tmp_path):
    model, folder = saved
    MMERForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = MMERForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16, torch.uint8}


# outputs


def test_hidden_states_attentions_and_tuples(saved):
    model, folder = saved
    eager = MMERForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    batch = mixed_prompt()
    length, layers = batch["input_ids"].shape[1], model.config.text_config.num_hidden_layers
    with torch.no_grad():
        out = eager(**batch, output_hidden_states=True, output_attentions=True)
        as_tuple = eager(**batch, return_dict=False)
        assert len(out.hidden_states) == layers + 1 and len(out.attentions) == layers
        assert all(state.shape == (1, length, 32) for state in out.hidden_states)
        for attention in out.attentions:
            assert attention.shape == (1, 4, length, length)
            torch.testing.assert_close(attention.sum(-1), torch.ones(1, 4, length))
            assert attention.triu(1).abs().max() == 0
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)
        last = eager.model(**batch).last_hidden_state
        assert torch.equal(out.hidden_states[-1], last)


def test_labels_are_scored_by_the_next_token(saved):
    model, _ = saved
    batch = mixed_prompt()
    labels = batch["input_ids"].clone()
    labels[labels >= 64] = -100  # media are given, not written
    with torch.no_grad():
        out = model(**batch, labels=labels)
    logs = out.logits[0, :-1].double().log_softmax(-1)
    terms = [-logs[at, label] for at, label in enumerate(labels[0, 1:].tolist()) if label != -100]
    torch.testing.assert_close(out.loss.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-5)


class StockLoading(MMERForConditionalGeneration):
    """The same model, read as transformers reads any."""

    _load_pretrained_model = staticmethod(PreTrainedModel._load_pretrained_model)


def broken(folder, to):
    """A copy of a folder in which one tensor has another shape, one another dtype, one is missing, one is nobody's."""
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.language_model.layers.0."
    del tensors[prefix + "mlp.down_proj.delta"]
    tensors[prefix + "self_attn.q_proj.delta"] = torch.zeros(3, 2)
    tensors[prefix + "self_attn.k_proj.delta"] = tensors[prefix + "self_attn.k_proj.delta"].half()
    tensors["model.nobodys"] = torch.zeros(2)
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "broken"])
@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=["plain", "cast", "map"])
def test_tensors_taken_as_they_are_make_the_model_that_transformers_makes(saved, tmp_path, whole, how):
    folder = saved[1] if whole else broken(saved[1], tmp_path)
    how = {**how, "output_loading_info": True, "ignore_mismatched_sizes": not whole}
    models = []
    for cls in (MMERForConditionalGeneration, StockLoading):
        torch.manual_seed(0)
        models.append(cls.from_pretrained(folder, **how))
    (ours, our_report), (stock, report) = models
    assert our_report == report
    assert (
        bool(report["missing_keys"]) and bool(report["mismatched_keys"]) and bool(report["unexpected_keys"]) or whole
    )
    want = dict(stock.named_parameters())
    got = dict(ours.named_parameters())
    assert list(got) == list(want) and ours.training == stock.training
    for name, parameter in got.items():
        assert torch.equal(parameter, want[name]) and parameter.dtype == want[name].dtype, name
        assert parameter.requires_grad == want[name].requires_grad, name
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), stock.buffers(), strict=True))
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == (
        stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
    )


def test_no_conversion_is_prepared_for_a_tensor_that_needs_none(saved, monkeypatch):
    prepared = []

    class Counted(core_model_loading.WeightRenaming):
        def __init__(self, *args, **kwargs):
            prepared.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(core_model_loading, "WeightRenaming", Counted)
    StockLoading.from_pretrained(saved[1])
    assert len(prepared) > 50, "transformers makes none any more: loading_mmer is of no use"
    prepared.clear()
    MMERForConditionalGeneration.from_pretrained(saved[1])
    assert not prepared


@pytest.mark.parametrize("scope", [None, "", "experts.image", "experts.image.vision_tower", "language_model"])
def test_a_tensor_that_some_transform_renames_is_left_to_it(scope):
    names = [name for name, _ in mmer_model().named_parameters()]
    transform = core_model_loading.WeightRenaming(r"weight$", "kernel")
    transform.scope_prefix, transform.base_model_prefix = scope, "model"
    renamed = _Renaming([transform])
    found = [name for name in names if renamed(name)]
    assert found == [name for name in names if transform.rename_source_key(name)[0] != name]
    assert 0 < len(found) < len(names)


def test_a_transformers_that_loads_in_another_way_is_left_to_it(saved, monkeypatch):
    asked = []

    def other(model, plan, *, files):
        asked.append((model, plan, files))
        return "its report"

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(other))
    assert MMERForConditionalGeneration._load_pretrained_model("m", "p", files=[]) == "its report"
    assert asked == [("m", "p", [])]
