"""The merged vocabulary: whose tokens get which ids, and which experts fit the base."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import LlamaConfig, LlavaConfig

from merging_mmer.vocabulary import _with_name, build_processor, find_placeholders, merge_vocabulary

from .tiny_processors import BASE_TEMPLATE, LLAVA_TEMPLATE, MAKERS, make_llava, make_tokenizer, merged, to_merged_ids


def merge(base, **experts):
    return merge_vocabulary(
        base, {name: processor for name, (processor, _) in experts.items()}, {n: c for n, (_, c) in experts.items()}
    )


def with_tokenizer(tokenizer):
    processor, config = make_llava()
    processor.tokenizer = tokenizer
    return processor, LlavaConfig(image_token_index=tokenizer.convert_tokens_to_ids("<image>"))


def test_added_tokens_by_hand():
    base = make_tokenizer()
    size = len(base)
    vocabulary = merge(base, image=MAKERS["onevision"](), audio=MAKERS["qwen_audio"](), film=MAKERS["video_llava"]())
    found = [(token.token, token.id - size, token.experts) for token in vocabulary.added_tokens]
    # every expert gives its first added token the id `size`; each gets a row of its own, the shared one is shared
    assert found == [
        ("<image>", 0, ["image"]),
        ("<video>", 1, ["image"]),
        ("<|audio_bos|>", 2, ["audio"]),
        ("<|AUDIO|>", 3, ["audio"]),
        ("<|audio_eos|>", 4, ["audio"]),
        ("<image:film>", 5, ["film"]),
        ("<video:film>", 6, ["film"]),
    ]
    assert [token.expert_ids for token in vocabulary.added_tokens][3] == {"audio": size + 1}
    assert vocabulary.added_tokens[5].expert_ids == {"film": size}
    assert vocabulary.placeholders == {
        "image": {"image": ("<image>", size), "video": ("<video>", size + 1)},
        "audio": {"audio": ("<|AUDIO|>", size + 3)},
        "film": {"image": ("<image:film>", size + 5), "video": ("<video:film>", size + 6)},
    }
    assert vocabulary.tokenizer.padding_side == "left" and len(vocabulary.tokenizer) == size + 7
    assert len(base) == size, "the base's tokenizer is left alone"
    assert vocabulary.warnings == []


def test_tokens_are_matched_by_text_across_experts():
    one, two = make_tokenizer("<image>", "<sep>"), make_tokenizer("<cls>", "<sep>", "<image>")
    size = len(make_tokenizer())
    vocabulary = merge(make_tokenizer(), a=with_tokenizer(one), b=with_tokenizer(two))
    shared = {token.token: token for token in vocabulary.added_tokens}
    assert shared["<sep>"].experts == ["a", "b"] and shared["<sep>"].expert_ids == {"a": size + 1, "b": size + 1}
    assert shared["<cls>"].expert_ids == {"b": size} and shared["<image:b>"].expert_ids == {"b": size + 2}
    text = "<cls>hello<sep>world"
    assert to_merged_ids(two(text)["input_ids"], "b", vocabulary) == vocabulary.tokenizer(text)["input_ids"]


def test_flags_of_added_tokens_are_copied():
    own = make_tokenizer("<image>", lstrip=True)
    own.add_tokens([AddedToken("<soft>", special=False, normalized=True, single_word=True)])
    vocabulary = merge(make_tokenizer(), image=with_tokenizer(own))
    flags = {str(token): token for token in vocabulary.tokenizer.added_tokens_decoder.values()}
    assert flags["<image>"].lstrip and flags["<image>"].special and not flags["<image>"].normalized
    assert flags["<soft>"].single_word and flags["<soft>"].normalized and not flags["<soft>"].special
    # a token that is found by other rules cannot share an id with an earlier expert's
    other = merge(make_tokenizer(), image=with_tokenizer(make_tokenizer("<image>", "<soft>")), b=with_tokenizer(own))
    assert other.renamed["b"] == {"<image>": "<image:b>", "<soft>": "<soft:b>"}
    flags = {str(token): token for token in other.tokenizer.added_tokens_decoder.values()}
    assert flags["<soft:b>"].single_word and not flags["<soft>"].single_word


def test_a_placeholder_that_the_base_has_keeps_its_id():
    base = make_tokenizer("<image>")
    vocabulary = merge(base, image=make_llava(), medical=make_llava())
    assert vocabulary.placeholders["image"]["image"] == ("<image>", len(base) - 1)
    assert [(token.token, token.expert_ids) for token in vocabulary.added_tokens] == [
        ("<image:medical>", {"medical": len(base) - 1})
    ]


def test_modalities_can_be_narrowed():
    base, made = make_tokenizer(), MAKERS["video_llava"]()
    vocabulary = merge_vocabulary(base, {"film": made[0]}, {"film": made[1]}, {"film": ["video"]})
    assert list(vocabulary.placeholders["film"]) == ["video"]
    assert build_processor(vocabulary, {"film": made[0]}, None).experts["film"].modalities == ["video"]
    with pytest.raises(ValueError, match=r"asked for \['audio'\], but it brings \['image', 'video'\]"):
        merge_vocabulary(base, {"film": made[0]}, {"film": made[1]}, {"film": ["audio"]})


def test_a_padded_embedding_is_no_token():
    processor, config = make_llava()
    config.text_config.vocab_size = 4096
    vocabulary = merge(make_tokenizer(), image=(processor, config))
    assert [token.token for token in vocabulary.added_tokens] == ["<image>"]


def test_a_placeholder_outside_the_tokenizer_has_no_row_of_its_own_there():
    processor, config = make_llava()
    own = make_tokenizer()
    processor.tokenizer = own
    config.image_token_index = len(own) + 5
    vocabulary = merge(make_tokenizer(), image=(processor, config))
    assert vocabulary.added_tokens[0].expert_ids == {"image": len(own) + 5}
    assert vocabulary.tokenizer.convert_ids_to_tokens(vocabulary.added_tokens[0].id) == "<image>"


def test_another_base_is_refused_with_the_first_token_that_differs():
    base = make_tokenizer()
    base.add_tokens(["<mine>"])
    with pytest.raises(ValueError, match=rf"token {len(base) - 1} of the base is '<mine>', .* is '<image>'"):
        merge(base, image=make_llava())
    longer = make_tokenizer("<image>")
    longer.add_tokens(["<mine>"])
    with pytest.raises(ValueError, match="in the expert's tokenizer .* is 'no token' and '<mine>' has the id None"):
        merge(longer, image=make_llava())


def test_other_marks_around_a_text_travel_with_the_expert():
    vocabulary = merge(make_tokenizer(), image=MAKERS["llava"](bos=True), audio=MAKERS["qwen_audio"]())
    assert set(vocabulary.readings["image"]) == {"post_processor"} and vocabulary.readings["audio"] == {}
    assert vocabulary.warnings == []


def test_tokens_of_two_meanings_are_called_apart():
    """An earlier expert's word is a later one's placeholder, and the other way round."""
    word, place = make_tokenizer("<image>", "<film>", "<sep>"), make_tokenizer("<sep>", "<film>", "<image>")
    first, second = with_tokenizer(word), with_tokenizer(place)
    second[0].image_token, second[1].image_token_index = "<film>", place.convert_tokens_to_ids("<film>")
    size = len(make_tokenizer())
    vocabulary = merge(make_tokenizer(), a=first, b=second)
    assert vocabulary.renamed == {"a": {}, "b": {"<film>": "<image:b>", "<image>": "<image:b:word>"}}
    assert {token.token: token.expert_ids for token in vocabulary.added_tokens} == {
        "<image>": {"a": size},
        "<film>": {"a": size + 1},
        "<sep>": {"a": size + 2, "b": size},
        "<image:b>": {"b": size + 1},
        "<image:b:word>": {"b": size + 2},
    }
    own = "<image> <film>"
    written = own.replace("<image>", "<image:b:word>").replace("<film>", "<image:b>")
    assert to_merged_ids(place(own)["input_ids"], "b", vocabulary) == vocabulary.tokenizer(written)["input_ids"]


def test_placeholders_of_modalities_that_are_left_out_get_no_row():
    """Two experts know <video>, one of them brings videos: the word is that one's placeholder, under its own name."""
    (eyes, eyes_config), (film, film_config) = MAKERS["onevision"](), MAKERS["video_llava"]()
    own, configs = {"eyes": eyes, "film": film}, {"eyes": eyes_config, "film": film_config}
    vocabulary = merge_vocabulary(make_tokenizer(), own, configs, {"eyes": ["image"], "film": ["video"]})
    assert vocabulary.renamed == {"eyes": {}, "film": {}}
    assert [(token.token, token.experts) for token in vocabulary.added_tokens] == [
        ("<image>", ["eyes"]),
        ("<video>", ["film"]),
    ]


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("<image>", "<image:x>"),
        ("<|audio_bos|>", "<|audio_bos:x|>"),
        ("[IMG]", "[IMG:x]"),
        ("</img>", "</img:x>"),
        ("word", "word:x"),
        ("<a>b", "<a>b:x"),
        ("<", "<:x"),
        ("a\nb>", "a\nb:x>"),
    ],
)
def test_names_of_tokens_by_hand(token, text):
    assert _with_name(token, "x") == text


