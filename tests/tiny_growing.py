"""Folders that experts join and leave: tiny experts that differ in what they changed, and what each route of a folder
is and answers."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.routed_weights_mmer import RoutedWeight
from modeling_mmer.routing_mmer import route_tensor
from processing_mmer import MMERProcessor

from . import tiny_several as several
from .tiny_processors import noise, picture, text, user

KINDS = {"one": "llava", "two": "qwen2_audio", "three": "llava"}
MORE = {"one": ("<both>", "<mine>"), "two": ("<left>",), "three": ("<new>", "<both>")}
MEDIA = {"one": picture(0), "two": noise(0), "three": picture(1)}
# what only `three` changed, and what it left as it was
NEW = ("layers.1.mlp.up_proj.weight", "layers.1.input_layernorm.weight")
LEFT = ("layers.0.self_attn.o_proj.weight", "layers.0.input_layernorm.weight", "layers.1.mlp.down_proj.weight")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ASK = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}


def thetas(folder: Path) -> dict[str, torch.Tensor]:
    """The language model's tensors of a checkpoint, by the base's names."""
    found = {}
    for name, tensor in several.tiny.tensors(folder).items():
        for prefix in ("language_model.model.", "language_model.", "model.", ""):
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), tensor)
                break
    return found


def make(folder: Path, words: int = several.tiny.ROWS, dtype=torch.float32, **base_changes) -> dict:
    """A base and three experts on disk, and the recipe that merges them."""
    base = several.save_base(folder / "base", words=words, dtype=dtype, **base_changes)
    start = thetas(folder / "base")
    for seed, (name, kind) in enumerate(KINDS.items()):
        several.save_expert(folder / name, kind, base, seed + 1, MORE[name], words=words, noise=0.1)
        path = folder / name / "model.safetensors"
        stored = load_file(path)
        for untouched in LEFT if name == "three" else NEW:
            (place,) = [key for key in stored if key.endswith(f"model.{untouched}")]
            stored[place] = start[untouched].clone()
        save_file(stored, path, metadata={"format": "pt"})
    return {"base": str(folder / "base"), "experts": {name: str(folder / name) for name in KINDS}}


def make_loras(folder: Path, ranks: dict[str, int]) -> dict:
    """The same, with experts that are LoRAs of some rank on the base; the third has other targets."""
    base = several.save_base(folder / "base")
    recipe = {"base": str(folder / "base"), "experts": {}, "decoupling": {"kind": "exact"}}
    for seed, (name, rank) in enumerate(ranks.items()):
        several.save_expert(folder / name, KINDS[name], base, seed + 1, MORE[name], noise=0.0, norms=False)
        torch.manual_seed(seed)
        targets = "up_proj|q_proj" if name == "three" else "o_proj|q_proj"
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, init_lora_weights=False,
            target_modules=rf".*language_model.*\.({targets})",
        )  # fmt: skip
        get_peft_model(AutoModelForMultimodalLM.from_pretrained(folder / name), config).save_pretrained(
            folder / f"{name}-lora"
        )
        recipe["experts"][name] = {"lora": str(folder / f"{name}-lora"), "tower": str(folder / name)}
    return recipe


def some(recipe: dict, *names: str, **changes) -> dict:
    """The recipe with some of its experts, in that order."""
    return {**recipe, **changes, "experts": {name: recipe["experts"][name] for name in names}}


def load(folder: Path) -> tuple[MMERForConditionalGeneration, MMERProcessor]:
    model, info = MMERForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval(), MMERProcessor.from_pretrained(folder, config=model.config.text_config)


@torch.no_grad()
def routes(model: MMERForConditionalGeneration) -> dict[tuple[str, str], torch.Tensor]:
    """(route, tensor of the language model) -> its parameters, as inference makes them."""
    found = {}
    for place, module in [*model.model.language_model.named_modules(), ("lm_head", model.lm_head)]:
        for leaf in ("weight", "bias"):
            if not isinstance(module._parameters.get(leaf), torch.nn.Parameter):
                continue
            for route, name in enumerate(["base", "merged", *model.config.expert_names]):
                if isinstance(module, RoutedWeight) and leaf == "weight":
                    found[name, f"{place}.{leaf}"] = module.route_weight(route)
                else:
                    found[name, f"{place}.{leaf}"] = route_tensor(module, leaf, route)
    return found


def rows(model: MMERForConditionalGeneration) -> dict[tuple[str, str], torch.Tensor]:
    """(route, added token) -> its rows, beside the embedding and beside the head."""
    names = ["base", "merged", *model.config.expert_names]
    matrices = [model.model.added_embeddings.weight]
    if not model.config.tie_word_embeddings:
        matrices.append(model.added_head.weight)
    return {
        (name, token["token"]): torch.stack([matrix.detach()[row] for matrix in (matrices * 2)[:2]])
        for name, of in zip(names, model.config.added_rows(), strict=True)
        for token, row in zip(model.config.added_tokens, of, strict=True)
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@torch.no_grad()
def answers(model, processor, name: str) -> tuple[torch.Tensor, list[int]]:
    """(logits of a prompt with the expert's own medium, tokens that it writes); `base`: of a text."""
    blocks = [text("what is this ?")] if name == "base" else [MEDIA[name], text("what is this ?")]
    kind = "audio" if name == "two" else "image"
    chosen = {} if name == "base" else {"experts": {kind: name}}
    inputs = processor.apply_chat_template([user(*blocks)], **ASK, **chosen)
    wanted = {"base": 0}.get(name, 2 + model.config.expert_names.index(name) if name != "base" else 0)
    assert inputs["text_route"].tolist() == [wanted]
    written = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    return model(**inputs).logits[0], written


def check_unchanged(before, after, names: list[str]):
    """The routes of `names`, their tokens and their answers are the same in two loaded folders, bit for bit."""
    (old_model, _), (new_model, new_processor) = before, after
    old, new = routes(old_model), routes(new_model)
    compared = [key for key in old if key[0] in names]
    assert len(compared) >= 21 * len(names) - (old_model.config.tie_word_embeddings * len(names))
    assert [key for key in compared if not same(old[key], new[key])] == []
    ids = {token["token"]: token["id"] for token in new_model.config.added_tokens}
    old_rows, new_rows = rows(old_model), rows(new_model)
    stay = [token for token in old_model.config.added_tokens if set(token["experts"]) & set(names)]
    for token in stay:
        assert ids[token["token"]] == token["id"] == new_processor.tokenizer.convert_tokens_to_ids(token["token"])
        for name in set(names) - {"base"}:
            assert same(old_rows[name, token["token"]], new_rows[name, token["token"]]), (name, token)
    words = list(range(len(several.WORDS))) + [token["id"] for token in stay]
    for name in names:
        (one, wrote), (other, writes) = (answers(*loaded, name) for loaded in (before, after))
        columns = words if name != "base" else slice(None)
        assert torch.equal(one[:, columns], other[:, columns]), name
        assert wrote == writes
