"""Checkpoints as other code wrote them: tiny sizes, the exact names, shapes' order, dtypes and files of each layout.

Each writer first builds the expert as a class of today, with numbers that half precision holds exactly, and then saves
it under the original names. It gives that model back, which is what a reader must find.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig

from configuration_mmer.composed_config_mmer import ComposedConfig
from modeling_mmer.composed_mmer import ComposedForConditionalGeneration

from . import tiny_checkpoints as tiny
from . import tiny_several as several

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {"image_size": 16, "patch_size": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP = {**SIZES, **PICTURE}
BIND = {**CLIP, "hidden_act": "gelu", "num_frames": 2, "add_time_attn": True}
POINTS = {"point_dims": 6, "groups": 4, "group_size": 3, "group_width": 12, "width": 24, "depth": 2, "heads": 6}
BEATS = {
    "mel_bins": 16, "input_patch_size": 16, "embed_dim": 12, "conv_bias": False, "encoder_layers": 3,
    "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 2, "conv_pos": 8,
    "conv_pos_groups": 2, "num_buckets": 8, "max_distance": 16,
}  # fmt: skip
QFORMER = {"queries": 4, "layers": 2, "hidden_size": 24, "intermediate_size": 20, "positions": 128}
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor.clone()


@torch.no_grad()
def round_to_half(model: nn.Module) -> nn.Module:
    """Random numbers everywhere, also where a class starts with zeros and ones, all of them half precision's."""
    generator = torch.Generator().manual_seed(11)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if "language_model" not in name and "lm_head" not in name:
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
        tensor.copy_(half(tensor).float())
    return model.eval()


def base_on_disk(folder: Path) -> nn.Module:
    return several.save_base(folder, max_position_embeddings=1024)


@torch.no_grad()
def tuned(model: Any, base: Any, noise: float = 0.02, seed: int = 3) -> Any:
    """`model` with the base's LLM plus noise, in numbers of half precision."""
    torch.manual_seed(seed)
    own = {**tiny.llm_of(model).state_dict(), "lm_head.weight": model.get_output_embeddings().weight}
    for name, theta_0 in {**tiny.llm_of(base).state_dict(), "lm_head.weight": base.lm_head.weight}.items():
        own[name][: len(theta_0)] = theta_0 + noise * torch.randn_like(theta_0)
    return round_to_half(model)


def language_config(rows: int = tiny.ROWS, **more: Any) -> dict[str, Any]:
    """A Vicuna's config.json as transformers 4.31 wrote it, with what multimodal code adds."""
    sizes = {key: value for key, value in tiny.SIZES.items() if key != "initializer_range"}
    return {
        "_name_or_path": "/authors/cluster/vicuna-7b-v1.5", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "initializer_range": 0.02, "pretraining_tp": 1, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
        **sizes, "vocab_size": rows, "max_position_embeddings": 1024, **more,
    }  # fmt: skip


def text_config(rows: int = tiny.ROWS) -> LlamaConfig:
    return LlamaConfig(**{**tiny.SIZES, "vocab_size": rows, "max_position_embeddings": 1024})


def llm_tensors(model: Any) -> dict[str, torch.Tensor]:
    """LlamaForCausalLM's names, with the buffer that transformers 4.31 saved."""
    found = {f"model.{name}": half(tensor) for name, tensor in tiny.llm_of(model).state_dict().items()}
    found["lm_head.weight"] = half(model.get_output_embeddings().weight)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return found