def test_a_base_without_pad_token_pads_with_eos():
    base = make_tokenizer()
    base.pad_token = None
    vocabulary = merge(base, image=make_llava())
    assert vocabulary.tokenizer.pad_token == base.eos_token and "no pad token" in vocabulary.warnings[0]
    base.eos_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an eos token"):
        merge(base, image=make_llava())


def test_placeholders_of_every_class():
    for kind, modalities in {
        "llava": ["image"],
        "onevision": ["image", "video"],
        "video_llava": ["image", "video"],
        "qwen_audio": ["audio"],
    }.items():
        processor, config = MAKERS[kind]()
        found = find_placeholders("x", processor, config)
        assert list(found) == modalities
        for modality, (token, token_id, written) in found.items():
            assert token == written == getattr(processor, f"{modality}_token")
            assert token_id == processor.tokenizer.convert_tokens_to_ids(token)


def test_a_word_that_only_the_processor_knows_is_no_placeholder():
    """As SmolVLM has it: <video> is no token; the processor writes image placeholders in its place."""
    processor, config = MAKERS["idefics3"]()
    processor.video_token, processor.video_processor = "<video>", processor.image_processor
    assert list(find_placeholders("eyes", processor, config)) == ["image"]
    own, configs = {"eyes": processor}, {"eyes": config}
    with pytest.raises(ValueError, match=r"asked for \['video'\], but it brings \['image'\]"):
        merge_vocabulary(make_tokenizer(), own, configs, {"eyes": ["video"]})


