"""Whether an expert reads text as the base does: what is refused, what travels with the expert, what is alike."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, LlavaConfig, LlavaProcessor, PreTrainedTokenizer, PreTrainedTokenizerFast

from merging_mmer.pretrained import load_processor
from merging_mmer.tokenization import PROBES, own_reading
from merging_mmer.vocabulary import build_processor, merge_vocabulary
from processing_mmer import MMERProcessor
from processing_mmer.expert_processors_mmer import reading_tokenizer

from .tiny_processors import BASE_TEMPLATE, image, make_llava, make_tokenizer, to_merged_ids

CORPUS = [*PROBES, "Hello 12 1234 the cat, the hat; two  three   four", "ASSISTANT: don't"]


def trained(split=None, normalizer=None, size=700):
    """A byte-level BPE that has learnt words, numbers and runs of spaces, so that rules of splitting matter."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 5,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.pre_tokenizer = split or core.pre_tokenizer
    if normalizer is not None:
        core.normalizer = normalizer
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def byte_level(**how):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False, **how})


@pytest.mark.parametrize(
    "how",
    [
        dict(split=byte_level(add_prefix_space=True)),
        dict(split=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
        dict(split=byte_level(use_regex=True)),
        dict(normalizer=normalizers.Lowercase()),
        dict(normalizer=normalizers.NFKC()),
        dict(normalizer=normalizers.StripAccents()),
        dict(normalizer=normalizers.Replace("  ", " ")),
        dict(normalizer=normalizers.Strip()),
    ],
    ids=str,
)
def test_another_way_to_split_ordinary_text_is_refused(how):
    base = trained()
    with pytest.raises(
        ValueError, match=r"expert 'x' splits .* otherwise than the base: token \d+ is '.* for the expert"
    ):
        own_reading("x", base, trained(**how))
    assert own_reading("x", trained(**how), trained(**how)) == ({}, [])


@pytest.mark.parametrize("split", [True, False])
def test_another_way_can_be_accepted_and_kept(split):
    """Pieces and merge rules are the same: then each reads its own prompts exactly as before."""
    how = dict(split=byte_level(use_regex=True)) if split else dict(normalizer=normalizers.Lowercase())
    base, own = trained(), trained(**how)
    reading, warnings = own_reading("x", base, own, accepted=True)
    assert set(reading) == {"pre_tokenizer" if split else "normalizer"} and warnings == []
    for text in CORPUS:
        assert reading_tokenizer(base, reading)(text)["input_ids"] == own(text)["input_ids"]
    assert any(base(text)["input_ids"] != own(text)["input_ids"] for text in CORPUS)
    assert own_reading("x", base, trained(), accepted=True) == ({}, [])
    with pytest.raises(ValueError, match="expert 'x' splits"):
        own_reading("x", base, trained(size=400), accepted=True)


def test_the_first_token_that_differs_is_shown():
    base, own = make_tokenizer(), make_tokenizer("<image>")
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    first, space = (base.convert_tokens_to_ids(token) for token in ("H", "Ġ"))
    with pytest.raises(ValueError) as caught:
        own_reading("eyes", base, own)
    assert (
        f"splits 'Hello world' otherwise than the base: token 0 is 'H' ({first}) for the base and 'Ġ' ({space})"
        in (str(caught.value))
    )
    assert "Name the base whose tokenizer the expert was tuned with" in str(caught.value)
    processor, config = make_llava()
    processor.tokenizer = own
    with pytest.raises(ValueError, match="expert 'eyes' splits 'Hello world'"):
        merge_vocabulary(base, {"eyes": processor}, {"eyes": config})
    vocabulary = merge_vocabulary(base, {"eyes": processor}, {"eyes": config}, None, ["eyes"])
    ours = build_processor(vocabulary, {"eyes": processor}, BASE_TEMPLATE)
    found = ours(text=["Hello world", "Hello world<image>"], images=image(0), return_tensors=None, padding=False)
    assert found["input_ids"][0] == base("Hello world")["input_ids"] == ours.tokenizer("Hello world")["input_ids"]
    theirs = own("Hello world")["input_ids"]
    assert found["input_ids"][1][: len(theirs)] == theirs != found["input_ids"][0]


def test_a_shorter_reading_shows_what_is_missing():
    base, own = make_tokenizer(), make_tokenizer()
    own.backend_tokenizer.normalizer = normalizers.Replace(" world", "")
    place, last = len(base("Hello world")["input_ids"]) - 1, base("Hello world")["input_ids"][-1]
    shown = f"token {place} is {base.convert_ids_to_tokens(last)!r} ({last}) for the base and missing for the expert"
    with pytest.raises(ValueError, match=re.escape(shown)):
        own_reading("x", base, own)


def test_other_merges_of_the_same_pieces_are_refused():
    """The same vocabulary, but another order of its merge rules: no fixed text shows it, pieces side by side do."""

    def of(*merges):
        pieces = ["q", "x", "z", "qx", "xz"]
        core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(merges)))
        return PreTrainedTokenizerFast(tokenizer_object=core)

    with pytest.raises(ValueError, match=r"splits 'qxz' .*: token 0 is 'qx' \(3\) for the base and 'q' \(0\)"):
        own_reading("x", of(("q", "x"), ("x", "z")), of(("x", "z"), ("q", "x")))


def test_tokens_that_only_the_expert_has_are_no_difference():
    base, own = make_tokenizer(), make_tokenizer("Hello", "<image>")
    assert own("Hello world")["input_ids"] != base("Hello world")["input_ids"]
    assert own_reading("x", base, own) == ({}, [])


# what travels with the expert