def below(model: nn.Module, place: str, saved: str) -> dict[str, torch.Tensor]:
    """The tensors below `place` of a model, under the prefix `saved`."""
    own = model.get_submodule(place).state_dict()
    return {f"{saved}{name}": half(tensor) for name, tensor in own.items()}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 2):
    """pytorch_model-0000x-of-0000n.bin, their index and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names, where = sorted(tensors), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = names[shard::shards]
        torch.save({name: tensors[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


# encoders


def write_clip(folder: Path, vision: nn.Module, config: dict[str, Any], kind: str = "clip"):
    """The whole CLIP around a vision transformer: text model, projections, positions; config with vision_config."""
    torch.manual_seed(7)
    sizes = {"vocab_size": 30, "max_position_embeddings": 8, **SIZES}
    whole = CLIPModel(CLIPConfig(text_config=sizes, vision_config=config, projection_dim=8)).state_dict()
    tensors = {name: half(tensor) for name, tensor in whole.items() if not name.startswith("vision_model.")}
    tensors |= {f"vision_model.{name}": half(tensor) for name, tensor in vision.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": config, "projection_dim": 8}))
    picture = {"crop_size": 16, "size": 16, "do_center_crop": True, "do_normalize": True, "do_resize": True,
               "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3,
               "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.3, 0.2]}  # fmt: skip
    if kind == "clip":
        (folder / "preprocessor_config.json").write_text(json.dumps(picture))


def write_bind_video(folder: Path, encoder: nn.Module):
    write_clip(folder, encoder.vision, {key: BIND[key] for key in BIND}, "LanguageBindVideo")


def write_beats(file: Path, encoder: nn.Module):
    """{"cfg", "model"}, the distance bias repeated for each layer as a shared module is saved."""
    tensors = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    bias = tensors["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    for layer in range(1, BEATS["encoder_layers"]):
        tensors[f"encoder.layers.{layer}.self_attn.relative_attention_bias.weight"] = bias
    cfg = {**BEATS, "activation_fn": "gelu", "layer_norm_first": False, "deep_norm": True, "gru_rel_pos": True,
           "relative_position_embedding": True, "dropout": 0.0, "finetuned_model": False}  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"cfg": cfg, "model": tensors}, file)


def write_point_bert(file: Path, encoder: nn.Module, ulip: bool = False):
    """A flat state dict, as ModelCompose loads it, or ULIP-2's with its other parts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    if ulip:
        tensors = {f"module.point_encoder.{name}": tensor for name, tensor in tensors.items()}
        tensors["module.logit_scale"] = torch.ones(())
    torch.save({"state_dict": tensors, "epoch": 3} if ulip else tensors, file)


# the layouts


def composed(
    encoders: dict[str, Any], connectors: dict[str, Any], soft: dict[str, Any], rows: int, **ids: int
) -> ComposedForConditionalGeneration:
    torch.manual_seed(5)
    return ComposedForConditionalGeneration(
        ComposedConfig(
            text_config=text_config(rows), encoders=encoders, connectors=connectors, soft_tokens=soft, **ids
        )
    )


def write_llava(
    folder: Path, base: Any, encoder: Path, tower_inside: bool = False, projector: str = "mlp2x_gelu", **more
):
    """liuhaotian/llava-v1.5: whole shards, the projector once more in mm_projector.bin, CLIP elsewhere."""
    linear = projector == "linear"
    if linear:
        settings = {"kind": "clip_vision", "config": CLIP, "layer": -2, "class_token": False}
        model = composed({"image": settings}, {"image": {"widths": [16, 32]}}, {}, tiny.ROWS, image_token_id=tiny.ROWS)
        place, mapping = "model.encoders.image.vision", {"model.connectors.image.0": "model.mm_projector"}
    else:
        model = tiny.expert_model("llava", base, extra_rows=0)
        place = "model.vision_tower"
        mapping = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
        mapping = {f"model.multi_modal_projector.{name}": saved for name, saved in mapping.items()}
    tuned(model, base)
    tensors = llm_tensors(model)
    own = {name: t for there, saved in mapping.items() for name, t in below(model, there, f"{saved}.").items()}
    tensors |= own
    if tower_inside:
        tensors |= below(model, place, "model.vision_tower.vision_tower.vision_model.")
        tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    write_clip(encoder, model.get_submodule(place), CLIP)
    config = language_config(
        architectures=["LlavaLlamaForCausalLM"], model_type="llava", freeze_mm_mlp_adapter=False,
        image_aspect_ratio="pad", mm_hidden_size=16, mm_projector_type=projector, mm_use_im_patch_token=False,
        mm_use_im_start_end=False, mm_vision_select_feature="patch", mm_vision_select_layer=-2,
        mm_vision_tower="openai/clip-vit-large-patch14-336", tune_mm_mlp_adapter=False, use_mm_proj=True, **more,
    )  # fmt: skip
    write_shards(folder, tensors, config)
    torch.save(own, folder / "mm_projector.bin")
    several.tokenizer().save_pretrained(folder)
    return model


