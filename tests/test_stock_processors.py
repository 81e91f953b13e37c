"""Stock classes with their own processors, from text and media to tokens that are generated, beside the original.

With one expert at density 1 the expert's route has its weights within rounding: logits agree to 1e-4 of values near 1.
"""

from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    FuyuImageProcessor,
    FuyuProcessor,
    Idefics2ImageProcessor,
    Idefics2Processor,
    JanusProcessor,
    VibeVoiceAcousticTokenizerFeatureExtractor,
    VibeVoiceAsrProcessor,
    VoxtralProcessor,
)
from transformers.utils import is_num2words_available, is_torchaudio_available

from merging_mmer import Recipe, merge
from merging_mmer.media_check import check_media
from merging_mmer.vocabulary import build_processor, merge_vocabulary
from modeling_mmer import MMERForConditionalGeneration
from processing_mmer.processing_mmer import MMERProcessor

from . import tiny_stock
from .tiny_processors import BASE_TEMPLATE, image, make_tokenizer, sound, to_merged_ids, video
from .tiny_processors import MAKERS as FIRST_MAKERS
from .tiny_stock_processors import (
    MAKERS,
    ROWS,
    Own,
    configured,
    hearing,
    janus,
    template,
    token_settings,
    tokens,
    world,
)

ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}
WORDS = len(tokens())  # of the base
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
GREEDY = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=list(range(WORDS, ROWS)))


class Case(NamedTuple):
    kind: str
    own: Own
    expert: Any
    theirs: Any
    merged: MMERForConditionalGeneration
    ours: MMERProcessor


def medium(modality: str, seed: int) -> Any:
    """Each of another size."""
    made = {
        "image": lambda: Image.fromarray(image(seed, 20 + 13 * seed, 40 - 5 * seed)),
        "video": lambda: video(seed, 4),
        "audio": lambda: sound(seed, 9000 + 1500 * seed),
    }
    return made[modality]()


def settings(own: Own, modality: str) -> dict[str, Any]:
    return {**own.call, **({"videos_kwargs": {"do_sample_frames": False}} if modality == "video" else {})}


def recipe(folder) -> Recipe:
    return Recipe.from_dict(
        {
            "base": str(folder / "base"),
            "experts": {"own": str(folder / "expert")},
            "method": {"name": "ties", "density": 1.0},
            "decoupling": {"kind": "mask", "scale": "none", "rank": 0},
        }
    )


@pytest.fixture(scope="module", params=MAKERS)
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    own = MAKERS[request.param]()
    expert = world(request.param, folder, own)
    report = merge(recipe(folder), folder / "out", progress=False)
    assert report.warnings == []
    merged = MMERForConditionalGeneration.from_pretrained(folder / "out").eval()
    ours = MMERProcessor.from_pretrained(folder / "out", trust_remote_code=True)
    return Case(request.param, own, expert, AutoProcessor.from_pretrained(folder / "expert"), merged, ours)


def pieces(made: torch.Tensor) -> list[torch.Tensor]:
    return [piece for piece in made.flatten(0, 1) if piece.any()]


def assert_same_media(case: Case, got, want):
    names = {name for name in want if name not in TEXT}
    assert names and {name for name in got if "." in name} == {f"own.{name}" for name in names}
    for name in names:
        mine, other = (torch.as_tensor(made) for made in (got[f"own.{name}"], want[name]))
        if case.own.pieces:
            assert len(pieces(mine)) == len(pieces(other)) > 0
            assert all(torch.equal(*pair) for pair in zip(pieces(mine), pieces(other), strict=True)), name
        else:
            assert torch.equal(mine, other), name


