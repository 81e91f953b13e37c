"""Media whose tokens see each other: the masks by value, bases of several families, and what the config says."""

import json

import pytest
import torch
from transformers import DynamicCache, StaticCache

from configuration_mmer import MMERConfig
from modeling_mmer.attention_mmer import block_masks, media_blocks

from .test_generation import PLAIN, SAMPLES, alone, by_hand, together
from .tiny_models import IMAGE, VOCABULARY, mmer_config, mmer_model, text_config
from .tiny_stock import text

WINDOW = 8
LAYERS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)


# the masks


def restated(ids: list[int], placeholders: set[int], real: list[int], window: int | None, new: int):
    """bool (new queries, keys), from the words: what is causal or of the same run, within the window, and real."""
    last = len(ids)
    rows = []
    for query in range(last - new, last):
        row = []
        for key in range(last):
            low, high = min(query, key), max(query, key)
            run = ids[query] in placeholders and all(ids[place] == ids[query] for place in range(low, high + 1))
            sees = key <= query or run
            if window is not None and key <= query - window:
                sees = False
            row.append(sees and bool(real[key]))
        rows.append(row)
    return torch.tensor(rows)


ROWS = [
    [3, 3, 10, *[90] * 11, 11, 90, 90, 12, 13],
    [10, 90, 90, 90, 91, 91, 91, 90, 90, *[92] * 4, 14, 15, 16, 17, 18, 19],
    [3] * 14 + [10, 11, 12, 13, 14],
]
REAL = [[int(token != 3) for token in row] for row in ROWS]
PICTURES = {90, 92}  # 91 is another expert's, and causal


def config_of(implementation: str = "sdpa"):
    config = text("gemma3_text", **LAYERS)
    config._attn_implementation = implementation
    return config


def masks(config, ids, attention_mask=None, cache=None, position_ids=None):
    blocks = media_blocks(ids, PICTURES)
    return block_masks(config, torch.empty(*ids.shape, 4), attention_mask, cache, position_ids, blocks)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_are_causal_or_of_the_same_run_and_within_the_window(implementation):
    ids, real = torch.tensor(ROWS), torch.tensor(REAL)
    made = masks(config_of(implementation), ids, real)
    assert set(made) == {"full_attention", "sliding_attention"}
    for kind, window in (("full_attention", None), ("sliding_attention", WINDOW)):
        seen = made[kind] if implementation == "sdpa" else made[kind] == 0
        assert seen.shape == (3, 1, 19, 19)
        for row, ids_of in enumerate(ROWS):
            assert torch.equal(seen[row, 0], restated(ids_of, PICTURES, REAL[row], window, 19)), (kind, row)


def filled(cache, config, tokens: int):
    for layer in range(config.num_hidden_layers):
        state = torch.zeros(3, config.num_key_value_heads, tokens, config.head_dim)
        cache.update(state, state, layer)
    return cache


@pytest.mark.parametrize("past", [1, 9, 14])
@pytest.mark.parametrize("longer", [0, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_masks_of_a_conversation_that_goes_on_with_a_cache(kind, longer, past):
    """A cache of 1, 9 or 14 tokens, the last two longer than the window; keys that are not there yet are masked."""
    config, new = config_of(), 19 - past
    rows = [[11] * past + row[past:] for row in ROWS]  # what is in the cache is over
    real = torch.tensor([[*row, *[1] * longer] for row in REAL])
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)
    filled(cache, config, past)
    made = masks(config, torch.tensor(rows)[:, past:], real, cache)
    for layer, (name, window) in enumerate((("sliding_attention", WINDOW), ("full_attention", None))):
        length, offset = cache.get_mask_sizes(new, layer)
        assert made[name].shape == (3, 1, new, length)
        for row, ids in enumerate(rows):
            want = restated(ids, PICTURES, REAL[row], window, new)[:, int(offset) :]
            assert torch.equal(made[name][row, 0][:, : want.shape[1]], want), (name, row)
            assert not made[name][row, 0][:, want.shape[1] :].any()


def test_masks_of_a_prompt_that_is_shorter_than_the_window_of_a_static_cache():
    config, ids = config_of(), [10, 90, 90, 11]
    cache = StaticCache(config=config, max_cache_len=32)
    made = masks(config, torch.tensor([ids]), cache=cache)
    for layer, name in enumerate(("sliding_attention", "full_attention")):
        length, _ = cache.get_mask_sizes(4, layer)
        assert made[name].shape == (1, 1, 4, length) and length > 4
        assert torch.equal(made[name][0, 0, :, :4], restated(ids, PICTURES, [1] * 4, None, 4))
        assert not made[name][0, 0, :, 4:].any()


def test_a_block_is_a_run_of_one_placeholder():
    ids = torch.tensor([[90, 90, 92, 10, 92, 91, 92, 92], [3, 3, 90, 90, 90, 10, 11, 90]])
    assert media_blocks(ids, PICTURES).tolist() == [[0, 0, 1, -1, 2, -1, 3, 3], [-1, -1, 0, 0, 0, -1, -1, 1]]
    assert media_blocks(ids, {91}).tolist() == [[-1] * 5 + [0, -1, -1], [-1] * 8]


def test_an_implementation_that_takes_no_mask_is_refused():
    with pytest.raises(ValueError, match=r"'flash_attention_2' takes no mask.*Load the model with attn_impl"):
        masks(config_of("flash_attention_2"), torch.tensor(ROWS), torch.tensor(REAL))


def test_sequences_packed_in_a_row():
    """A full layer keeps them apart; in a sliding layer they are refused."""
    ids, positions = torch.tensor([[10, 90, 90, 90, 11, 10, 90, 90]]), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    llama = text("llama")
    llama._attn_implementation = "sdpa"
    made = masks(llama, ids, position_ids=positions)[0, 0]
    one, two = ([10, 90, 90, 90, 11], [10, 90, 90])
    assert torch.equal(made[:5, :5], restated(one, PICTURES, [1] * 5, None, 5))
    assert torch.equal(made[5:, 5:], restated(two, PICTURES, [1] * 3, None, 3))
    assert not made[:5, 5:].any() and not made[5:, :5].any()
    with pytest.raises(ValueError, match="position_ids start again inside a row"):
        masks(config_of(), ids, position_ids=positions)


def test_blocks_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"block_sequence_ids has shape \(1, 3\), expected \(1, 4\)"):
        block_masks(config_of(), torch.empty(1, 4, 4), None, None, None, torch.zeros(1, 3, dtype=torch.long))


