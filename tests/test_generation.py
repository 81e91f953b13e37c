"""`generate`: a sample in a batch, a beam, a chunk or a cache of any kind equals the sample alone."""

import pytest
import torch
from transformers import LogitsProcessor

from tests.tiny_models import AUDIO, IMAGE, media, mmer_config, mmer_model, text_config

NEW = 7
PLAIN = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=3)
IMAGE_BLOCK, AUDIO_BLOCK = [IMAGE] * 4, [AUDIO] * 5
# text only, image, audio, both, two images, and text again: (ids, images, audios)
SAMPLES = [
    ([10, 11, 12, 13, 14], 0, 0),
    ([10, *IMAGE_BLOCK, 20, 21], 1, 0),
    ([*AUDIO_BLOCK, 30, 31, 32], 0, 1),
    ([10, *IMAGE_BLOCK, 11, *AUDIO_BLOCK, 12, 13], 1, 1),
    ([*IMAGE_BLOCK, 15, *IMAGE_BLOCK, 16], 2, 0),
    ([40, 41], 0, 0),
]


def alone(index: int) -> dict[str, torch.Tensor]:
    ids, images, audios = SAMPLES[index]
    tensors = dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones((1, len(ids)), dtype=torch.long))
    return {**tensors, **media(images, audios, seed=index)}


def together(indices=range(len(SAMPLES))) -> dict[str, torch.Tensor]:
    """A left-padded batch of the samples."""
    samples = [alone(index) for index in indices]
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    batch = {}
    for name, fill in (("input_ids", 3), ("attention_mask", 0)):
        rows = [sample[name][0].tolist() for sample in samples]
        batch[name] = torch.tensor([[fill] * (longest - len(row)) + row for row in rows])
    for name in {name for sample in samples for name in sample if "." in name}:
        batch[name] = torch.cat([sample[name] for sample in samples if name in sample])
    return batch


def by_hand(model, batch: dict[str, torch.Tensor], new: int = NEW) -> list[int]:
    """Greedy decoding of one sample from full forwards, no cache and no `generate`."""
    prompt = batch["input_ids"]
    route_ids, text_route = model.model.routes(prompt, None)
    ids = prompt
    for _ in range(new):
        batch = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        grown = ids.shape[1] - prompt.shape[1]
        routes = torch.cat([route_ids, text_route[:, None].expand(-1, grown)], 1)
        with torch.no_grad():
            logits = model(**batch, route_ids=routes, text_route=text_route, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, prompt.shape[1] :].tolist()


@pytest.fixture(scope="module")
def model():
    return mmer_model()


@pytest.fixture(scope="module")
def wanted(model):
    tokens = [by_hand(model, alone(index)) for index in range(len(SAMPLES))]
    assert len({tuple(row) for row in tokens}) > 3, "all samples answer alike: the test shows nothing"
    return tokens


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=3),
        dict(prefill_chunk_size=4, cache_implementation="static"),
        dict(num_beams=1, repetition_penalty=1.0),
    ],
    ids=str,
)
def test_a_mixed_batch_equals_each_sample_alone(model, wanted, how):
    batch = together()
    out = model.generate(**batch, **PLAIN, **how)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == wanted


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "cohere", "qwen2"])
def test_a_mixed_batch_in_other_families(family):
    model, batch = mmer_model(mmer_config(text_config(family))), together()
    got = model.generate(**batch, **PLAIN)[:, batch["input_ids"].shape[1] :].tolist()
    assert got == [by_hand(model, alone(index)) for index in range(len(SAMPLES))]


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_prompt_lookup_equals_plain_decoding(model, wanted, index):
    sample = alone(index)
    out = model.generate(**sample, **PLAIN, prompt_lookup_num_tokens=2)
    assert out[0, sample["input_ids"].shape[1] :].tolist() == wanted[index]


@pytest.mark.parametrize("how", [dict(), dict(prefill_chunk_size=3), dict(use_cache=False)], ids=str)
def test_beams_of_a_mixed_batch_equal_each_sample_alone(model, how):
    batch = together()
    settings = dict(**PLAIN, num_beams=3, num_return_sequences=2, **how)
    out = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
    for index in range(len(SAMPLES)):
        sample = alone(index)
        want = model.generate(**sample, **settings)[:, sample["input_ids"].shape[1] :].tolist()
        assert out[2 * index : 2 * index + 2] == want


def test_sampled_sequences_keep_the_routes_of_their_sample(model):
    batch = together()
    settings = {**PLAIN, "do_sample": True, "num_return_sequences": 3, "top_k": 1}
    out = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
    greedy = model.generate(**batch, **PLAIN)[:, batch["input_ids"].shape[1] :].tolist()
    assert out == [row for row in greedy for _ in range(3)]


def test_processors_that_look_ids_up_in_the_logits_work_with_placeholders(model):
    out = model.generate(**together(), **{**PLAIN, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2})
    assert out.shape[0] == len(SAMPLES)


def test_the_routes_that_the_processor_passes_are_those_derived(model, wanted):
    batch = together()
    route_ids, text_route = model.model.routes(batch["input_ids"], None)
    assert text_route.tolist() == [0, 2, 3, 1, 2, 0]
    out = model.generate(**batch, **PLAIN, route_ids=route_ids, text_route=text_route)
    assert out[:, batch["input_ids"].shape[1] :].tolist() == wanted


