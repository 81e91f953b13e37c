"""The media of a batch to tensors: each medium goes to the expert at whose placeholder it stands.

Enters: placeholders found in the texts, the media in their order, and settings. Leaves: the experts' tensors, keyed
"<expert>.<name>", each expert's media in the order of its placeholders; the placeholders know what takes their place.
"""

import itertools
import os
from typing import Any

import numpy as np
import torch
from transformers.processing_utils import TextKwargs

from configuration_mmer.routes_mmer import MODALITIES

from .expert_processors_mmer import ExpertProcessor
from .media_mmer import ARGUMENTS, Media, read_audio, read_image, read_video
from .point_clouds_mmer import read_point_cloud
from .tokens_mmer import Spot

_OURS = ("return_mm_token_type_ids", "return_text_replacement_offsets", "common_kwargs", "text_kwargs")
_TEXT_ONLY = ("return_mm_token_type_ids", "return_text_replacement_offsets")


def sort_settings(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings of the tokenizer, settings of the experts' processors) from one call's keyword arguments."""
    words, settings = dict(kwargs.get("text_kwargs") or {}), {}
    for name, value in {**(kwargs.get("common_kwargs") or {}), **kwargs}.items():
        if name in _OURS:
            continue
        if name in TextKwargs.__annotations__ or name == "sanitize_control_tokens":
            words[name] = value
        else:
            settings[name] = value
    return {name: value for name, value in words.items() if name not in _TEXT_ONLY}, settings


def encode_spots(
    experts: dict[str, ExpertProcessor],
    spots: list[Spot],
    media: dict[str, Media],
    samples: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The experts' tensors; fills each spot's `stand_in`. Raises ValueError where placeholders and media differ."""
    tensors: dict[str, Any] = {}
    for modality in MODALITIES:
        here = [spot for spot in spots if spot.modality == modality]
        given = media.get(modality, Media([]))
        _check_counts(experts, modality, here, given, samples)
        for name, own in experts.items():
            pairs = [(spot, item) for spot, item in zip(here, given.items) if spot.expert == name]
            if not pairs:
                continue
            groups = [[item for spot, item in pairs if spot.sample == sample] for sample in range(samples)]
            made, stand_ins = encode_media(own, modality, groups, given.counts is not None, settings)
            clash = set(made) & set(tensors)
            if clash:
                raise ValueError(
                    f"expert {name!r} gives {sorted(clash)} for {modality} media and for another kind too"
                )
            tensors.update(made)
            for (spot, _), stand_in in zip(pairs, stand_ins):
                spot.stand_in = stand_in
    return tensors


def _check_counts(experts: dict[str, ExpertProcessor], modality: str, spots: list[Spot], given: Media, samples: int):
    tokens = " ".join(own.written(modality) for own in experts.values() if modality in own.placeholders)
    if given.counts is not None:
        for sample, wanted in enumerate(given.counts):
            found = sum(spot.sample == sample for spot in spots)
            if found != wanted:
                raise ValueError(
                    f"sample {sample}: {found} {modality} placeholders ({tokens}) in the text, but {wanted} media in "
                    f"{ARGUMENTS[modality]}: each medium needs its placeholder, each placeholder its medium"
                )
    if len(spots) != len(given.items):
        raise ValueError(
            f"{len(spots)} {modality} placeholders ({tokens}) in the text, but {len(given.items)} media in "
            f"{ARGUMENTS[modality]}: each medium needs its placeholder, each placeholder its medium"
        )


def encode_media(
    own: ExpertProcessor,
    modality: str,
    groups: list[list[Any]],
    nested: bool,
    settings: dict[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """(tensors keyed "<expert>.<name>", stand-ins) of one expert's media, which are read first. `groups`: per
    sample.
    """
    runs = _runs(groups) if modality == "video" else []
    if len(runs) < 2:
        made, stand_ins = _encode_alike(own, modality, groups, nested, settings)
    else:
        if "video_metadata" in {**settings, **settings.get("videos_kwargs", {})}:
            raise ValueError(
                "video_metadata: cannot be given for files and frames together; pass each in its own call"
            )
        parts = [_encode_alike(own, modality, [run], nested, settings) for run in runs]
        made = _joined(own, [tensors for tensors, _ in parts])
        stand_ins = [stand_in for _, of_run in parts for stand_in in of_run]
    return {f"{own.name}.{name}": value for name, value in made.items()}, stand_ins


def _runs(groups: list[list[Any]]) -> list[list[Any]]:
    """Videos in their order, cut where files follow frames or frames files.

    Whether frames are still to be sampled is one setting of a call of the expert's processor, and files come sampled:
    each kind in a call of its own is treated as it would be alone.
    """
    items = [item for group in groups for item in group]
    return [list(run) for _, run in itertools.groupby(items, _is_file)]


def _is_file(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike))


def _joined(own: ExpertProcessor, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The tensors of several calls as one call gives them: the media lie behind one another along the first axis."""
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values: list[Any] = [part.get(name) for part in parts]
        shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else () for value in values]
        if not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(
                f"expert {own.name!r}: {name} has the shapes {shapes} for video files and frames, expected tensors "
                "equal behind the first axis: ask for one num_frames, or pass files and frames in calls of their own"
            )
        joined[name] = torch.cat(values)
    return joined


def _encode_alike(
    own: ExpertProcessor,
    modality: str,
    groups: list[list[Any]],
    nested: bool,
    settings: dict[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """(tensors, stand-ins) of media that are read in one way."""
    argument = ARGUMENTS[modality]
    inner = {**settings.get(f"{argument}_kwargs", {})}
    others = {f"{name}_kwargs" for name in ARGUMENTS.values()}
    given = {name: value for name, value in settings.items() if name not in others}
    read = {"image": _read_images, "video": _read_videos, "audio": _read_sounds, "point_cloud": _read_clouds}[modality]
    groups = read(own, groups, given, inner)
    if inner:
        given[f"{argument}_kwargs"] = inner
    return own.encode(modality, groups, nested, given)


def _read_images(own: ExpertProcessor, groups: list[list[Any]], given: dict[str, Any], inner: dict[str, Any]):
    return [[read_image(item) for item in group] for group in groups]


def _read_clouds(own: ExpertProcessor, groups: list[list[Any]], given: dict[str, Any], inner: dict[str, Any]):
    return [[read_point_cloud(item) for item in group] for group in groups]


def _read_sounds(own: ExpertProcessor, groups: list[list[Any]], given: dict[str, Any], inner: dict[str, Any]):
    """Waveforms at the expert's rate. `sampling_rate` is that of arrays, and the expert is told its own."""
    asked = given.pop("sampling_rate", None)
    asked = inner.pop("sampling_rate", asked)
    inner["sampling_rate"] = own.sampling_rate
    read = [[read_audio(item, own.sampling_rate, asked) for item in group] for group in groups]
    if not inner.get("truncation") and "max_length" not in inner:
        for sources, waves in zip(groups, read):
            for source, wave in zip(sources, waves):
                _check_length(own, source, wave, {**given, "audio_kwargs": inner})
    return read


def _check_length(own: ExpertProcessor, source: Any, wave: np.ndarray, settings: dict[str, Any]):
    """Raises ValueError for a sound of which the expert's processor would leave the end out.

    Many feature extractors cut at a length of their own and say nothing. Whether one does is seen from what it makes:
    of those with such a length, some cut only when asked to, others give a long sound more features.
    """
    limit = own.audio_limit
    # less than one step of the extractor makes no feature of its own
    if limit is None or len(wave) - limit < getattr(own.feature_extractor, "hop_length", 1):
        return
    whole, start = (own.encode("audio", [[part]], True, settings)[0] for part in (wave, wave[:limit]))
    if set(whole) == set(start) and all(_equal(whole[name], start[name]) for name in whole):
        name = str(source) if isinstance(source, (str, os.PathLike)) else "audio array"
        raise ValueError(
            f"{name}: found {len(wave) / own.sampling_rate:.2f} seconds, but expert {own.name!r} hears "
            f"{limit / own.sampling_rate:.2f} and would leave the rest out: cut the sound into pieces of that length, "
            'or pass audio_kwargs={"truncation": True} to have only its start heard'
        )


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else np.array_equal(one, other)


def _read_videos(own: ExpertProcessor, groups: list[list[Any]], given: dict[str, Any], inner: dict[str, Any]):
    """Frames, of files alone or of frames alone. `num_frames` or `fps` are ours to honour; a file falls back on what
    the expert's own processor says.

    Whether the last frame is among them is the expert's (see `uniform_frames`).
    """
    count, fps = (inner.pop(name, given.pop(name, None)) for name in ("num_frames", "fps"))
    own_video = getattr(own.processor, "video_processor", None)
    include_last = getattr(own_video, "include_last", False)
    are_files = any(_is_file(item) for group in groups for item in group)
    sampled = are_files or count is not None
    if are_files and count is None and fps is None:
        count, fps = (getattr(own_video, name, None) for name in ("num_frames", "fps"))
    read = [[read_video(item, count, fps, include_last) for item in group] for group in groups]
    metadata = [known for group in read for _, known in group]
    if sampled and "do_sample_frames" not in given:
        inner.setdefault("do_sample_frames", False)
    if all(known is not None for known in metadata) and "video_metadata" not in given:
        inner.setdefault("video_metadata", metadata)
    return [[frames for frames, _ in group] for group in read]


def as_tensors(values: dict[str, Any], tensor_type: str | None) -> dict[str, Any]:
    """Media tensors as the caller wants them: torch ("pt" or None), or numpy arrays ("np")."""
    if tensor_type in (None, "pt"):
        return values
    if tensor_type != "np":
        raise ValueError(f"return_tensors: found {tensor_type!r}, expected 'pt', 'np' or None")
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def as_rows(columns: dict[str, list[Any]], tensor_type: str | None) -> dict[str, Any]:
    """Rows of equal length as int64 tensors (batch, sequence); lists where tensor_type is None."""
    if tensor_type is None:
        return columns
    lengths = sorted({len(row) for row in columns["input_ids"]})
    if len(lengths) > 1:
        raise ValueError(f"rows of {lengths} tokens make no tensor: pass padding=True, or return_tensors=None")
    rows = {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}
    return {name: np.asarray(value) for name, value in rows.items()} if tensor_type == "np" else rows
