"""The model card of a merged folder.

Enters: the folder's config.json, merge_recipe.yaml and merge_report.json, and where they are there evaluation.json,
the masks and the originals' licences. Leaves: README.md, whose front matter the Hub reads, licenses.json and plots/.
Invariants: every number in it stands in a file of the folder, nothing is typed by hand; the same folder gives the same
bytes; the last line tells whether somebody has edited the card.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configuration_mmer.configuration_mmer import MMERConfig

from .licensing import Licensing, read_licensing, sources_of, write_licensing
from .mask_counts import count_masks
from .plots import Plot, can_draw, draw_plots, remove_plots
from .results import Result, eval_results, read_results, share, table

CARD = "README.md"
NEEDED = ("config.json", "merge_recipe.yaml", "merge_report.json")
_EXAMPLES = {"image": "picture.png", "video": "clip.mp4", "audio": "sound.wav", "point_cloud": "chair.npy"}
_SEAL = re.compile(r"<!-- written by `mmer card`; sha256 of what stands above: ([0-9a-f]{64}) -->\n\Z")


def write_card(folder: str | Path, repo: str | None = None, license: str | None = None, plots: bool = False) -> Path:
    """Write README.md into a merged folder and return its path.

    repo: the id that the snippets load; the folder's name when absent. license: the id to name, instead of the
    strictest of base and experts; it stays until another is given. plots: draw them too, which needs matplotlib;
    without, pictures of an earlier time are taken away. Raises ValueError when the folder is not a merged repository.
    """
    folder = Path(folder)
    return write_card_with(folder, repo, read_licensing(folder, read_folder(folder)[1], license), plots)


def write_card_with(folder: Path, repo: str | None, licensing: Licensing, plots: bool) -> Path:
    """`write_card` with licences that have been read."""
    config, recipe, report = read_folder(folder)
    results = read_results(folder)
    name = repo or folder.resolve().name
    pictures: list[Plot] = []
    if not plots:
        remove_plots(folder)
    elif can_draw():
        counts = count_masks(folder, config.expert_names, config.delta_modules)
        pictures = draw_plots(folder, report, counts, results)
    else:
        raise ValueError(
            "the card's plots need matplotlib: `pip install matplotlib`, or write the card without plots (--no-plots)"
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("model_card.md").render(
        metadata=_metadata(config, recipe, licensing, results, name).to_yaml(),
        title="MMER: " + " + ".join(config.expert_names),
        repo=name,
        base=_public(recipe["base"]),
        experts=[_expert(expert, config, recipe, report) for expert in config.expert_names],
        asked=_asked(config),
        mixed=len(set(config.default_experts.values())) > 1,
        first=next(iter(config.default_experts), None),
        examples=_EXAMPLES,
        method=_words(recipe["method"]),
        decoupling=_words(recipe["decoupling"]),
        recovered=_recovered(config.decoupling),
        dtype=report["dtype"],
        tensors=report["tensors"],
        keeps_small=config.decoupling["kind"] != "none",
        warnings=report["warnings"],
        notes=report.get("notes", []),
        plots={Path(plot.file).stem: plot for plot in pictures},
        results=table(results),
        scorers=sorted({result.scorer for result in results}),
        licences=_licences(licensing),
        licensing=licensing,
        files=_files(recipe, report),
    )
    write_licensing(folder, licensing)
    card = folder / CARD
    card.write_text(_sealed(text), encoding="utf-8")
    return card


def read_folder(folder: Path) -> tuple[MMERConfig, dict[str, Any], dict[str, Any]]:
    """(config, recipe, report). Raises ValueError when the folder is not a merged repository."""
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: a card is written for a folder that `mmer merge` made"
        )
    recipe = yaml.safe_load((folder / "merge_recipe.yaml").read_text(encoding="utf-8"))
    report = json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))
    return MMERConfig.from_pretrained(folder), recipe, report


def _sealed(text: str) -> str:
    text = text.rstrip() + "\n\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- written by `mmer card`; sha256 of what stands above: {digest} -->\n"


def is_generated(card: Path) -> bool:
    """Whether the card is as `write_card` wrote it, and not by somebody's hand."""
    text = card.read_text(encoding="utf-8", errors="replace")
    seal = _SEAL.search(text)
    return seal is not None and hashlib.sha256(text[: seal.start()].encode()).hexdigest() == seal[1]


