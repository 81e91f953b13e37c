"""Encoders that a checkpoint does not hold but only names: where they are, and what they are.

Enters: what the checkpoint's config.json says, often a path on its authors' machines, and what the recipe says.
Leaves: `Encoder`: settings for the class that runs it, its weights with their new names, and what makes its tensors.
Invariants: the recipe goes before the checkpoint; a name that leads nowhere is refused, with the field that mends it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import PreTrainedConfig, ProcessorMixin

from configuration_mmer.composed_config_mmer import ComposedConfig
from modeling_mmer.beats_mmer import DEFAULTS as BEATS_DEFAULTS
from modeling_mmer.language_bind_mmer import DEFAULTS as BIND_DEFAULTS
from modeling_mmer.language_bind_mmer import FRAMES
from processing_mmer.composed_processor_mmer import ComposedProcessor
from processing_mmer.processor_classes_mmer import class_by_name

from .checkpoints import MODEL_FILES, Checkpoint, fetch
from .hub_access import from_hub
from .layout_parts import BUFFERS, PLACEHOLDERS, Order, Seen, load_tokenizer, vicuna_template
from .pretrained import CONFIG, check_numbers, naming, read_json
from .renaming import Part, Rule, leave_out, rename

# the last part of the paths that authors' configs have -> where it is on the Hub (a repository, or a file in one)
KNOWN_ENCODERS = {
    "clip-vit-large-patch14": "openai/clip-vit-large-patch14",
    "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    "LanguageBind_Image": "LanguageBind/LanguageBind_Image",
    "LanguageBind_Video_merge": "LanguageBind/LanguageBind_Video_merge",
    "point_bert_v1.2.pt": "RunsenXu/PointLLM_7B_v1.1_init/point_bert_v1.2.pt",
}
_FILES = (".pt", ".pth", ".bin", ".safetensors")

# what a CLIP checkpoint holds beside its vision transformer
_CLIP_REST = (
    *BUFFERS,
    leave_out(
        r"text_model\..+|text_projection\..+|visual_projection\..+|logit_scale", "for contrastive training alone"
    ),
)
# Point-BERT as ULIP-2 saved it lies below this name, beside the parts of ULIP-2
_ULIP = r"module\.point_encoder\."


@dataclass
class Encoder:
    """settings: of `ComposedConfig.encoders`. part: its weights, None where the checkpoint itself has them. processor:
    what makes its tensors. tokens: features of one item, None where its connector settles that."""

    settings: dict[str, Any]
    width: int
    tokens: int | None
    processor: Any
    part: Part | None = None
    inputs: list[Path] = field(default_factory=list)


def find_encoder(order: Order, modality: str, found: str | None, said_by: str) -> Path:
    """The folder or file of an encoder. found: what the checkpoint says, in its config's field `said_by`.

    Raises ValueError where neither leads anywhere.
    """
    given = order.encoder(modality)
    if given is not None:
        return fetch_encoder(given, f"{order.where}.encoder")
    if found and (Path(found).is_dir() or Path(found).is_file()):
        return Path(found)
    known = KNOWN_ENCODERS.get(Path(found).name) if found else None
    if known is not None:
        return fetch_encoder(known, f"{order.where}.encoder")
    raise ValueError(
        f"{order.where}.encoder: the checkpoint does not hold its {modality} encoder; config.json says {said_by} "
        f"{found!r}, which is no path here and no encoder that is known ({', '.join(sorted(KNOWN_ENCODERS))}). Set "
        f"encoder: to its Hub id, folder or file (or encoder: {{{modality}: …}})"
    )


def fetch_encoder(source: str, where: str) -> Path:
    """A folder or file here or on the Hub (org/name, org/name/file). Raises ValueError that names `where`."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    parts = source.split("/")
    if not source.startswith((".", "/", "~")) and len(parts) > 2 and source.endswith(_FILES):
        return from_hub(source, lambda: Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]))))
    try:
        return fetch(source)
    except ValueError as error:
        raise ValueError(f"{where}: {error}. A file on the Hub is org/name/file") from error


def _open(path: Path, inside: tuple[str, ...] = ()) -> Checkpoint:
    """The weights of a folder, of a file, or of the only weight file of a folder."""
    if path.is_file():
        return Checkpoint(path.parent, (path.name,), inside)
    if not any((path / name).is_file() for name in MODEL_FILES):
        own = sorted(file.name for file in path.iterdir() if file.suffix in _FILES)
        if len(own) == 1:
            return Checkpoint(path, (own[0],), inside)
    return Checkpoint(path)