# bases of other families, with an entry made by hand


def both_ways(family: str, **changes):
    config = mmer_config(text_config(family, **changes)).to_dict()
    config["experts"]["image"]["bidirectional"] = ["image"]
    return mmer_model(MMERConfig.from_dict(config))


FAMILIES = [
    ("llama", {}), ("cohere", {}), ("granite", {}), ("qwen2", {}), ("gemma2", {}), ("gemma3_text", LAYERS),
    ("mistral", {"sliding_window": 5}), ("smollm3", {}), ("phi3", {"sliding_window": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[family for family, _ in FAMILIES])
@torch.no_grad()
def test_other_families_take_the_masks(family, changes):
    """The same model with masks made by loops; audio of another expert in the same sequence stays causal."""
    model = both_ways(family, **changes)
    llm, batch = model.model.language_model.config, together()
    ids, real = batch["input_ids"].tolist(), batch["attention_mask"]

    def by_loops(window):
        rows = [restated(row, {IMAGE}, real[i].tolist(), window, len(row)) for i, row in enumerate(ids)]
        return torch.where(torch.stack(rows)[:, None], 0.0, torch.finfo(torch.float32).min)

    kinds = {"full_attention": None, "sliding_attention": getattr(llm, "sliding_window", None)}
    if getattr(llm, "layer_types", None):
        made = {kind: by_loops(kinds[kind]) for kind in set(llm.layer_types)}
    else:
        made = by_loops(kinds["sliding_attention"])
    want = model(**{**batch, "attention_mask": made}).logits
    got = model(**batch).logits
    torch.testing.assert_close(got[real.bool()], want[real.bool()], rtol=1e-5, atol=1e-5)
    causal = mmer_model(mmer_config(text_config(family, **changes)))(**batch).logits
    changed = (got - causal)[..., :VOCABULARY].abs().amax(-1) > 1e-4
    pictures = torch.tensor([IMAGE in row for row in ids])
    assert changed[pictures].any(-1).all() and not changed[~pictures][real[~pictures].bool()].any()


@pytest.mark.parametrize(
    "how", [dict(), dict(cache_implementation="static"), dict(use_cache=False), dict(num_beams=2)], ids=str
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_mixed_batch_equals_each_sample_alone(family, how):
    model, batch = both_ways(family), together()
    got = model.generate(**batch, **PLAIN, **how)[:, batch["input_ids"].shape[1] :].tolist()
    for index in range(len(SAMPLES)):
        sample = alone(index)
        if "num_beams" in how:
            want = model.generate(**sample, **PLAIN, **how)[0, sample["input_ids"].shape[1] :].tolist()
        else:
            want = by_hand(model, sample)
        assert got[index] == want, index


# the entry


def test_the_entry_survives_json_and_names_its_tokens():
    config = both_ways("llama").config
    again = MMERConfig.from_dict(json.loads(config.to_json_string()))
    assert again.experts["image"]["bidirectional"] == ["image"]
    assert again.bidirectional_tokens() == [IMAGE] and mmer_config().bidirectional_tokens() == []


@pytest.mark.parametrize("found", [["video"], ["audio"], "image", {"image": True}])
def test_an_entry_of_a_modality_that_the_expert_lacks(found):
    values = mmer_config().to_dict()
    values["experts"]["image"]["bidirectional"] = found
    with pytest.raises(ValueError, match=r"experts.image.bidirectional: found .* some of \['image'\]"):
        MMERConfig.from_dict(values)


def test_a_base_with_layers_of_another_kind():
    values = mmer_config(text_config("qwen2", layer_types=["full_attention", "chunked_attention"])).to_dict()
    MMERConfig.from_dict(values)
    values["experts"]["image"]["bidirectional"] = ["image"]
    with pytest.raises(ValueError, match=r"the base has layers of \['chunked_attention'\]"):
        MMERConfig.from_dict(values)