def test_placeholders_that_contradict_are_refused():
    processor, config = make_llava()
    config.image_token_index = 100_000
    with pytest.raises(ValueError, match="its config puts image features at id 100000"):
        find_placeholders("image", processor, config)
    bare, _ = make_llava()
    bare.image_token = bare.image_token_id = None
    with pytest.raises(ValueError, match="names no placeholder token"):
        find_placeholders("image", bare, LlamaConfig())


def test_templates_travel_and_name_the_merged_placeholders(tmp_path):
    processor, _, _ = merged({"image": "llava", "medical": "llava"})
    assert processor.chat_template == BASE_TEMPLATE
    assert processor.expert_templates["image"] == LLAVA_TEMPLATE
    assert processor.expert_templates["medical"] == LLAVA_TEMPLATE.replace("<image>", "<image:medical>")
    with pytest.raises(ValueError, match="chat templates called"):
        made = make_llava()
        vocabulary = merge(make_tokenizer(), rag=made)
        build_processor(vocabulary, {"rag": made[0]}, {"default": BASE_TEMPLATE, "rag": BASE_TEMPLATE})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["<a>", "<b>", "<c>", "<d>"]), unique=True, max_size=4), min_size=1, max_size=3),
    st.text("hello wrd<>abc", max_size=20),
)
def test_experts_and_base_read_text_as_before(added, words):
    base = make_tokenizer()
    experts = {f"e{place}": with_tokenizer(make_tokenizer(*tokens, "<image>")) for place, tokens in enumerate(added)}
    vocabulary = merge(base, **experts)
    ids = [token.id for token in vocabulary.added_tokens]
    assert ids == list(range(len(base), len(base) + len(ids))), "row j is the j-th token behind the base"
    text = words + "<|im_end|>" + words
    known = [token for tokens in added for token in tokens]
    if not any(token in text for token in known):
        assert vocabulary.tokenizer(text)["input_ids"] == base(text)["input_ids"]
    for name, tokens in zip(experts, added, strict=True):
        if not any(token in text for token in set(known) - set(tokens)):
            own = experts[name][0].tokenizer
            assert vocabulary.tokenizer(text)["input_ids"] == to_merged_ids(own(text)["input_ids"], name, vocabulary)