def is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None and not Path(source).exists()


def _public(source: str) -> str:
    """A Hub id as it is; of a folder of the machine that merged, its name alone."""
    return source if is_hub_id(source) else Path(source).name


def _linked(source: str) -> str:
    """The same, in Markdown."""
    repo_id, _, revision = source.partition("@")
    if not is_hub_id(source):
        return f"`{_public(source)}`"
    return f"[{source}](https://huggingface.co/{repo_id}{f'/tree/{revision}' if revision else ''})"


def _metadata(
    config: MMERConfig, recipe: dict[str, Any], licensing: Licensing, results: list[Result], name: str
) -> ModelCardData:
    # a local folder means nothing on the Hub
    on_hub = [source.partition("@")[0] for source in sources_of(recipe).values() if is_hub_id(source)]
    modalities = sorted(config.default_experts)
    extra: dict[str, Any] = {**licensing.named.front_matter()}
    if on_hub:
        extra["base_model_relation"] = "merge"
    if results:
        extra |= {"model_name": name.rpartition("/")[2], "eval_results": eval_results(results)}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        base_model=list(dict.fromkeys(on_hub)) or None,
        tags=["mmer", "merge", "multimodal", *(modality.replace("_", "-") for modality in modalities)],
        **extra,
    )


def _expert(name: str, config: MMERConfig, recipe: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    total = report["experts"][name]["total"]
    own = [source for place, source in sources_of(recipe).items() if place.startswith(f"experts.{name}.")]
    return {
        "name": name,
        "modalities": config.modalities(name),
        "source": " + ".join(map(_linked, own)),
        "density": share(total["mask_density"]),
        "kept": share(total["kept_energy"]),
        "residual": f"{total['residual']:.3f}",
        "bits": f"{report['experts'][name]['bits_per_parameter']:.2f}",
    }


def _recovered(decoupling: dict[str, Any]) -> str:
    """How an expert's parameters come about, in words."""
    kind, scale, rank = (decoupling[key] for key in ("kind", "scale", "rank"))
    if kind == "none":
        return "every expert runs on θ₀ + τ*, the one merged vector; nothing of its own is kept"
    if kind == "exact":
        return f"an expert's parameters are θ₀ + BA, its own low-rank factors, of rank {rank} at most, up to rounding"
    parts = [{"row": "s⊙m⊙τ*", "tensor": "s·m⊙τ*", "none": "m⊙τ*"}[scale], *(["BA"] if rank else [])]
    words = ["m is the expert's mask, one bit a parameter, over the merged vector τ*"]
    words += [f"s is one number for each {scale}"] if scale != "none" else []
    words += [f"BA is a correction of rank {rank}"] if rank else []
    return f"an expert's parameters are θ₀ + {' + '.join(parts)}, where {', '.join(words)}"


def _asked(config: MMERConfig) -> list[dict[str, Any]]:
    """One example for each modality of each expert; `named`: the expert has to be asked for by its name."""
    return [
        {"type": m, "path": _EXAMPLES[m], "expert": name, "named": config.default_experts[m] != name}
        for name in config.expert_names
        for m in config.modalities(name)
    ]


def _licences(licensing: Licensing) -> list[dict[str, str]]:
    return [
        {"place": place, "source": _linked(source), "licence": of.words, "kind": of.kind, "read_in": of.read_in or "–"}
        for place, (source, of) in licensing.sources.items()
    ]


def _files(recipe: dict[str, Any], report: dict[str, Any]) -> list[dict[str, str]]:
    """Every input file with its sha256."""
    parts = {"base": report["base"], **{f"experts.{name}": of for name, of in report["experts"].items()}}
    return [
        {"place": place, "file": file, "sha256": digest}
        for place, of in parts.items()
        for file, digest in of.get("sha256", {}).items()
    ]


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
