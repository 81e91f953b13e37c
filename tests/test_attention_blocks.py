"""Gemma 3 as an expert, whose pictures' tokens see each other: its own class is the measure."""

import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from configuration_mmer import MMERConfig
from merging_mmer.experts import Base, open_expert
from merging_mmer.recipe import ExpertRecipe
from merging_mmer.repository import expert_entry
from modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.attention_mmer import media_blocks

from . import tiny_checkpoints as tiny
from .test_stock_classes import whole
from .tiny_models import mmer_model
from .tiny_stock import IMAGE as PICTURE
from .tiny_stock import base_model, expert_model, token_types

PICTURE_BLOCK = [PICTURE] * 16  # twice the sliding window
PROMPTS = [
    [10, *PICTURE_BLOCK, 11, 12, 13],
    [10, 11, *PICTURE_BLOCK, 12, *PICTURE_BLOCK, 13, 14],
    [10, 11, 12, 13, 14, 15, 16],
    [*PICTURE_BLOCK, *PICTURE_BLOCK, 20, 21],
]
# the tiny head may well write a placeholder
NEW = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=[PICTURE])


@functools.cache
def pair(folder):
    base_llm = base_model("gemma3")
    base = Base(str(tiny.save(base_llm, folder / "base")))
    trained = expert_model("gemma3", base_llm, noise=0.1)
    expert = open_expert("own", ExpertRecipe(model=str(tiny.save(trained, folder / "expert"))), base)
    return trained, whole(base, expert, ["image"]), expert, base_llm


@pytest.fixture
def models(tmp_path_factory):
    """(Gemma3ForConditionalGeneration, the merged model with it as its one expert)"""
    return pair(tmp_path_factory.getbasetemp())[:2]


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return dict(input_ids=ids, attention_mask=(ids != 0).long())


def asked(trained, prompts: list[list[int]]) -> tuple[dict, dict]:
    """(what Gemma 3's class takes, what the merged model takes), left-padded."""
    batch = padded(prompts)
    count = int((batch["input_ids"] == PICTURE).sum()) // 16
    given = {"pixel_values": pixels(count)} if count else {}
    theirs = {**batch, **token_types(trained, batch["input_ids"]), **given}
    return theirs, {**batch, **{f"own.{name}": value for name, value in given.items()}, "text_route": "own"}


@pytest.mark.parametrize(
    "prompts", [PROMPTS[:1], PROMPTS[1:2], PROMPTS[3:], PROMPTS], ids=["one", "two", "side by side", "mixed"]
)
@torch.no_grad()
def test_logits_are_gemma_3_s_own(models, prompts):
    trained, merged = models
    theirs, ours = asked(trained, prompts)
    want, got = trained(**theirs).logits, merged(**ours).logits
    real = theirs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5)
    causal = trained(**{**theirs, "token_type_ids": torch.zeros_like(theirs["input_ids"])}).logits
    assert float((causal - want)[real].abs().max()) > 1e-3  # the pictures' masks count


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(cache_implementation="static"),
        dict(use_cache=False),
        dict(num_beams=3, num_return_sequences=2),
        dict(num_beams=2, cache_implementation="static"),
    ],
    ids=str,
)
def test_generate_is_gemma_3_s_own(models, how):
    trained, merged = models
    for prompts in (PROMPTS[:1], PROMPTS):
        theirs, ours = asked(trained, prompts)
        want, got = trained.generate(**theirs, **NEW, **how), merged.generate(**ours, **NEW, **how)
        assert torch.equal(got, want)


@pytest.mark.parametrize("prompt", PROMPTS[:2], ids=["one", "two"])
def test_prompt_lookup_is_gemma_3_s_own_decoding(models, prompt):
    trained, merged = models
    theirs, ours = asked(trained, [prompt])
    want = trained.generate(**theirs, **NEW)
    assert torch.equal(merged.generate(**ours, **NEW, prompt_lookup_num_tokens=2), want)


def test_chunks_of_the_prompt_end_between_pictures_or_are_refused(models):
    trained, merged = models
    theirs, ours = asked(trained, PROMPTS[1:2])  # pictures at 2..17 and 19..34
    want = trained.generate(**theirs, **NEW)
    for how in (dict(), dict(cache_implementation="static")):
        assert torch.equal(merged.generate(**ours, **NEW, prefill_chunk_size=18, **how), want)
        assert torch.equal(merged.generate(**ours, **NEW, prefill_chunk_size=40, **how), want)
        with pytest.raises(ValueError, match="sample 0 has a medium across position 10.*leave prefill_chunk_size out"):
            merged.generate(**ours, **NEW, prefill_chunk_size=10, **how)
    assert merged.generate(padded(PROMPTS[2:3])["input_ids"], **NEW, prefill_chunk_size=3).shape == (1, 13)


