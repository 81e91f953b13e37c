"""Everything of a merged repository but its weights: config, processor, code, recipe, report, card.

Enters: the recipe, the opened base and experts, what the merge found out. Leaves: the files that the Hub and
transformers expect beside the weights. Invariant: no path of the machine that merged gets into a
file, unless the recipe has it.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from configuration_mmer.configuration_mmer import MMERConfig
from configuration_mmer.export_mmer import AUTO_MAP, write_hub_code

from .experts import Base, Expert
from .recipe import Recipe
from .report import MergeReport
from .vocabulary import Vocabulary

ARCHITECTURE = "MMERForConditionalGeneration"

_CARD = """\
---
{metadata}---

# {title}

Merged by [MMER](https://arxiv.org/abs/2505.17110), without training, from the language model `{base}` and the
multimodal experts {experts}. Text alone runs on the base's own parameters, bit for bit.
`merge_recipe.yaml` repeats this merge, `merge_report.json` measures it.

```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

repository = "..."  # the name of this repository, or the folder it lies in
model = AutoModelForMultimodalLM.from_pretrained(repository, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
```
"""


def build_config(
    recipe: Recipe,
    base: Base,
    experts: Sequence[Expert],
    vocabulary: Vocabulary,
    delta_modules: list[str],
    expert_tensors: list[str],
    rank: int,
    dtype: torch.dtype,
) -> MMERConfig:
    entries = {
        expert.name: {
            "config": _without_paths(expert.config.to_dict()),
            "placeholders": {
                modality: {"token": token, "id": token_id}
                for modality, (token, token_id) in vocabulary.placeholders[expert.name].items()
            },
        }
        for expert in experts
    }
    config = MMERConfig(
        text_config=_without_paths(base.config.to_dict()),
        experts=entries,
        delta_modules=delta_modules,
        expert_tensors=expert_tensors,
        decoupling={"kind": recipe.decoupling.kind, "scale": recipe.decoupling.scale, "rank": rank},
        added_tokens=[{"token": t.token, "id": t.id, "experts": list(t.experts)} for t in vocabulary.added_tokens],
        text_route=recipe.text_route,
    )
    config.architectures = [ARCHITECTURE]
    config.auto_map = dict(AUTO_MAP)
    config.dtype = dtype
    return config


def _without_paths(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_paths(value) for key, value in values.items() if key != "_name_or_path"}
    return [_without_paths(value) for value in values] if isinstance(values, list) else values


def write_repository(
    folder: Path, recipe: Recipe, base: Base, config: MMERConfig, processor: Any, report: MergeReport
):
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    write_hub_code(folder)
    generation = base.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    (folder / "merge_recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "merge_report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(_card(recipe, config), encoding="utf-8")


def _card(recipe: Recipe, config: MMERConfig) -> str:
    sources = {name: [s for s in (e.model, e.lora, e.tower) if s] for name, e in recipe.experts.items()}
    named = [recipe.base, *(source for of in sources.values() for source in of)]
    hub = [source.partition("@")[0] for source in named if not Path(source).exists()]
    modalities = sorted({modality for name in recipe.experts for modality in config.modalities(name)})
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "any-to-any",
        "tags": ["mmer", "merge", "multimodal", *modalities],
    }
    if hub:
        metadata |= {"base_model": list(dict.fromkeys(hub)), "base_model_relation": "merge"}
    experts = [f"`{name}` ({' + '.join(_public(source) for source in of)})" for name, of in sources.items()]
    return _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title="MMER: " + " + ".join(sources),
        base=_public(recipe.base),
        experts=", ".join(experts),
    )


def _public(source: str) -> str:
    """A Hub id as it is; of a folder, its name alone."""
    return Path(source).name if Path(source).exists() else source