def write_point_llm(folder: Path, base: Any, hidden: tuple[int, ...] = (20, 28)):
    """RunsenXu/PointLLM_7B_v1.2: backbone and projector in the shards, three tokens behind the vocabulary."""
    widths = [POINTS["width"], *hidden, 32]
    model = composed(
        {"point_cloud": {"kind": "point_bert", **POINTS}}, {"point_cloud": {"widths": widths}}, {}, tiny.ROWS + 3,
        point_cloud_token_id=tiny.ROWS,
    )  # fmt: skip
    tuned(model, base)
    single = len(hidden) == 0
    tensors = llm_tensors(model) | below(model, "model.encoders.point_cloud", "model.point_backbone.")
    tensors |= below(model, "model.connectors.point_cloud" + (".0" if single else ""), "model.point_proj.")
    config = language_config(
        tiny.ROWS + 3, architectures=["PointLLMLlamaForCausalLM"], model_type="pointllm", point_backbone="PointBERT",
        point_backbone_ckpt="", point_backbone_config_name="PointTransformer_tiny", use_color=True,
        mm_use_point_start_end=True, DEFAULT_POINT_PATCH_TOKEN="<point_patch>",
        DEFAULT_POINT_START_TOKEN="<point_start>", DEFAULT_POINT_END_TOKEN="<point_end>",
    )  # fmt: skip
    write_shards(folder, tensors, config)
    several.tokenizer("<point_patch>", "<point_start>", "<point_end>").save_pretrained(folder)
    return model


def write_video_llava(folder: Path, base: Any, encoders: Path, towers_inside: bool = True):
    """LanguageBind/Video-LLaVA-7B: both towers in the shards, one projector for both."""
    picture = {"kind": "clip_vision", "config": {**CLIP, "hidden_act": "gelu"}, "layer": -2, "class_token": False}
    clip = {"kind": "language_bind_video", "config": BIND, "layer": -2, "class_token": True}
    widths = {"widths": [16, 32, 32]}
    model = composed(
        {"image": picture, "video": clip}, {"image": widths, "video": widths}, {}, tiny.ROWS,
        image_token_id=tiny.ROWS, video_token_id=tiny.ROWS + 1,
    )  # fmt: skip
    tuned(model, base)
    model.model.connectors["video"].load_state_dict(model.model.connectors["image"].state_dict())
    tensors = llm_tensors(model) | below(model, "model.connectors.image", "model.mm_projector.")
    if towers_inside:
        tensors |= below(model, "model.encoders.image.vision", "model.image_tower.image_tower.")
        tensors |= below(model, "model.encoders.video.vision", "model.video_tower.video_tower.")
    write_clip(
        encoders / "LanguageBind_Image", model.model.encoders["image"].vision, picture["config"], "LanguageBindImage"
    )
    write_bind_video(encoders / "LanguageBind_Video_merge", model.model.encoders["video"])
    config = language_config(
        architectures=["LlavaLlamaForCausalLM"], model_type="llava", image_aspect_ratio="pad", mm_hidden_size=16,
        mm_projector_type="mlp2x_gelu", mm_use_im_start_end=False, mm_use_im_patch_token=False,
        mm_vision_select_feature="patch", mm_vision_select_layer=-2,
        mm_image_tower="LanguageBind/LanguageBind_Image", mm_video_tower="LanguageBind/LanguageBind_Video_merge",
    )  # fmt: skip
    write_shards(folder, tensors, config)
    several.tokenizer().save_pretrained(folder)
    return model


