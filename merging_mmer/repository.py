"""Everything of a merged repository but its weights and its card: config, processor, code, recipe, report.

Enters: the recipe, the opened base and experts, what the merge found out. Leaves: the files that the Hub and
transformers expect beside the weights. Invariant: no path of the machine that merged gets into a
file, unless the recipe has it.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configuration_mmer.composed_config_mmer import ComposedConfig
from configuration_mmer.configuration_mmer import MMERConfig
from configuration_mmer.export_mmer import AUTO_MAP, write_hub_code

from .experts import Base, Expert
from .fitness import bidirectional
from .recipe import Recipe
from .report import MergeReport
from .vocabulary import Vocabulary

ARCHITECTURE = "MMERForConditionalGeneration"


def build_config(
    recipe: Recipe,
    base: Base,
    experts: Sequence[Expert],
    vocabulary: Vocabulary,
    delta_modules: list[str],
    expert_tensors: list[str],
    rank: int,
    dtype: torch.dtype,
    own_rows: dict[str, dict[str, int]],
) -> MMERConfig:
    """`own_rows`: added token -> {expert: its own row}, where experts that share a token tuned it apart."""
    config = MMERConfig(
        text_config=without_paths(base.config.to_dict()),
        experts={expert.name: expert_entry(expert, vocabulary) for expert in experts},
        delta_modules=delta_modules,
        expert_tensors=expert_tensors,
        decoupling={"kind": recipe.decoupling.kind, "scale": recipe.decoupling.scale, "rank": rank},
        added_tokens=[
            {
                "token": token.token,
                "id": token.id,
                "experts": list(token.experts),
                **({"rows": own_rows[token.token]} if token.token in own_rows else {}),
            }
            for token in vocabulary.added_tokens
        ],
        default_experts=recipe.default_experts,
        text_route=recipe.text_route,
    )
    return loadable(config, dtype)


def loadable(config: MMERConfig, dtype: torch.dtype) -> MMERConfig:
    """`config` with what transformers needs to load the folder: class, code, dtype."""
    config.architectures = [ARCHITECTURE]
    config.auto_map = dict(AUTO_MAP)
    config.dtype = dtype
    return config


def expert_entry(expert: Expert, vocabulary: Vocabulary) -> dict[str, Any]:
    """What config.json says of one expert."""
    composed = isinstance(expert.config, ComposedConfig)
    seen = [] if composed else bidirectional(expert.weights.model, expert.config)
    return {
        "config": without_paths(expert.config.to_dict()),
        "placeholders": {
            modality: {"token": token, "id": token_id}
            for modality, (token, token_id) in vocabulary.placeholders[expert.name].items()
        },
        **({"bidirectional": seen} if seen else {}),
    }


def without_paths(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: without_paths(value) for key, value in values.items() if key != "_name_or_path"}
    return [without_paths(value) for value in values] if isinstance(values, list) else values


def write_repository(
    folder: Path, recipe: Recipe, base: Base, config: MMERConfig, processor: Any, report: MergeReport
):
    generation = base.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    write_words(folder, recipe, config, processor, report)


def write_words(folder: Path, recipe: Recipe, config: MMERConfig, processor: Any, report: MergeReport):
    """Processor, config, code, recipe and report."""
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    write_hub_code(folder)
    (folder / "merge_recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "merge_report.json").write_text(report.to_json(), encoding="utf-8")
