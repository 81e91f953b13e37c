"""Whether the merged model's logits are the base's own: by value, on the base's own class.

Enters: the base's class on the meta device, and its config. Leaves: nothing, or ValueError. The class's forward runs
with a body that returns given hidden states (1, 3, 4) and a head that multiplies them with a given weight (5, 4);
whatever else it does to hidden states or logits then shows in what it returns, whichever config field it comes from.
Invariant: a class around whose head something happens that the merged model does not do is refused.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from modeling_mmer.head_scales_mmer import scaled_hidden, scaled_logits


class _Body(BaseModelOutputWithPast):
    """The output of any body: what it has beside hidden states (router logits, …) is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def check_head(model: PreTrainedModel, config: PreTrainedConfig):
    """Raises ValueError for a head with a bias, and where logits are scaled or capped in an unknown way."""
    body, head = model.base_model, model.get_output_embeddings()
    kind = f"{type(model).__name__} (model_type {config.model_type!r})"
    if head is None or body is model:
        raise ValueError(f"{kind}: its head cannot be told from its body; such an LLM cannot be a base")
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{kind}: its head has a bias, which the merged model's head has not; take another base")
    generator = torch.Generator().manual_seed(0)
    dtype = head.weight.dtype
    hidden = (8 * torch.randn((1, 3, 4), generator=generator)).to(dtype)
    weight = (4 * torch.randn((5, 4), generator=generator)).to(dtype)

    def product(states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states, weight)

    # of the instance alone, and taken back: the class itself stays as it is
    body.forward = lambda *_, **__: _Body(last_hidden_state=hidden)  # type: ignore[method-assign]
    head.forward = product
    try:
        with torch.no_grad():
            found = model(input_ids=torch.zeros((1, 3), dtype=torch.long)).logits
    except Exception as error:
        raise ValueError(
            f"{kind}: what it does between its body and its logits cannot be compared with the merged model's "
            f"({type(error).__name__}: {error}); take another base"
        ) from error
    finally:
        del body.forward, head.forward
    ours = scaled_logits(config, product(scaled_hidden(config, hidden)))
    if found.shape != ours.shape or not torch.equal(found.float(), ours.float()):
        fields = {name: value for name, value in sorted(config.to_dict().items()) if _is_scale(name)}
        raise ValueError(
            f"{kind}: it scales or caps its hidden states or logits in a way that the merged model does not know, so "
            f"the base route would not give the base's logits. Fields of its config that may do it: {fields or 'none'}"
            "; take another base"
        )


def _is_scale(name: str) -> bool:
    return any(part in name for part in ("logit", "head_mult", "multiplier", "softcap", "soft_cap", "dim_model"))
