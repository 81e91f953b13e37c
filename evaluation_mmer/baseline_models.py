"""A merged model by another method: the parts of a loaded one, filled by the formulas of baselines.py.

Enters: a model whose folder was merged with `HOST`, and the recipe of that merge. Leaves: the same model with another
τ*, other masks and scales; θ₀, towers and the rows of added tokens stay as they are. The merged route is θ₀ + τ*, an
expert's route θ₀ + sᵢ·mᵢ⊙τ*, in matrices, norms and biases alike; `model.save_pretrained` writes it as a folder.
Invariants: what is put is rounded as a merge would store it, so that a method that merging_mmer has too comes out
with the same bits; and nothing of the method before is left.
"""

from collections.abc import Iterator
from typing import Any

import torch

from merging_mmer.base import Base
from merging_mmer.experts import open_expert
from merging_mmer.naming import stored_name
from merging_mmer.recipe import Recipe
from merging_mmer.task_vectors import one_thread
from modeling_mmer.modeling_mmer import MMERForConditionalGeneration
from modeling_mmer.routed_weights_mmer import pack_bits

from .baselines import METHODS, Coefficients, Merged, emr_scales, merge_tensor

# the way of decoupling that has room for every method here: a mask, and one scale a matrix
HOST: dict[str, Any] = {"kind": "mask", "scale": "tensor", "rank": 0}
_SCALE_BITS = 32  # EMR's one number for each expert


class TaskVectors:
    """Base and experts of a recipe, opened: the task vectors of any tensor of the language model."""

    def __init__(self, recipe: Recipe):
        self.base = Base(recipe.base)
        self.experts = [open_expert(name, own, self.base) for name, own in recipe.experts.items()]
        self.tokens = len(self.base.load_tokenizer())
        dtype = self.base.tensor(self.base.embedding).dtype
        self.dtype = dtype if recipe.dtype is None else getattr(torch, recipe.dtype)

    def of(self, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(θ₀ in its dtype on disk, expert -> τᵢ in fp32) of one tensor."""
        theta_0 = self.base.tensor(name)
        return theta_0, {expert.name: expert.task_vector(name, theta_0, self.tokens) for expert in self.experts}

    def is_linear(self, name: str) -> bool:
        return name in self.base.delta_weights and name not in self.base.vocabulary_names


def put(
    model: MMERForConditionalGeneration, vectors: TaskVectors, method: str, settings: Coefficients | None = None
) -> dict[str, float]:
    """Fill `model` by `method`; expert -> the bits it costs a merged parameter, beside base and τ*.

    Raises ValueError for a method that is not in `METHODS`, and for a model that was merged otherwise than by `HOST`
    or from other experts.
    """
    settings = Coefficients() if settings is None else settings
    _check(model, vectors, method)
    experts, parameters = model.config.expert_names, dict(model.named_parameters(remove_duplicate=False))
    bits, merged_parameters = dict.fromkeys(experts, 0.0), 0
    with torch.no_grad(), one_thread():
        scales = dict.fromkeys(experts, 1.0)
        if method == "emr":
            scales = emr_scales((taus, merged) for _, _, taus, merged in _merged(model, vectors, method, settings))
        for name, theta_0, taus, merged in _merged(model, vectors, method, settings):
            merged_parameters += theta_0.numel()
            masks = merged.masks or {expert: torch.ones(theta_0.shape, dtype=torch.bool) for expert in taus}
            module, _, leaf = stored_name(name).rpartition(".")
            if leaf == "weight" and name.removesuffix(".weight") in model.config.delta_modules:
                parameters[f"{module}.delta"].copy_(merged.vector)
                parameters[f"{module}.masks"].copy_(torch.stack([pack_bits(masks[expert]) for expert in experts]))
                parameters[f"{module}.scales"].copy_(torch.tensor([[scales[expert]] for expert in experts]))
            else:
                own = [theta_0.float() + scales[expert] * masks[expert] * merged.vector for expert in experts]
                joint = theta_0.float() + merged.vector
                parameters[f"{module}.expert_{leaf}"].copy_(torch.stack(own).to(vectors.dtype))
                parameters[f"{module}.merged_{leaf}"].copy_(joint.to(vectors.dtype))
            if merged.masks is not None:
                for expert in experts:
                    bits[expert] += 8 * pack_bits(masks[expert]).numel()
    once = _SCALE_BITS if method == "emr" else 0
    return {expert: (own + once) / merged_parameters for expert, own in bits.items()}


def _merged(
    model: MMERForConditionalGeneration, vectors: TaskVectors, method: str, settings: Coefficients
) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor], Merged]]:
    """(name, θ₀, τᵢ, what the method makes of them) of every tensor that an expert changed."""
    for name in [*(f"{module}.weight" for module in model.config.delta_modules), *model.config.expert_tensors]:
        theta_0, taus = vectors.of(name)
        dtype = vectors.dtype if theta_0.ndim > 1 else torch.float32  # of a small tensor the sum alone is stored
        yield name, theta_0, taus, merge_tensor(method, name, taus, settings, dtype, vectors.is_linear(name))


def _check(model: MMERForConditionalGeneration, vectors: TaskVectors, method: str):
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {list(METHODS)}")
    if (found := model.config.decoupling) != HOST:
        raise ValueError(f"the model was merged with decoupling {found}, expected {HOST}: merge it so")
    names = [expert.name for expert in vectors.experts]
    if model.config.expert_names != names:
        raise ValueError(
            f"the model has the experts {model.config.expert_names}, the recipe {names}: expected the same"
        )