@torch.no_grad()
def test_a_decoding_loop_of_one_s_own(models):
    trained, merged = models
    theirs, ours = asked(trained, PROMPTS)
    want = trained.generate(**theirs, **NEW)
    cache, ids, mask = DynamicCache(config=merged.config.text_config), ours["input_ids"], ours["attention_mask"]
    given = ours
    for _ in range(NEW["max_new_tokens"]):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -given["input_ids"].shape[1] :]
        last = merged(**given, position_ids=positions, cache=cache).logits[:, -1]
        token = last.index_fill(-1, torch.tensor(NEW["suppress_tokens"]), -torch.inf).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        given = dict(input_ids=token, attention_mask=mask)
    assert torch.equal(ids, want)


@torch.no_grad()
def test_a_second_picture_in_a_conversation_with_a_cache(models):
    trained, merged = models
    first, second = PROMPTS[0], [15, 16, 17, 18, 19, 20, 21, 22, *PICTURE_BLOCK, 16, 17]
    theirs, ours = asked(trained, [first + second])
    want = trained.generate(**theirs, **NEW)
    one, two = ours["own.pixel_values"].split(1)
    start = torch.tensor([first])
    for turn in (second, first + second):  # the new tokens alone, or all of them again
        cache = merged(start, text_route="own", **{"own.pixel_values": one}).cache
        media = two if turn is second else ours["own.pixel_values"]
        ids = torch.tensor([turn])
        got = merged.generate(
            ids, attention_mask=ours["attention_mask"], cache=cache, text_route="own",
            **{"own.pixel_values": media}, **NEW,
        )  # fmt: skip
        assert torch.equal(got[:, ids.shape[1] :], want[:, len(first + second) :])
    cache = merged(start, text_route="own", **{"own.pixel_values": one}).cache
    got = merged(torch.tensor([second]), cache=cache, **{"own.pixel_values": two}).logits
    torch.testing.assert_close(got, trained(**theirs).logits[:, len(first) :], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_picture_in_two_forwards_is_refused(models):
    _, merged = models
    ids = torch.tensor([[10, *PICTURE_BLOCK, 11]])
    embeds = merged.model.embed_media(ids, {"own": {"pixel_values": pixels(1)}})
    cache = merged(ids[:, :9], media_embeds=embeds[:, :9]).cache
    with pytest.raises(ValueError, match="sample 0 has a medium that began in an earlier forward"):
        merged(ids[:, 9:], media_embeds=embeds[:, 9:], cache=cache)
    whole_picture = merged(ids[:, :17], media_embeds=embeds[:, :17]).cache
    merged(ids[:, 17:], cache=whole_picture)


@torch.no_grad()
def test_embeddings_with_blocks_of_one_s_own(models):
    trained, merged = models
    theirs, ours = asked(trained, PROMPTS[1:2])
    made = {}
    hook = trained.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: made.update(kwargs), with_kwargs=True
    )
    want = trained(**theirs).logits
    hook.remove()
    blocks = media_blocks(ours["input_ids"], {PICTURE})
    given = dict(inputs_embeds=made["inputs_embeds"], block_sequence_ids=blocks, route_ids=torch.full_like(blocks, 2))
    torch.testing.assert_close(merged(**given).logits, want, rtol=1e-5, atol=1e-5)
    tokens = merged.generate(**given, text_route=torch.tensor([2]), attention_mask=ours["attention_mask"], **NEW)
    assert torch.equal(tokens, trained.generate(**theirs, **NEW)[:, -tokens.shape[1] :])


@torch.no_grad()
def test_text_is_the_base_s_own_and_its_mask_is_not_touched(models, tmp_path_factory):
    merged, base_llm = models[1], pair(tmp_path_factory.getbasetemp())[3]
    batch = padded(PROMPTS[2:3] + [[5, 6]])
    handed = []
    hook = merged.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: handed.append(kwargs["attention_mask"]), with_kwargs=True
    )
    got = merged(**batch).logits
    hook.remove()
    assert handed[0] is batch["attention_mask"]
    assert torch.equal(got, base_llm(**batch).logits)


def test_the_entry_of_an_expert_says_so(models, tmp_path_factory, tmp_path):
    expert = pair(tmp_path_factory.getbasetemp())[2]
    vocabulary = SimpleNamespace(placeholders={"own": {"image": ("<image>", PICTURE)}})
    assert expert_entry(expert, vocabulary)["bidirectional"] == ["image"]
    llm = base_model("llava")
    base = Base(str(tiny.save(llm, tmp_path / "base")))
    folder = tiny.save(expert_model("llava", llm), tmp_path / "expert")
    causal = open_expert("own", ExpertRecipe(model=str(folder)), base)
    assert "bidirectional" not in expert_entry(causal, vocabulary)


def test_flash_attention_is_refused_where_tokens_see_each_other(models):
    config = MMERConfig.from_dict(models[1].config.to_dict())
    with pytest.raises(ValueError, match="MMERForConditionalGeneration does not support Flash Attention"):
        MMERForConditionalGeneration._from_config(config, attn_implementation="flash_attention_2")
    assert not models[1]._supports_flash_attn and not models[1].model._supports_flash_attn
    assert mmer_model()._supports_flash_attn
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        models[1].set_attn_implementation("flash_attention_2")