def _config(path: Path, where: str) -> dict[str, Any]:
    """The settings of a CLIP-like vision transformer, from a folder's config.json."""
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"{where}: {path} holds no config.json; expected the folder or Hub id of a CLIP-like encoder")
    values = read_json(file)
    check_numbers(file, values)
    own = values.get("vision_config", values)
    if not isinstance(own, dict) or not {"image_size", "patch_size", "hidden_size"} & set(own):
        raise ValueError(f"{file}: no vision_config, found {sorted(values)}; expected a CLIP-like encoder's")
    return own


def _clip_settings(own: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What CLIPVisionConfig takes of `own`; a config that was saved by old code has every setting of every model."""
    wanted = (*defaults, "num_channels", "attention_dropout", "projection_dim")
    return {**defaults, **{key: own[key] for key in wanted if key in own}}


# those of CLIPVisionConfig, which a config.json may leave out
_CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def clip_vision(path: Path, modality: str, where: str, layer: int, class_token: bool, pad: bool, own: bool) -> Encoder:
    """CLIP or LanguageBind_Image. pad: pictures are filled up to a square first (image_aspect_ratio: pad). own: the
    checkpoint holds the weights itself."""
    config = _clip_settings(_config(path, where), _CLIP_DEFAULTS)
    with naming(path / CONFIG):
        tokens = (config["image_size"] // config["patch_size"]) ** 2 + int(class_token)
    settings = {"kind": "clip_vision", "config": config, "layer": layer, "class_token": class_token}
    rules = (*_CLIP_REST, rename(r"vision_model\.(.+)", rf"model.encoders.{modality}.vision.\1"))
    part = None if own else Part(_open(path), rules)
    picture, read = _picture_processor(path, config["image_size"], pad)
    return Encoder(settings, config["hidden_size"], tokens, picture, part, [path / CONFIG, *read])


def _picture_processor(path: Path, size: int, pad: bool) -> tuple[Any, list[Path]]:
    """(CLIP's image processor, the files that it comes from)."""
    file = path / "preprocessor_config.json"
    settings: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if file.is_file():
        read = read_json(file)
        names = (
            "size",
            "crop_size",
            "do_center_crop",
            "do_normalize",
            "do_resize",
            "image_mean",
            "image_std",
            "resample",
        )
        settings.update({key: read[key] for key in names if key in read})
    if isinstance(settings["size"], int):  # as files of 2021 have it
        settings["size"] = {"shortest_edge": settings["size"]}
    if isinstance(settings["crop_size"], int):
        settings["crop_size"] = {"height": settings["crop_size"], "width": settings["crop_size"]}
    kind: Any = class_by_name("LlavaImageProcessor" if pad else "CLIPImageProcessor")
    with naming(file):
        return kind(**settings, **({"do_pad": True} if pad else {})), [file] if file.is_file() else []


def language_bind_video(path: Path, where: str, layer: int, own: bool) -> Encoder:
    """LanguageBind_Video_merge: every frame keeps its class token."""
    values = _config(path, where)
    config = _clip_settings(values, BIND_DEFAULTS)
    config.update({key: values[key] for key in ("num_frames", "add_time_attn") if key in values})
    settings = {"kind": "language_bind_video", "config": config, "layer": layer, "class_token": True}
    frames, size = config.get("num_frames", FRAMES), config["image_size"]
    with naming(path / CONFIG):
        tokens = frames * ((size // config["patch_size"]) ** 2 + 1)
    kind: Any = class_by_name("LanguageBindVideoProcessor")
    rules = (*_CLIP_REST, rename(r"vision_model\.(.+)", r"model.encoders.video.vision.\1"))
    part = None if own else Part(_open(path), rules)
    clips = kind(num_frames=frames, size=size)
    return Encoder(settings, config["hidden_size"], tokens, clips, part, [path / CONFIG])


def beats(path: Path) -> Encoder:
    """A BEATs file as its authors publish it: {"cfg": settings, "model": weights}."""
    checkpoint = _open(path, ("model",))
    config = checkpoint.beside.get("cfg", {})
    settings = {key: value for key, value in config.items() if key in BEATS_DEFAULTS}
    bias = r"encoder\.layers\.(\d+)\.self_attn\.relative_attention_bias\.weight"
    repeated = rf"(?!encoder\.layers\.0\.){bias}"
    _check_repeated(checkpoint, bias)
    rules = (
        leave_out(r"predictor\..+", "the classifier of a fine-tuned checkpoint"),
        leave_out(repeated, "the distance bias of the first layer once more"),
        rename(r"((?:patch_embedding|layer_norm|post_extract_proj|encoder)\..+)", r"model.encoders.audio.\1"),
    )
    own = {**BEATS_DEFAULTS, **settings}
    kind: Any = class_by_name("FbankFeatureExtractor")
    # sounds are filled up with zeros that are heard, as in training
    sounds = kind(num_mel_bins=own["mel_bins"], hear_padding=True)
    return Encoder({"kind": "beats", **settings}, own["encoder_embed_dim"], None, sounds, Part(checkpoint, rules))


def _check_repeated(checkpoint: Checkpoint, pattern: str):
    rule = Part(checkpoint, (rename(pattern, r"\1"),))
    names = sorted((int(rule.places(key)[0][0]), key) for key in checkpoint.keys() if rule.places(key)[1])
    for _, name in names[1:]:
        if not torch.equal(checkpoint.tensor(name), checkpoint.tensor(names[0][1])):
            raise ValueError(
                f"{checkpoint.files[0]}: {name} is not equal to {names[0][1]}; all layers of BEATs share one distance "
                "bias"
            )


def point_bert_shapes(checkpoint: Checkpoint, prefix: str) -> dict[str, int]:
    """The sizes of a Point-BERT that its tensors tell: point_dims, group_width, width and depth."""

    def shape(name: str) -> tuple[int, ...]:
        if f"{prefix}{name}" not in keys:
            raise ValueError(f"{checkpoint.folder}: no tensor {prefix}{name}; expected a Point-BERT's")
        return checkpoint.shape(f"{prefix}{name}")

    keys = set(checkpoint.keys())
    blocks = {key.removeprefix(f"{prefix}blocks.blocks.").split(".")[0] for key in keys if f"{prefix}blocks." in key}
    return {
        "point_dims": shape("encoder.first_conv.0.weight")[1],
        "group_width": shape("reduce_dim.weight")[1],
        "width": shape("reduce_dim.weight")[0],
        "depth": len(blocks),
    }


def point_bert(path: Path, sizes: dict[str, int], normalise: bool) -> Encoder:
    """A Point-BERT of its own file. sizes: what the tensors do not tell: groups, group_size, heads."""
    checkpoint = _open(path, ("state_dict", "model"))
    below = any(key.startswith("module.point_encoder.") for key in checkpoint.keys())
    rules: tuple[Rule, ...] = (rename(rf"{_ULIP if below else ''}(.+)", r"model.encoders.point_cloud.\1"),)
    if below:
        rules += (leave_out(r"module\..+", "a part of ULIP-2 beside its point encoder"),)
    settings = {**point_bert_shapes(checkpoint, "module.point_encoder." if below else ""), **sizes}
    return point_bert_encoder(settings, normalise, Part(checkpoint, rules))


def point_bert_encoder(settings: dict[str, int], normalise: bool, part: Part | None = None) -> Encoder:
    kind: Any = class_by_name("PointCloudProcessor")
    clouds = kind(dims=settings["point_dims"], normalise=normalise)
    own = {"kind": "point_bert", **settings}
    return Encoder(own, settings["width"], settings["groups"] + 1, clouds, part)


@dataclass
class Sense:
    """One modality of a composed expert. connector, soft: as in `ComposedConfig`. token: its placeholder. around: the
    tokens before and after its features."""

    encoder: Encoder
    connector: dict[str, Any]
    soft: dict[str, int] | None = None
    token: str = ""
    around: tuple[str, str] = ("", "")

    @property
    def count(self) -> int:
        own = self.connector["queries"] if self.connector.get("kind") == "qformer" else self.encoder.tokens
        return int(own or 0) + sum((self.soft or {}).values())


def composed(
    seen: Seen, order: Order, text_config: PreTrainedConfig, senses: dict[str, Sense]
) -> tuple[ComposedConfig, Callable[[], ProcessorMixin]]:
    """The config of an expert put together of `senses`, and what makes its processor."""
    tokens = {modality: sense.token or PLACEHOLDERS[modality] for modality, sense in senses.items()}
    around = [text for sense in senses.values() for text in sense.around if text]
    tokenizer = load_tokenizer(seen, order, text_config, list(tokens.values()), around)
    ids: dict[str, Any] = {f"{modality}_token_id": tokenizer.get_vocab()[token] for modality, token in tokens.items()}
    with naming(seen.folder / CONFIG, seen.weight_files):
        config = ComposedConfig(
            text_config=text_config,
            encoders={modality: sense.encoder.settings for modality, sense in senses.items()},
            connectors={modality: sense.connector for modality, sense in senses.items()},
            soft_tokens={modality: sense.soft for modality, sense in senses.items() if sense.soft is not None},
            **ids,
        )

    def processor() -> ProcessorMixin:
        return ComposedProcessor(
            tokenizer,
            {modality: sense.encoder.processor for modality, sense in senses.items()},
            {
                modality: {"count": sense.count, "before": sense.around[0], "after": sense.around[1]}
                for modality, sense in senses.items()
            },
            chat_template=vicuna_template(tokens),
            **{f"{modality}_token": token for modality, token in tokens.items()},
        )

    return config, processor
