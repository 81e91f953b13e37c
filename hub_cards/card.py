"""The model card of a merged folder.

Enters: the folder's config.json, merge_recipe.yaml and merge_report.json. Leaves: README.md, whose front matter the
Hub reads. Invariant: every number in it stands in the report; nothing is typed by hand.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configuration_mmer.configuration_mmer import MMERConfig

_EXAMPLES = {"image": "picture.png", "video": "clip.mp4", "audio": "sound.wav", "point_cloud": "chair.npy"}


def write_card(folder: str | Path, repo: str | None = None) -> Path:
    """Write README.md into a merged folder and return its path. `repo` is the id that the snippets load.

    Raises ValueError when the folder is not a merged repository.
    """
    folder = Path(folder)
    missing = [
        name for name in ("config.json", "merge_recipe.yaml", "merge_report.json") if not (folder / name).is_file()
    ]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: a card is written for a folder that `mmer merge` made"
        )
    config = MMERConfig.from_pretrained(folder)
    recipe = yaml.safe_load((folder / "merge_recipe.yaml").read_text(encoding="utf-8"))
    report = json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    text = environment.get_template("model_card.md").render(
        metadata=_metadata(config, recipe).to_yaml(),
        title="MMER: " + " + ".join(config.expert_names),
        repo=repo or folder.resolve().name,
        base=_public(recipe["base"]),
        experts=[_expert(name, config, recipe, report) for name in config.expert_names],
        media=[{"type": m, "path": _EXAMPLES[m]} for m in config.default_experts],
        method=_words(recipe["method"]),
        decoupling=_words(recipe["decoupling"]),
        warnings=report["warnings"],
    )
    card = folder / "README.md"
    card.write_text(text, encoding="utf-8")
    return card


def _sources(expert: dict[str, Any] | str) -> list[str]:
    if isinstance(expert, str):
        return [expert]
    return [expert[key] for key in ("model", "lora", "tower") if expert.get(key)]


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None and not Path(source).exists()


def _public(source: str) -> str:
    """A Hub id as it is; of a folder of the machine that merged, its name alone."""
    return source if _is_hub_id(source) else Path(source).name


def _metadata(config: MMERConfig, recipe: dict[str, Any]) -> ModelCardData:
    named = [recipe["base"], *(source for expert in recipe["experts"].values() for source in _sources(expert))]
    # a local folder means nothing on the Hub
    on_hub = [source.partition("@")[0] for source in named if _is_hub_id(source)]
    modalities = sorted(config.default_experts)
    extra: dict[str, Any] = {"base_model_relation": "merge"} if on_hub else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        base_model=list(dict.fromkeys(on_hub)) or None,
        tags=["mmer", "merge", "multimodal", *(modality.replace("_", "-") for modality in modalities)],
        **extra,
    )


def _expert(name: str, config: MMERConfig, recipe: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    total = report["experts"][name]["total"]

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    return {
        "name": name,
        "modalities": config.modalities(name),
        "source": " + ".join(_public(source) for source in _sources(recipe["experts"][name])),
        "density": share(total["mask_density"]),
        "kept": share(total["kept_energy"]),
        "residual": f"{total['residual']:.3f}",
        "bits": f"{report['experts'][name]['bits_per_parameter']:.2f}",
    }


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
