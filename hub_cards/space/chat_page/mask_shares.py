"""How much of the merged vector each expert's masks keep, by kind of matrix.

Enters: `merge_report.json` beside the weights, or the masks of a loaded model, uint8 (experts, out, ceil(in/8)).
Leaves: expert -> kind of matrix -> share of ones, and a table in HTML. Invariant: both sources give the same shares;
the bits behind the last column of a mask are 0.
"""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

Shares = dict[str, dict[str, float]]
ALL = "all"
_PLACE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.\d+\.(?P<kind>.+)")
_ONES = torch.tensor([byte.bit_count() for byte in range(256)])
_ROWS = 4096


def stored_report(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """`merge_report.json` of a folder or a repository; None where there is none."""
    if Path(source).is_dir():
        path = Path(source) / "merge_report.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    try:
        path = Path(hf_hub_download(source, "merge_report.json", revision=revision))
    except EntryNotFoundError:
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def reported(report: dict[str, Any]) -> Shares:
    """Experts without masks are left out."""
    shares: Shares = {}
    for name, expert in report["experts"].items():
        kinds = {**expert["tensors"], f"{ALL}.weight": expert["total"]}
        found = {kind.removesuffix(".weight"): of["mask_density"] for kind, of in kinds.items()}
        if own := {kind: float(share) for kind, share in found.items() if share is not None}:
            shares[name] = own
    return shares


def counted(model: Any) -> Shares:
    """The same, from the masks of a model in memory."""
    parameters = dict(model.named_parameters())
    ones: dict[str, list[int]] = {}
    entries: dict[str, int] = {}
    for name, masks in parameters.items():
        if not name.endswith(".masks"):
            continue
        module = name.removesuffix(".masks")
        place = _PLACE.fullmatch(module)
        own = [sum(_ones(rows) for rows in mask.split(_ROWS)) for mask in masks.detach()]
        for kind in (place["kind"] if place else module.rpartition(".")[2], ALL):
            ones[kind] = [a + b for a, b in zip(ones.get(kind, [0] * len(own)), own)]
            entries[kind] = entries.get(kind, 0) + parameters[f"{module}.delta"].numel()
    return {
        name: {kind: ones[kind][place] / entries[kind] for kind in ones if entries[kind]}
        for place, name in enumerate(model.config.expert_names)
        if ones
    }


def _ones(bits: torch.Tensor) -> int:
    return int(_ONES.to(bits.device)[bits.long()].sum())


def table(shares: Shares, colors: dict[str, str]) -> str:
    """Experts in rows, kinds of matrices in columns, a bar in each cell as wide as the share."""
    if not shares:
        return "<p>No masks: the experts of this model are kept by their own low-rank factors, or not kept apart.</p>"
    kinds = list(dict.fromkeys(kind for own in shares.values() for kind in own if kind != ALL))
    head = "".join(f"<th>{escape(kind.rpartition('.')[2])}</th>" for kind in [*kinds, "all matrices"])
    rows = []
    for name, own in shares.items():
        color = colors.get(name, "#888888")
        cells = "".join(_cell(own.get(kind), color) for kind in [*kinds, ALL])
        rows.append(f'<tr><th scope="row"><i style="background:{color}"></i>{escape(name)}</th>{cells}</tr>')
    return f'<table class="shares"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(share: float | None, color: str) -> str:
    if share is None:
        return "<td>–</td>"
    return f'<td>{share:.1%}<div><div style="width:{share:.1%};background:{color}"></div></div></td>'