def spaced(scheme, *added, bos=False):
    """As LLMs with sentencepiece pieces have it: a space before the text, or before each piece between specials."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz?.:\n", "▁a", "▁h", "▁w", "he"]
    core = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a"), ("▁", "h"), ("▁", "w"), ("h", "e")])
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.add_tokens(list(added), special_tokens=True)
    return made


@pytest.mark.parametrize("bos", [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.parametrize("schemes", [("always", "first"), ("first", "always"), ("first", "first")])
def test_the_space_behind_special_tokens_and_bos_stay_each_ones_own(schemes, bos, tmp_path):
    """Of "<image>what" one tokenizer makes <image>, ▁w, … and the other <image>, w, …: the base's and the expert's."""
    base, own = spaced(schemes[0], bos=bos[0]), spaced(schemes[1], "<image>", bos=bos[1])
    base.chat_template = BASE_TEMPLATE
    reading, warnings = own_reading("eyes", base, own)
    parts = {"pre_tokenizer"} if schemes[0] != schemes[1] else set()
    parts |= {"post_processor"} if bos[0] != bos[1] else set()
    assert set(reading) == parts and warnings == []
    images = make_llava()[0].image_processor
    processor = LlavaProcessor(images, own, 14, "default", num_additional_image_tokens=1)
    config = LlavaConfig(image_token_index=own.convert_tokens_to_ids("<image>"))
    vocabulary = merge_vocabulary(base, {"eyes": processor}, {"eyes": config})
    build_processor(vocabulary, {"eyes": processor}, BASE_TEMPLATE).save_pretrained(tmp_path)
    loaded = MMERProcessor.from_pretrained(tmp_path)
    words = ["<image>what", "a<image>\nhe a</s>what", "<image> what"]
    for text in words:
        theirs = processor(text=text, images=image(0), return_tensors="pt")["input_ids"][0].tolist()
        ours = loaded(text=text, images=image(0))["input_ids"][0].tolist()
        assert ours == to_merged_ids(theirs, "eyes", vocabulary)
    both = loaded(text=[words[0], "what</s>a"], images=image(0), return_tensors=None, padding=False)["input_ids"]
    assert both[0] == to_merged_ids(
        processor(text=words[0], images=image(0), return_tensors="pt")["input_ids"][0].tolist(), "eyes", vocabulary
    )
    assert both[1] == base("what</s>a")["input_ids"], "text alone is read as the base reads it"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["he", " ", "a", "\n", "</s>", "<s>", "?", "  w"]), max_size=8).map("".join))
def test_any_text_is_read_as_the_expert_reads_it(words):
    base, own = spaced("always"), spaced("first", "<image>", bos=True)
    reading, _ = own_reading("x", base, own)
    assert reading_tokenizer(base, reading)(words)["input_ids"] == own(words)["input_ids"]
    assert reading_tokenizer(base, {}) is base


def test_llama_tokenizers_old_and_new_fit_together():
    """transformers' own class: `legacy` says whether the space stands behind special tokens too."""
    pieces = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>", "▁", *"abcdefgh", "▁a", "he"])}
    merges = [("▁", "a"), ("h", "e")]
    new, old = (LlamaTokenizer(vocab=pieces, merges=merges, legacy=legacy) for legacy in (False, True))
    assert new("he</s>a")["input_ids"] != old("he</s>a")["input_ids"], "the two differ: the test shows something"
    for base, own in ((new, old), (old, new)):
        reading, warnings = own_reading("x", base, own)
        assert set(reading) == {"pre_tokenizer"} and warnings == []
        assert reading_tokenizer(base, reading)("he</s>a")["input_ids"] == own("he</s>a")["input_ids"]


def test_a_bos_that_the_base_does_not_have_is_refused():
    """Its id in the expert's tokenizer.json is another token's in the merged vocabulary."""
    own = make_tokenizer("<image>", "<mine>")
    mine = own.convert_tokens_to_ids("<mine>")
    own.backend_tokenizer.post_processor = processors.TemplateProcessing("<mine> $A", None, [("<mine>", mine)])
    processor, config = make_llava()
    processor.tokenizer = own
    first, first_config = make_llava()
    with pytest.raises(ValueError, match="expert 'b' puts tokens around a text that the base does not have"):
        merge_vocabulary(make_tokenizer(), {"a": first, "b": processor}, {"a": first_config, "b": config})


# tokenizers without tokenizer.json


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: one token a letter."""

    def __init__(self, step=1, bos=False, **kwargs):
        self.letters = {letter: place for place, letter in enumerate(["<unk>", "<s>", "</s>", *"Helo wrd"])}
        self.step, self.bos = step, bos
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return list(text)[:: self.step]

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return {place: letter for letter, place in self.letters.items()}.get(index, "<unk>")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, *token_ids_0] if self.bos else token_ids_0


def test_tokenizers_in_python_are_compared_by_what_they_do():
    assert own_reading("x", Letters(), Letters()) == ({}, [])
    with pytest.raises(ValueError, match=r"splits 'Hello world' .* token 1 is 'e' \(4\) for the base and 'l' \(5\)"):
        own_reading("x", Letters(), Letters(step=2))
    reading, warnings = own_reading("x", Letters(), Letters(bos=True))
    assert reading == {} and "the base's way is taken" in warnings[0]
    with pytest.raises(ValueError, match="Letters has no tokenizer.json"):
        reading_tokenizer(Letters(), {"normalizer": None})


def test_a_tokenizer_of_mistral_common_alone_is_refused_by_name(tmp_path):
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tekken.json: a tokenizer of mistral-common, expected tokenizer.json"):
        load_processor(tmp_path)
