"""The rows of tokens that the base does not have: one small matrix beside the embedding, one beside the head.

Enters: the added tokens and the experts that bring them. Leaves: the matrices, and for each token that several
experts tuned apart the row of each. Row j belongs to token j: the expert's own, or the mean of the experts' rows,
which the merged route reads; each expert's own follow behind. Invariant: an expert's route reads the rows that the
expert has, whoever else brings a token of that text; the order of the experts changes no number.
"""

from collections.abc import Sequence

import torch

from .experts import Expert
from .vocabulary import AddedVocabularyToken


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