@pytest.mark.parametrize("route", ["base", "merged", "image", "audio"])
def test_a_text_route_can_be_asked_for(model, route):
    sample = alone(3)
    out = model.generate(**sample, **PLAIN, text_route=route)
    _, text_route = model.model.routes(sample["input_ids"], route)
    ids = sample["input_ids"]
    for _ in range(NEW):
        route_ids, _ = model.model.routes(ids, text_route)
        with torch.no_grad():
            step = {**sample, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**step, route_ids=route_ids, text_route=text_route).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert out.tolist() == ids.tolist()


def test_a_route_named_in_words_overrules_what_the_processor_passed(model):
    sample = alone(3)
    route_ids, text_route = model.model.routes(sample["input_ids"], None)
    passed = {**sample, "route_ids": route_ids, "text_route": text_route}
    for route in ("base", ["audio"]):
        with torch.no_grad():
            got = model(**{**passed, "text_route": route}).logits
            assert torch.equal(got, model(**sample, text_route=route).logits)
            assert not torch.equal(got, model(**passed).logits)
        answer = model.generate(**{**passed, "text_route": route}, **PLAIN)
        assert torch.equal(answer, model.generate(**sample, **PLAIN, text_route=route))


def test_embeddings_without_ids_are_text(model):
    """Base unless a route is named, one for all or one a sample; a wrong number of names is refused."""
    ids = torch.tensor([[10, 11, 12], [13, 14, 15]])
    for route in (None, "merged", ["audio", "auto"]):
        with torch.no_grad():
            want = model(input_ids=ids, text_route=route).logits
            # the added tokens' rows and the embedding take no route here, so both ways embed alike
            got = model(inputs_embeds=model.get_input_embeddings()(ids), text_route=route).logits
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="1 routes for a batch of 2"):
        model(inputs_embeds=model.get_input_embeddings()(ids), text_route=["merged"])


def test_a_text_route_for_each_sample(model):
    batch = together([0, 1])
    out = model.generate(**batch, **PLAIN, text_route=["merged", "base"])
    width = batch["input_ids"].shape[1]
    for row, (index, route) in enumerate([(0, "merged"), (1, "base")]):
        sample = alone(index)
        want = model.generate(**sample, **PLAIN, text_route=route)[0, sample["input_ids"].shape[1] :]
        assert out[row, width:].tolist() == want.tolist()


def test_a_conversation_goes_on_from_its_cache(model):
    """Second turn: the whole ids with the cache of the first, and only the new ids, equal the run without a cache."""
    first = alone(1)
    ids, width = first["input_ids"], first["input_ids"].shape[1]
    turn = model.generate(**first, **PLAIN, return_dict_in_generate=True)
    new = torch.tensor([[50, 51, 52]])
    whole = torch.cat([turn.sequences, new], 1)
    tensors = {name: value for name, value in first.items() if "." in name}
    full_mask = torch.ones_like(whole)
    want = model.generate(input_ids=whole, attention_mask=full_mask, **tensors, **PLAIN)
    cache = model.generate(**first, **PLAIN, return_dict_in_generate=True).past_key_values
    got = model.generate(input_ids=whole, attention_mask=full_mask, past_key_values=cache, **tensors, **PLAIN)
    assert got.tolist() == want.tolist()
    assert width < ids.shape[1] + NEW


def test_a_loop_of_the_users_own_keeps_the_route(model, wanted):
    """One token at a time, passing only the cache, as loops written for any causal LM do."""
    for index in range(len(SAMPLES)):
        sample = alone(index)
        with torch.no_grad():
            out = model(**sample, use_cache=True)
            tokens = []
            for _ in range(NEW):
                tokens.append(int(out.logits[0, -1].argmax()))
                token = torch.tensor([tokens[-1:]])
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        assert tokens == wanted[index]


def test_another_picture_changes_the_answer(model):
    sample = alone(1)
    black = {**sample, "image.pixel_values": torch.zeros_like(sample["image.pixel_values"])}
    with torch.no_grad():
        assert not torch.allclose(model(**sample).logits, model(**black).logits)


def with_two_pictures(batch):
    return {**batch, "image.pixel_values": torch.cat([batch["image.pixel_values"]] * 2)}


def without_media(batch):
    return {name: value for name, value in batch.items() if "." not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_two_pictures, "4 <image> tokens in the text, 8 features"),
        (without_media, "4 <image> tokens stand in the text, but no image came"),
        (lambda b: {**b, "depth.pixel_values": b["image.pixel_values"]}, "expert 'depth', but this model has"),
        (lambda b: {**b, "text_route": "sound"}, "unknown route 'sound'"),
        (lambda b: {**b, "text_route": ["base", "base"]}, "2 routes for a batch of 1"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_what_does_not_fit_is_refused(model, change, message, call):
    batch = change(alone(1))
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, **PLAIN) if call == "generate" else model(**batch)


class Wants(LogitsProcessor):
    """Each row would write this token above all others."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += 1e4
        return scores


@pytest.mark.parametrize("beams", [1, 2])
def test_a_placeholder_is_written_by_nobody_but_the_base(beams):
    """This base has the tokens too, and may write what it likes."""
    model = mmer_model(mmer_config(text_config(vocab_size=72), added_tokens=[]))
    batch = together()
    for token in (IMAGE, AUDIO):
        made = model.generate(**batch, **PLAIN, num_beams=beams, logits_processor=[Wants(token)])
        new = made[:, batch["input_ids"].shape[1] :]
        written = (new == token).sum(-1).tolist()
        assert [count > 0 for count in written] == [not (images or audios) for _, images, audios in SAMPLES]
        for row, (_, images, audios) in zip(new, SAMPLES, strict=True):
            assert not images and not audios or not {IMAGE, AUDIO} & set(row.tolist())