def assert_same(case: Case, modality: str, got, want):
    """Tokens, media, logits and what is generated."""
    assert [case.ours.tokenizer.convert_ids_to_tokens(row) for row in got["input_ids"].tolist()] == [
        case.theirs.tokenizer.convert_ids_to_tokens(row) for row in want["input_ids"].tolist()
    ]
    mask = want["attention_mask"].bool()
    assert torch.equal(got["attention_mask"], want["attention_mask"])
    assert (got["text_route"] == 2).all()
    placeholder = case.merged.config.experts["own"]["placeholders"][modality]
    assert (got["input_ids"] == placeholder["id"]).sum() == len(
        case.merged.model.get_media_features("own", modality, **case.merged.model.media_inputs(dict(got))["own"])
    )
    assert_same_media(case, got, want)
    with torch.no_grad():
        theirs = case.expert(**want).logits[..., :WORDS] * tiny_stock.STOCK[case.kind].head
        mine = case.merged(**got).logits[..., :WORDS]
        torch.testing.assert_close(mine[mask], theirs[mask], rtol=1e-4, atol=1e-4)
        blind = case.merged(input_ids=got["input_ids"] * (got["input_ids"] < WORDS), text_route="own").logits
        assert float((blind[..., :WORDS] - mine)[:, -1].abs().max()) > 1e-3  # the media count
        generated = [
            model.generate(**made, **GREEDY)[:, -3:] for model, made in ((case.merged, got), (case.expert, want))
        ]
    assert torch.equal(*generated)


def test_a_text_with_its_medium(case):
    for modality, word in case.own.modalities.items():
        given = {"text": f"what {word} is?", ARGUMENTS[modality]: medium(modality, 0), **settings(case.own, modality)}
        assert_same(case, modality, case.ours(**given), case.theirs(**given, return_tensors="pt"))


def test_a_batch_of_media_of_unequal_sizes(case):
    for modality, word in case.own.modalities.items():
        items = [medium(modality, 1), medium(modality, 2)]
        given = {"text": [f"what {word} is?", f"{word}\na dog and a cat"], **settings(case.own, modality)}
        got = case.ours(**given, **{ARGUMENTS[modality]: items})
        if case.own.nested:
            items = [[item] for item in items]
        want = case.theirs(**given, **{ARGUMENTS[modality]: items}, return_tensors="pt", text_kwargs={"padding": True})
        assert_same(case, modality, got, want)


def test_two_media_in_one_prompt(case):
    for modality, word in case.own.modalities.items():
        items = [medium(modality, 3), medium(modality, 1)]
        given = {ARGUMENTS[modality]: items, **settings(case.own, modality)}
        got = case.ours(text=f"a {word} and {word}?", **given)
        given[ARGUMENTS[modality]] = [items] if case.own.nested else items
        if not case.own.one_each:
            assert_same(case, modality, got, case.theirs(text=f"a {word} and {word}?", **given, return_tensors="pt"))
            continue
        # the processor takes one for each text; the class itself takes any number
        apart = case.theirs(text=[f"a {word} and", f" {word}?"], **given, return_tensors="pt")
        made = {name: value for name, value in apart.items() if name not in TEXT}
        assert_same(case, modality, got, {**{name: got[name] for name in TEXT[:2]}, **made})
        joined = [
            t for row, kept in zip(apart["input_ids"], apart["attention_mask"]) for t in row[kept.bool()].tolist()
        ]
        assert got["input_ids"][0].tolist() == joined


def test_a_chat(case):
    """Media in content blocks, in the expert's own template, alone and in a batch."""
    for modality, word in case.own.modalities.items():
        asked = {"type": "text", "text": "what is in the image?"}
        chats = [
            [{"role": "user", "content": [{"type": modality, modality: medium(modality, seed)}, asked]}]
            for seed in (0, 2)
        ]
        for given in (chats[0], chats):
            options: dict[str, Any] = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
            extra = settings(case.own, modality)
            got = case.ours.apply_chat_template(given, processor_kwargs=dict(extra), **options)
            extra = {**extra, "return_tensors": "pt", "text_kwargs": {"padding": True}}
            if case.own.chats:
                want = case.theirs.apply_chat_template(
                    given, None, return_tensors="pt", processor_kwargs=extra, **options
                )
            else:
                text = case.theirs.apply_chat_template(given, add_generation_prompt=True)
                items = [medium(modality, seed) for seed in (0, 2)][: 1 if given is chats[0] else 2]
                want = case.theirs(text=text, **{ARGUMENTS[modality]: items}, **extra)
            assert_same(case, modality, got, want)
        assert word in case.ours.apply_chat_template(chats[0])


