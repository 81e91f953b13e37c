"""Task vectors: what an expert changed in a tensor of the language model.

Enters: a tensor θᵢ of an expert and θ₀ of the base, in their dtypes on disk. Leaves: τᵢ = θᵢ - θ₀ in fp32.
Invariant: an entry that is only θ₀ rounded to the expert's dtype has τ = 0, so that a base in fp16 and an untouched
copy in bf16 agree.
"""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products and factorisations inside give the same bits whatever number of threads the process uses.

    Several Python threads may be inside at once: torch keeps the number for each of them (and, for threads yet to
    begin, the last one set). Where it is 1 already nothing is set, so a thread that begins meanwhile with 1 does not
    put that back, as though it were the process's own, after the others have left.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def task_vector(theta: torch.Tensor, theta_0: torch.Tensor) -> torch.Tensor:
    """τ = θ - θ₀, fp32, shape of θ₀. Raises ValueError when the shapes differ."""
    if theta.shape != theta_0.shape:
        raise ValueError(f"an expert's tensor has shape {tuple(theta.shape)}, the base's {tuple(theta_0.shape)}")
    same = theta == theta_0.to(theta.dtype)
    return torch.where(same, 0.0, theta.float() - theta_0.float())


def vocabulary_task_vector(theta: torch.Tensor, theta_0: torch.Tensor, tokens: int) -> torch.Tensor:
    """τ of an embedding or head (rows, …) whose first `tokens` rows are the base's tokens; 0 in every other row.

    Rows behind the base's tokens are padding, or another token in each expert: they are no change of the base.
    Raises ValueError when the expert lacks rows of the base's tokens, or is of another width.
    """
    check_vocabulary(theta.shape, theta_0.shape, tokens)
    tokens = min(tokens, len(theta_0))
    tau = torch.zeros(theta_0.shape, dtype=torch.float32)
    tau[:tokens] = task_vector(theta[:tokens], theta_0[:tokens])
    return tau


def check_vocabulary(shape: torch.Size, base: torch.Size, tokens: int):
    """Raises ValueError when an expert's vocabulary matrix lacks rows of the base's tokens, or is of another width."""
    if shape[1:] != base[1:] or shape[0] < min(tokens, base[0]):
        raise ValueError(
            f"an expert's vocabulary matrix has shape {tuple(shape)}, the base's {tuple(base)} with "
            f"{tokens} tokens: expected the same width and at least the rows of the tokens"
        )
