"""Which way of decoupling suits these experts, when the recipe leaves it open (`kind: auto`); and the LoRAs as `exact`
keeps them.

Enters: the recipe's Decoupling and the opened experts. Leaves: a Decoupling of kind `exact` or `mask`. An expert that
is a LoRA on the base is kept by its own two factors, exactly; that costs r·(in + out) numbers a matrix. A mask costs
one bit a parameter, its scales and its correction. `exact` is taken where every expert is such a LoRA and it is the
smaller.
"""

from collections.abc import Sequence

import torch

from .experts import Base, Expert, sampled_matrices
from .masks import correct
from .recipe import Decoupling

_BITS = 16  # of a stored number


def settle(decoupling: Decoupling, experts: Sequence[Expert], base: Base, tokens: int) -> Decoupling:
    """`decoupling` itself, or for kind `auto` the kind that these experts call for."""
    if decoupling.kind != "auto":
        return decoupling
    if all(is_lora(expert, base, tokens) for expert in experts) and exact_bits(experts, base) <= mask_bits(
        decoupling, experts, base
    ):
        return Decoupling.model_validate({"kind": "exact", "lambda": decoupling.lam})
    return decoupling.model_copy(update={"kind": "mask"})


def is_lora(expert: Expert, base: Base, tokens: int) -> bool:
    """Whether the expert's LLM is the base plus a LoRA, by a look at some matrices."""
    if expert.adapter is None:
        return False
    return not any(bool(expert.dense_part(name, base.tensor(name), tokens).any()) for name in sampled_matrices(base))


def _lora_rank(experts: Sequence[Expert], name: str) -> int:
    """The rank that all experts' factors of one matrix are padded to."""
    ranks = [expert.adapter.ranks.get(expert.llm[name], 0) for expert in experts if expert.adapter]
    return max(ranks, default=0)


def exact_bits(experts: Sequence[Expert], base: Base) -> int:
    """Bits that `exact` stores for one expert. The factors of all matrices are padded to the largest rank."""
    changed = {name: _lora_rank(experts, name) for name in base.delta_weights if name in base.shapes}
    rank = max(changed.values(), default=0)
    return sum(min(rank, *base.shapes[name]) * sum(base.shapes[name]) * _BITS for name, own in changed.items() if own)


def mask_bits(decoupling: Decoupling, experts: Sequence[Expert], base: Base) -> int:
    """Bits that masks, scales and corrections take for one expert."""
    bits = 0
    for name in base.delta_weights:
        if name in base.shapes and _lora_rank(experts, name):
            rows, columns = base.shapes[name]
            scales = {"row": rows, "tensor": 1, "none": 0}[decoupling.scale]
            bits += rows * columns + scales * _BITS
            bits += min(decoupling.rank, rows, columns) * (rows + columns) * _BITS
    return bits


def largest_rank(experts: Sequence[Expert]) -> int:
    """The rank that `exact` stores: the largest of any LoRA on a tensor of the language model; 0 without one."""
    ranks = [0]
    for expert in experts:
        inside = set(expert.llm.values())
        ranks += [rank for name, rank in (expert.adapter.ranks.items() if expert.adapter else ()) if name in inside]
    return max(ranks)


def exact_factors(
    expert: Expert, name: str, theta_0: torch.Tensor, rank: int, tokens: int, dense: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B (out, rank), A (rank, in)) of the expert's own LoRA on one matrix, zero padded. The base has `tokens` tokens.

    Raises ValueError where the expert changed the matrix beyond a LoRA, which `dense` says.
    """
    if dense:
        raise ValueError(
            f"decoupling.kind exact keeps an expert's own LoRA, but expert {expert.name!r} changed {name} "
            "beyond one: use kind mask for experts that were tuned in full"
        )
    factors = expert.factors(name)
    if factors is None:
        return torch.zeros(len(theta_0), rank), torch.zeros(rank, theta_0.shape[1])
    b, a = factors
    if b.shape[1] > rank:  # more rank than the matrix has
        b, a = correct(expert.task_vector(name, theta_0, tokens), rank)
    if name in expert.base.vocabulary_names:
        b = b[: len(theta_0)].clone()
        b[tokens:] = 0
        b = torch.nn.functional.pad(b, (0, 0, 0, len(theta_0) - len(b)))
    missing = rank - b.shape[1]
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
