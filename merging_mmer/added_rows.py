"""The rows of tokens that the base does not have: one small matrix beside the embedding, one beside the head.

Enters: the added tokens and the experts that bring them. Leaves: the matrices, and for each token that several
experts tuned apart the row of each. Row j belongs to token j: the expert's own, or the mean of the experts' rows,
which the merged route reads; each expert's own follow behind. Invariant: an expert's route reads the rows that the
expert has, whoever else brings a token of that text; the order of the experts changes no number. Where an expert
joins or leaves later, row j stays as it was (`TokenRows`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from configuration_mmer.configuration_mmer import MMERConfig

from .experts import Base, Expert
from .naming import HEAD
from .vocabulary import AddedVocabularyToken


def row_places(base: Base) -> dict[str, str]:
    """Vocabulary matrix of the base -> stored name of the small matrix beside it."""
    places = {base.embedding: "model.added_embeddings.weight", f"{HEAD}.weight": "added_head.weight"}
    return {name: places[name] for name in base.vocabulary_names}


def read_rows(expert: Expert, names: Sequence[str], tokens: Sequence[AddedVocabularyToken]) -> dict[str, torch.Tensor]:
    """Token -> its rows (matrices, hidden) in the expert's vocabulary matrices `names`, where those have one."""
    wanted = {token.token: token.expert_ids[expert.name] for token in tokens if expert.name in token.expert_ids}
    if not wanted:
        return {}
    parts: dict[str, list[torch.Tensor]] = {token: [] for token in wanted}
    for name in names:
        matrix = expert.exact_tensor(name)
        for token, own_id in wanted.items():
            parts[token] += [matrix[own_id].clone()] if own_id < len(matrix) else []
    return {token: torch.stack(rows) for token, rows in parts.items() if len(rows) == len(names)}


def lay_out(
    rows: dict[str, dict[str, torch.Tensor]], tokens: Sequence[str], empty: torch.Tensor
) -> tuple[torch.Tensor, dict[str, dict[str, int]]]:
    """(matrices (matrices, rows, hidden), token -> {expert: its own row} where experts differ).

    `rows`: expert -> token -> (matrices, hidden). Rows are compared as they are stored, in the dtype of `empty`
    (matrices, hidden), which is the row of a token that no expert has one for.
    """
    first: list[torch.Tensor] = []
    further: list[torch.Tensor] = []
    own: dict[str, dict[str, int]] = {}
    for token in tokens:
        found = {expert: of[token].to(empty.dtype) for expert, of in rows.items() if token in of}
        values = list(found.values())
        if not values or all(torch.equal(value, values[0]) for value in values):
            first.append(values[0] if values else empty)
            continue
        # sorted, since a sum in floating point depends on its order
        first.append(torch.stack(values).double().sort(0).values.mean(0).to(empty.dtype))
        own[token] = {expert: len(tokens) + len(further) + place for place, expert in enumerate(found)}
        further += values
    return torch.stack([*first, *further], dim=1), own


@dataclass
class TokenRows:
    """One added token of a merged folder: the row that routes share, (matrices, hidden), and experts' own ones."""

    token: str
    id: int
    experts: list[str]
    joint: torch.Tensor
    own: dict[str, torch.Tensor] = field(default_factory=dict)


def split_rows(config: MMERConfig, matrices: torch.Tensor) -> list[TokenRows]:
    """The stored rows by token; `matrices` (matrices, rows, hidden)."""
    return [
        TokenRows(
            token["token"],
            token["id"],
            list(token["experts"]),
            matrices[:, place],
            {expert: matrices[:, row] for expert, row in token.get("rows", {}).items()},
        )
        for place, token in enumerate(config.added_tokens)
    ]


def join_rows(tokens: Sequence[TokenRows]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """(matrices (matrices, rows, hidden), `added_tokens` of the config); the inverse of `split_rows`."""
    rows, entries = [token.joint for token in tokens], []
    for token in tokens:
        entry: dict[str, Any] = {"token": token.token, "id": token.id, "experts": token.experts}
        if token.own:
            entry["rows"] = {expert: len(rows) + place for place, expert in enumerate(token.own)}
            rows += token.own.values()
        entries.append(entry)
    return torch.stack(rows, dim=1), entries


def add_rows(
    row: TokenRows | None,
    token: AddedVocabularyToken,
    found: dict[str, dict[str, torch.Tensor]],
    empty: torch.Tensor,
) -> TokenRows:
    """`row` with those of newcomers, `found` (newcomer -> token -> (matrices, hidden)); the shared one as it was.

    Of a token that is new (None) the first newcomer's row is the shared one; `empty` where none has a row.
    """
    rows = [(name, of[token.token].to(empty.dtype)) for name, of in found.items() if token.token in of]
    if row is None:
        row = TokenRows(token.token, token.id, [], rows[0][1] if rows else empty)
    own = row.own | {name: value for name, value in rows if not torch.equal(value, row.joint)}
    return TokenRows(row.token, row.id, list(token.experts), row.joint, own)
