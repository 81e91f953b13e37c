"""The ways that fidelity.py compares: patterns, corrections of what a pattern leaves, and which are asked for when.

Enters: τᵢ and τ* of a matrix. Leaves: a pattern's τ̂ᵢ; `Way`s, each a pattern and a correction with a label of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fidelity_formulas import fitted_mask, row_column_scaled, row_scaled, second_bit, signs, ternary

from merging_mmer.masks import decouple

ALONE = "alone"  # the set of ways that need no τ*
MOST_RANK = 64  # that a spread correction gives one matrix

Pattern = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fitted_rows(tau: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    mask, _ = fitted_mask(tau, merged)
    return row_scaled(tau, mask * merged)


def fitted_rows_columns(tau: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    mask, _ = fitted_mask(tau, merged)
    return row_column_scaled(tau, mask * merged)


# name -> (τ̂ of (τ, τ*), bits an entry, 16-bit numbers a row, and a column, whether it shares τ*)
PATTERNS: dict[str, tuple[Pattern, float, int, int, bool]] = {
    "": (lambda tau, _: torch.zeros_like(tau), 0, 0, 0, False),
    "sign, row magnitudes": (lambda tau, _: row_scaled(tau, signs(tau)), 1, 1, 0, False),
    "sign, row × column magnitudes": (lambda tau, _: row_column_scaled(tau, signs(tau)), 1, 1, 1, False),
    "ternary, row magnitudes": (lambda tau, _: ternary(tau), 1.6, 1, 0, False),
    "paper": (lambda tau, merged: decouple(tau, merged) * merged, 1, 0, 0, True),
    "paper, density 0.2": (lambda tau, merged: decouple(tau, merged) * merged, 1, 0, 0, True),
    "mask, row scales": (lambda tau, merged: row_scaled(tau, decouple(tau, merged) * merged), 1, 1, 0, True),
    "fitted mask, row scales": (fitted_rows, 1, 1, 0, True),
    "fitted mask, row × column scales": (fitted_rows_columns, 1, 1, 1, True),
    "mask, second bit": (second_bit, 2, 2, 0, True),
}


@dataclass(frozen=True)
class Way:
    """pattern: of PATTERNS; rank: 0, or (mean) rank of a correction of what the pattern leaves; weight: none, its
    inputs' mean squares (diagonal) or second moments (full); spread: rank over matrices by what it recovers."""

    pattern: str = ""
    rank: int = 0
    weight: str = "none"
    spread: bool = False
    bits: int = 16

    @property
    def label(self) -> str:
        words = [self.pattern] if self.pattern else []
        if self.rank:
            how = "spread " if self.spread else ""
            by = {"none": "", "diagonal": ", by activations (diagonal)", "full": ", by activations"}[self.weight]
            words.append(f"{how}rank {self.rank}{by}" + ("" if self.bits == 16 else f", {self.bits} bits"))
        return ", ".join(words) or "base parameters"

    @property
    def shares(self) -> bool:
        return PATTERNS[self.pattern][4]


def ways_alone() -> list[Way]:
    ranks = (4, 8, 16, 32)
    return [
        *(Way(rank=rank) for rank in (*ranks, MOST_RANK)),
        *(Way(rank=rank, spread=True) for rank in ranks),
        *(Way(rank=16, spread=True, bits=bits) for bits in (8, 4, 3)),
        *(Way(rank=rank, spread=True, bits=4) for rank in (8, 32)),
        Way(rank=MOST_RANK, bits=4),
        Way(rank=8, spread=True, weight="diagonal"),
        *(Way(rank=rank, spread=True, weight="full") for rank in (2, 4, 8, 16)),
        *(Way(rank=rank, spread=True, weight="full", bits=4) for rank in (8, 16)),
        Way("sign, row magnitudes"),
        Way("sign, row magnitudes", rank=8, spread=True),
        Way("sign, row × column magnitudes"),
        Way("ternary, row magnitudes"),
    ]


def ways_shared() -> list[Way]:
    return [
        Way("paper"),
        Way("paper, density 0.2"),
        Way("mask, row scales"),
        Way("mask, row scales", rank=8),
        Way("mask, row scales", rank=16),
        Way("mask, row scales", rank=16, bits=4),
        Way("fitted mask, row scales"),
        Way("fitted mask, row scales", rank=8),
        Way("fitted mask, row scales", rank=8, spread=True),
        Way("fitted mask, row scales", rank=8, spread=True, weight="full"),
        Way("fitted mask, row × column scales"),
        Way("mask, second bit"),
    ]


def ways_few(place: str) -> list[Way]:
    """Whether the number of experts that share τ* matters."""
    return [] if place == ALONE else [Way("paper"), Way("mask, row scales", rank=8)]


def ways_core(place: str) -> list[Way]:
    """What decides between the kinds: for a first look, or a slow machine."""
    if place == ALONE:
        spreads = [Way(rank=rank, spread=True) for rank in (4, 8, 16)]
        by_inputs = [Way(rank=rank, spread=True, weight="full") for rank in (4, 8)]
        few_bits = [Way(rank=rank, spread=True, bits=4) for rank in (16, 32)] + [Way(rank=MOST_RANK, bits=4)]
        return [Way(rank=16), *spreads, *few_bits, *by_inputs, Way("sign, row magnitudes")]
    masked = [Way("mask, row scales", rank=rank, bits=bits) for rank, bits in ((0, 16), (8, 16), (16, 4))]
    return [Way("paper"), *masked, Way("fitted mask, row scales")]


def ways_final(place: str) -> list[Way]:
    """Those near the knee."""
    if place == ALONE:
        return [*(Way(rank=rank, spread=True, bits=4) for rank in (16, 32)), Way(rank=MOST_RANK, bits=4)]
    return [Way("mask, row scales", rank=8), Way("paper")]


def ways_knee(place: str) -> list[Way]:
    """The fewest that say whether a LoRA needs less."""
    if place == ALONE:
        return [Way(rank=rank, spread=True, bits=4) for rank in (8, 16)]
    return [Way("paper")]


def ways_screen(place: str) -> list[Way]:
    return ways_alone() if place == ALONE else ways_shared() if place.startswith("7") else ways_few(place)


PLANS: dict[str, Callable[[str], list[Way]]] = {
    "screen": ways_screen,
    "core": ways_core,
    "few": ways_few,
    "final": ways_final,
    "knee": ways_knee,
}