ENCODER_FILES = {
    "vision": "clip-vit-large-patch14-336", "audio": "BEATs_iter3_plus_AS2M.pt",
    "video": "LanguageBind_Video_merge", "point": "point_bert_v1.2.pt",
}  # fmt: skip
OURS = {"vision": "image", "audio": "audio", "video": "video", "point": "point_cloud"}


def write_model_compose(
    folder: Path, base: Any, encoders: Path, modal: str, strategy: str | None, soft: bool = True, seed: int = 0
) -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """ModelCompose's stage 2: config.json and adapter_model.bin. Returns the model, whose LLM is the base's, and the
    dense change of each tensor by key of the factors; without a strategy, stage 1 (mm_projector.bin)."""
    settings, connector = {
        "vision": ({"kind": "clip_vision", "config": CLIP, "layer": -2, "class_token": False}, [16, 32, 32]),
        "video": ({"kind": "language_bind_video", "config": BIND, "layer": -2, "class_token": True}, [16, 32, 32]),
        "point": ({"kind": "point_bert", **POINTS}, [24, 32, 32]),
        "audio": ({"kind": "beats", **BEATS}, {"kind": "qformer", "widths": [16, 32], **QFORMER}),
    }[modal]
    ours = OURS[modal]
    if isinstance(connector, list):
        connector = {"widths": connector}
    tokens = {ours: {"prefix": 2, "suffix": 3}} if soft else {}
    model = composed({ours: settings}, {ours: connector}, tokens, tiny.ROWS, **{f"{ours}_token_id": tiny.ROWS})
    tuned(model, base, noise=0.0)
    tiny.llm_of(model).load_state_dict(tiny.llm_of(base).state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    encoder = model.model.encoders[ours]
    place = encoders / ENCODER_FILES[modal]
    {
        "vision": lambda: write_clip(place, encoder.vision, CLIP),
        "video": lambda: write_bind_video(place, encoder),
        "audio": lambda: write_beats(place, encoder),
        "point": lambda: write_point_bert(place, encoder),
    }[modal]()
    tensors = below(model, f"model.connectors.{ours}", f"model.modal_projectors.{modal}.")
    generator = torch.Generator().manual_seed(seed)
    dense: dict[str, dict[str, torch.Tensor]] = {}
    keys = {None: [], "same": ["default"], "modal": [modal], "modal+language": ["default", modal]}[strategy]
    for key in keys:
        dense[key] = {}
        for layer in range(2):
            for linear in LINEARS:
                name = f"layers.{layer}.{linear}"
                out, wide = tiny.llm_of(model).get_submodule(name).weight.shape
                a = half(0.1 * torch.randn(4, wide, generator=generator))
                b = half(0.1 * torch.randn(out, 4, generator=generator))
                tensors[f"model.{name}.lora_A.{key}.weight"] = a
                tensors[f"model.{name}.lora_B.{key}.weight"] = b
                dense[key][f"{name}.weight"] = 6 / 4 * (b.float() @ a.float())
    if soft:
        own = model.model.soft_tokens[ours]
        for kind, rows in (("prefix", own.prefix), ("suffix", own.suffix)):
            tensors[f"{kind}_tokens.{modal}"] = half(rows.detach())[None]
            tensors[f"{kind}_tokens.default"] = torch.zeros(1, len(rows), 32).half()
    config = language_config(
        architectures=["LlamaForCausalLM"], model_type="multimodal", lora_strategy=strategy, lora_r=4, lora_alpha=6,
        lora_dropout=0.05, local_prefix_tokens=2 if soft else 0, local_suffix_tokens=3 if soft else 0,
        image_aspect_ratio="pad", mm_vision_tower=None, mm_vision_encoder=None, mm_vision_select_layer=-2,
        mm_video_select_layer=-2, mm_vision_select_feature="patch", mm_audio_encoder=None, mm_video_encoder=None,
        mm_point_encoder=None,
    ) | {f"mm_{modal}_encoder": f"model/{ENCODER_FILES[modal]}"}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / ("mm_projector.bin" if strategy is None else "adapter_model.bin"))
    return model, dense
