"""ComposedProcessor: text and media for an expert that transformers has no class for.

Enters: texts in which a placeholder token stands for each medium, and the media. Leaves: token ids, in which each
placeholder has become as many as its medium has features (and what is written around them), and the tensors that the
`Composed` classes take. Invariant: the number of placeholders is the number of features, whatever the medium.
"""

from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from configuration_mmer.routes_mmer import MODALITIES

from .fbank_mmer import FbankFeatureExtractor  # noqa: F401  (its class is found by name)
from .media_mmer import ARGUMENTS, Media, sort_media
from .point_clouds_mmer import PointCloudProcessor  # noqa: F401  (its class is found by name)
from .processor_classes_mmer import class_by_name, own_class
from .video_frames_mmer import LanguageBindVideoProcessor  # noqa: F401  (its class is found by name)

_PARTS = {
    "image": "image_processor",
    "video": "video_processor",
    "audio": "feature_extractor",
    "point_cloud": "point_cloud_processor",
}


@own_class
class ComposedProcessor(ProcessorMixin):
    r"""
    Args:
        tokenizer: the expert's tokenizer; it knows the placeholders and what stands around them.
        parts: modality -> what turns its media into tensors: an image or video processor, a feature extractor, a
            `PointCloudProcessor`, or {"class": name, "settings": {…}} of one.
        features: modality -> {"count": tokens an item makes, "before": text, "after": text}; the texts stand around
            the placeholders and may be left out (PointLLM: <point_start>, <point_end>).
        image_token, video_token, audio_token, point_cloud_token: the placeholder of each modality in `parts`.
        chat_template: Jinja, with one placeholder for each medium.

    Raises:
        ValueError: for a modality that lacks its part, count or placeholder, or an unknown class.
    """

    def __init__(
        self,
        tokenizer=None,
        parts: dict[str, Any] | None = None,
        features: dict[str, dict[str, Any]] | None = None,
        image_token: str | None = None,
        video_token: str | None = None,
        audio_token: str | None = None,
        point_cloud_token: str | None = None,
        chat_template: str | None = None,
        **kwargs,
    ):
        own = {m: getattr(part, "to_dict", None) and part or _part(part) for m, part in (parts or {}).items()}
        tokens = dict(zip(MODALITIES, (image_token, video_token, audio_token, point_cloud_token)))
        self.features = {m: {"before": "", "after": "", **entry} for m, entry in (features or {}).items()}
        strangers = set(own) - set(MODALITIES)
        lacking = [m for m in own if tokens.get(m) is None or "count" not in self.features.get(m, {})]
        if strangers or lacking:
            raise ValueError(
                f"parts: found {sorted(own)}; unknown {sorted(strangers)}, without a token or a count {lacking}"
            )
        for modality, part in own.items():
            setattr(self, _PARTS[modality], part)
            setattr(self, f"{modality}_token", tokens[modality])
        self.modalities = list(own)
        super().__init__(tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        names = list(self.tokenizer.model_input_names)
        return names + [name for m in self.modalities for name in getattr(self, _PARTS[m]).model_input_names]

    def to_dict(self) -> dict[str, Any]:
        parts = {}
        for modality in self.modalities:
            part = getattr(self, _PARTS[modality])
            parts[modality] = {"class": type(part).__name__, "settings": part.to_dict()}
        tokens = {f"{modality}_token": getattr(self, f"{modality}_token") for modality in self.modalities}
        return {"processor_class": type(self).__name__, "parts": parts, "features": self.features, **tokens}

    def __call__(  # type: ignore[override]
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        point_clouds=None,
        sampling_rate: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Texts with one placeholder for each medium, and all media in that order, or one list of them per text.

        Text settings (padding, truncation, return_tensors, …) are taken flat or in text_kwargs, settings of a part in
        images_kwargs, videos_kwargs, audio_kwargs. Raises ValueError where placeholders and media differ in number: in
        all, or in one text where media are given per text.
        """
        given = {"image": images, "video": videos, "audio": audio, "point_cloud": point_clouds}
        words = {**kwargs.pop("text_kwargs", {})}
        settings = {name: kwargs.pop(f"{argument}_kwargs", {}) for name, argument in ARGUMENTS.items()}
        words.update(kwargs)
        tensor_type = words.pop("return_tensors", None)
        texts = [text] if isinstance(text, str) else list(text or [])
        made: dict[str, Any] = {}
        for modality, media in given.items():
            none = media is None or (isinstance(media, (list, tuple)) and not media)
            own = Media([]) if none else sort_media(modality, media, len(texts) if texts else None)
            token = getattr(self, f"{modality}_token", None)
            if own.items and modality not in self.modalities:
                raise ValueError(f"{ARGUMENTS[modality]}: this expert takes {self.modalities}")
            if texts and token is not None:
                _check_counts(texts, token, modality, own)
                texts = [one.replace(token, self.written_out(modality)) for one in texts]
            if own.items:
                rate = {"sampling_rate": sampling_rate} if modality == "audio" and sampling_rate else {}
                part = getattr(self, _PARTS[modality])
                made.update(part(own.items, return_tensors=tensor_type, **{**rate, **settings[modality]}))
        made.pop("video_metadata", None)
        encoded = dict(self.tokenizer(texts, return_tensors=tensor_type, **words)) if texts else {}
        return BatchFeature({**encoded, **made})

    def written_out(self, modality: str) -> str:
        """What one medium becomes in the text: its placeholders, and what stands around them."""
        entry = self.features[modality]
        return f"{entry['before']}{getattr(self, f'{modality}_token') * entry['count']}{entry['after']}"


def _part(values: Any) -> Any:
    if not isinstance(values, dict) or set(values) != {"class", "settings"}:
        raise ValueError(f"parts: found {type(values).__name__}, expected a processor or its class and settings")
    kind: Any = class_by_name(values["class"])
    return kind.from_dict(values["settings"])


def _check_counts(texts: list[str], token: str, modality: str, given: Media):
    placed = [one.count(token) for one in texts]
    if given.counts is not None and placed != given.counts:
        sample = next(i for i, (found, wanted) in enumerate(zip(placed, given.counts)) if found != wanted)
        raise ValueError(
            f"text {sample}: {placed[sample]} {token} in it, but {given.counts[sample]} in {ARGUMENTS[modality]}"
        )
    if sum(placed) != len(given.items):
        raise ValueError(f"{sum(placed)} {token} in the text, but {len(given.items)} in {ARGUMENTS[modality]}")


__all__ = ["ComposedProcessor"]
