"""Whether an expert's own processor gives, inside the merged one, what it gives alone.

Enters: the processor as it came, and the one made of it on the merged tokenizer. Leaves: warnings, or ValueError. Each
modality is tried with one small medium in a prompt. Invariant: a processor that writes its prompts in another way than
a placeholder for each medium is refused before anything is merged, and does not fail at the first picture.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from configuration_mmer.routes_mmer import MODALITIES
from modeling_mmer.towers_mmer import MEDIA_INPUTS, has_media
from processing_mmer.encoding_mmer import encode_media
from processing_mmer.expert_processors_mmer import ExpertProcessor
from processing_mmer.media_mmer import ARGUMENTS
from processing_mmer.processor_classes_mmer import OWN_CLASSES

_MARK, _READ, _MOST_MARKS = re.compile(r"<[^<>\s{}%'\"]{1,60}>"), 100_000, 32
_BEFORE, _AFTER = "a dog ", " and a cat"
# frames are not to be sampled once more: that would ask how long they last
_SETTINGS: dict[str, dict[str, Any]] = {"video": {"do_sample_frames": False}}


def check_media(
    own: ExpertProcessor, original: ProcessorMixin, ids: Mapping[int, int], template: str | None = None
) -> list[str]:
    """Warnings. `ids`: tokens of the expert's vocabulary that have another id in the merged one -> that id.
    `template`: its chat template as the merged model has it.

    Raises ValueError where the original does not take a text with a placeholder and its medium, where the merged
    processor writes other tokens for it, and where none of its tensors is one that a tower reads.
    """
    warnings: list[str] = []
    if type(original).__name__ in OWN_CLASSES:
        return warnings  # ours, which are made for this; how much a cloud must hold is theirs to say
    back = {merged: token for token, merged in ids.items()}
    for modality in own.modalities:
        if modality not in _MEDIA:
            continue
        written = own.written(modality)
        merged_id = own.processor.tokenizer.convert_tokens_to_ids(written)
        word = original.tokenizer.convert_ids_to_tokens(back.get(merged_id, merged_id))
        medium = _MEDIA[modality](own)
        refused = f"expert {own.name!r}: its {type(original).__name__} cannot be taken over for {modality} media: "
        advice = _advice(own, modality)
        prompts = [(f"{_BEFORE}{word}{after}", f"{_BEFORE}{written}{after}") for after in (_AFTER, _AFTER.strip())]
        marks = _marks(_template(original), original, word), _marks(template, own.processor, written)
        alike = list(zip(*marks))
        if alike:  # vocabularies are large
            theirs_known, known = original.tokenizer.get_vocab(), own.processor.tokenizer.get_vocab()
            # what is no token of this expert may be one of another
            alike = [pair for pair in alike if (pair[0] in theirs_known) == (pair[1] in known)]
        if alike and len(marks[0]) == len(marks[1]):
            first, second = prompts[0]
            prompts.append((first + "".join(a for a, _ in alike), second + "".join(b for _, b in alike)))
        wanted = [_original(original, own, modality, text, medium, refused, advice) for text, _ in prompts]
        wanted = [[ids.get(token, token) for token in row] for row in wanted]
        if own.placeholders[modality]["id"] not in wanted[0]:
            warnings.append(
                f"expert {own.name!r}: {type(original).__name__} puts {modality} features at other tokens than "
                f"{own.placeholders[modality]['token']!r}: its {modality} media will be refused when they come. "
                + advice
            )
            continue
        tensors, (stand_in,) = encode_media(own, modality, [[medium]], True, dict(_given(modality)))
        for (text, merged_text), theirs in zip(prompts, wanted):
            whole = merged_text.replace(written, stand_in)
            found = own.processor.tokenizer(whole, add_special_tokens=False)["input_ids"]
            if found != theirs:
                place = next((n for n, pair in enumerate(zip(found, theirs)) if pair[0] != pair[1]), 0)
                raise ValueError(
                    f"{refused}for {text!r} it gives {len(theirs)} tokens, from token {place} on "
                    f"{theirs[place : place + 6]}, and what it writes for the medium alone, put into that text, "
                    f"{len(found)} and {found[place : place + 6]}. Expected a processor that replaces a placeholder "
                    f"and nothing else of a prompt. {advice}"
                )
        inputs = {name.partition(".")[2]: value for name, value in tensors.items()}
        if not has_media(modality, inputs):
            raise ValueError(
                f"{refused}it makes {sorted(inputs)}, and a tower reads {list(MEDIA_INPUTS[modality])}. {advice}"
            )
    return warnings


def _template(original: Any) -> str | None:
    found = original.chat_template or getattr(original.tokenizer, "chat_template", None)
    return found.get("default") if isinstance(found, dict) else found


def _marks(template: str | None, processor: Any, word: str) -> list[str]:
    """The words in angle brackets of a chat template, its placeholders left out: a processor may replace one of them
    too. The template is read and not rendered, since it is somebody else's program.
    """
    media = {word, *(getattr(processor, f"{modality}_token", None) for modality in MODALITIES)}
    found = dict.fromkeys(_MARK.findall((template or "")[:_READ]))
    return [mark for mark in found if mark not in media][:_MOST_MARKS]


def _original(
    original: Any, own: ExpertProcessor, modality: str, text: str, medium: Any, refused: str, advice: str
) -> list[int]:
    """The ids of one prompt with one medium, by the processor as it came."""
    given = dict(_given(modality))
    if modality == "audio":
        given["audio_kwargs"] = {"sampling_rate": own.sampling_rate}
    media = [[medium]] if modality == "image" and own.nests_images() else [medium]
    try:
        made = original(
            text=[text],
            return_tensors="pt",
            text_kwargs={"padding": False, "add_special_tokens": False},  # the tokenizers of Vicuna have no such token
            **{ARGUMENTS[modality]: media},
            **given,
        )
    except Exception as error:
        raise ValueError(
            f"{refused}it does not take {text!r} and a medium ({type(error).__name__}: {str(error)[:400]}). Expected "
            f"a processor that replaces a placeholder in a text. {advice}"
        ) from error
    return made["input_ids"][0].tolist()


def _given(modality: str) -> dict[str, Any]:
    inner = _SETTINGS.get(modality)
    return {} if inner is None else {f"{ARGUMENTS[modality]}_kwargs": dict(inner)}


def _advice(own: ExpertProcessor, modality: str) -> str:
    others = [other for other in own.modalities if other != modality]
    if others:
        return f"Leave {modality} out (experts.{own.name}.modality: {others}), or give another expert"
    return f"Give another expert for {modality}, or save this one with a processor that does so"


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def _image() -> Any:
    """Some processors take no arrays (Idefics2). Without Pillow there is no image processor either."""
    from PIL import Image

    return Image.fromarray(_pixels(96, 128, 3))


_MEDIA = {
    "image": lambda own: _image(),
    "video": lambda own: _pixels(8, 96, 128, 3),
    "audio": lambda own: np.random.default_rng(0).uniform(-0.5, 0.5, own.sampling_rate).astype(np.float32),
}