@pytest.mark.parametrize("case", ["llava_next_video", "video_llama_3"], indirect=True)
def test_two_kinds_of_media_in_one_prompt(case):
    words = case.own.modalities
    given = {"text": f"{words['video']} or {words['image']}?", "images": medium("image", 0)}
    given |= {"videos": [medium("video", 1)], **settings(case.own, "video")}
    got, want = case.ours(**given), case.theirs(**given, return_tensors="pt")
    assert got["input_ids"].tolist() == want["input_ids"].tolist()
    assert_same_media(case, got, want)
    with torch.no_grad():
        torch.testing.assert_close(
            case.merged(**got).logits[..., :WORDS], case.expert(**want).logits[..., :WORDS], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", MAKERS)
def test_two_experts_of_one_kind_each_get_their_own_tokens(kind):
    made = {name: MAKERS[kind]() for name in ("first", "more")}
    configs = {}
    for name, own in made.items():
        with configured(kind, token_settings(kind, own.processor.tokenizer, own)):
            configs[name] = tiny_stock.config(kind)
    own = {name: one.processor for name, one in made.items()}
    vocabulary = merge_vocabulary(tokens(template=BASE_TEMPLATE), own, configs)
    ours = build_processor(vocabulary, own, BASE_TEMPLATE)
    assert vocabulary.warnings == [] and set(vocabulary.renamed["more"].values()) >= {
        f"<{modality}:more>" for modality in made["more"].modalities
    }
    for modality, word in made["more"].modalities.items():
        given = {ARGUMENTS[modality]: medium(modality, 0), **settings(made["more"], modality)}
        want = own["more"](text=f"what {word} is?", **given, return_tensors="pt")
        got = ours(text=f"what <{modality}:more> is?", **given)
        assert got["input_ids"][0].tolist() == to_merged_ids(want["input_ids"][0].tolist(), "more", vocabulary)
        assert (got["text_route"] == 3).all()
        names = {name for name in want if name not in TEXT}
        assert names == {name.removeprefix("more.") for name in got if "." in name}
        assert all(torch.equal(torch.as_tensor(got[f"more.{n}"]), torch.as_tensor(want[n])) for n in names)


# refused before anything is merged


def fuyu() -> Own:
    """Writes its placeholder itself, in front of the text, and closes the prompt behind it."""
    tokenizer = tokens("|SPEAKER|", "|NEWLINE|", "<s>", "<0x04>")
    images = FuyuImageProcessor(size={"height": 8, "width": 8}, patch_size={"height": 4, "width": 4})
    return Own(FuyuProcessor(images, tokenizer), {"image": "|SPEAKER|"})


def voxtral() -> Own:
    """Makes prompts by its chat template alone, which mistral-common holds; token 24 is its placeholder."""
    tokenizer = tokens()
    return Own(VoxtralProcessor(hearing(20), tokenizer), {"audio": tokenizer.convert_ids_to_tokens(24)})


def idefics2() -> Own:
    """Puts a space between a picture and a word, and one mark between two pictures that touch."""
    tokenizer = tokens("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    images = Idefics2ImageProcessor(size={"shortest_edge": 8, "longest_edge": 16})
    return Own(Idefics2Processor(images, tokenizer, image_seq_len=3), {"image": "<image>"})


def vibevoice_asr() -> Own:
    """Writes how long a sound lasts where its chat template says so, apart from the placeholder."""
    tokenizer = tokens("<|box_start|>", "<|object_ref_start|>", "<|object_ref_end|>")
    written = template(audio="<|object_ref_start|><|box_start|><|object_ref_end|><|AUDIO_DURATION|> seconds")
    made = VibeVoiceAsrProcessor(VibeVoiceAcousticTokenizerFeatureExtractor(), tokenizer, written)
    return Own(made, {"audio": "<|box_start|>"})


@pytest.mark.parametrize(
    ("kind", "make", "said"),
    [
        ("fuyu", fuyu, r"its FuyuProcessor cannot be taken over for image media: .*Found total 2 \|SPEAKER\|"),
        ("voxtral", voxtral, r"its VoxtralProcessor cannot be taken over for audio media: .*Give another expert"),
        ("idefics2", idefics2, r"its Idefics2Processor .* 'a dog <image>and a cat' it gives .* and nothing else"),
        ("vibevoice_asr", vibevoice_asr, r"its VibeVoiceAsrProcessor .*AUDIO_DURATION.* and nothing else of a prompt"),
    ],
)
def test_a_processor_that_does_more_than_to_replace_placeholders_is_refused(kind, make, said, tmp_path):
    world(kind, tmp_path, make())
    with pytest.raises(ValueError, match=said):
        merge(recipe(tmp_path), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_processor_that_writes_more_than_the_placeholder_is_refused(tmp_path):
    """Janus can put a system prompt before each text; before each picture it would stand inside the user's."""
    own = janus()
    own.processor.use_default_system_prompt = True
    world("janus", tmp_path, own)
    with pytest.raises(ValueError, match="Expected a processor that replaces a placeholder and nothing else"):
        merge(recipe(tmp_path), tmp_path / "out", progress=False)


GRANITE = {
    "processor_class": "GraniteSpeechProcessor",
    "audio_token": "<|audio|>",
    "audio_processor": {"feature_extractor_type": "GraniteSpeechFeatureExtractor", "n_mels": 4},
}
SMOL = {
    "processor_class": "SmolVLMProcessor",
    "image_seq_len": 4,
    "image_processor": {"image_processor_type": "SmolVLMImageProcessor"},
    "video_processor": {"video_processor_type": "SmolVLMVideoProcessor"},
}


@pytest.mark.parametrize(
    ("kind", "word", "processor_config", "package"),
    [
        pytest.param(
            "granite_speech", "<|audio|>", GRANITE, "torchaudio",
            marks=pytest.mark.skipif(is_torchaudio_available(), reason="torchaudio is there"),
        ),
        pytest.param(
            "smolvlm", "<image>", SMOL, "num2words",
            marks=pytest.mark.skipif(is_num2words_available(), reason="num2words is there"),
        ),
    ],
)  # fmt: skip
def test_a_processor_whose_package_is_missing_says_which(kind, word, processor_config, package, tmp_path):
    modality = "audio" if kind == "granite_speech" else "image"
    world(kind, tmp_path, Own(None, {modality: word}), tokens(word), processor_config)
    with pytest.raises(ValueError, match=rf"(?s)expert.*{package}.*[Ii]nstall it"):
        merge(recipe(tmp_path), tmp_path / "out", progress=False)


def test_media_whose_features_stand_at_other_tokens_are_told_of():
    """InternVL's videos stand at its image's token: they are refused when they come, and the merge says so."""
    processor, config = FIRST_MAKERS["internvl"]()
    vocabulary = merge_vocabulary(make_tokenizer(template=BASE_TEMPLATE), {"eyes": processor}, {"eyes": config})
    build_processor(vocabulary, {"eyes": processor}, BASE_TEMPLATE)
    (warning,) = vocabulary.warnings
    assert "puts video features at other tokens than '<video>'" in warning
    assert "Leave video out (experts.eyes.modality: ['image'])" in warning


class _Renamed(JanusProcessor):
    def __call__(self, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made["patches"] = made.pop("pixel_values")
        return made


def test_tensors_that_no_tower_reads_are_refused():
    own = janus()
    with configured("janus", token_settings("janus", own.processor.tokenizer, own)):
        config = tiny_stock.config("janus")
    processors = {"eyes": own.processor}
    vocabulary = merge_vocabulary(tokens(template=BASE_TEMPLATE), processors, {"eyes": config})
    made = build_processor(vocabulary, processors, BASE_TEMPLATE).experts["eyes"]
    assert check_media(made, own.processor, {}) == []
    made.processor.__class__ = _Renamed
    with pytest.raises(ValueError, match=r"it makes \['patches'\], and a tower reads \['pixel_values'"):
        check_media(made, own.processor, {})
