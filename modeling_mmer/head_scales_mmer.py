"""What a base's ForCausalLM class does around its head, beside the product with the head's weight.

Enters: the base's config, and hidden states (…, hidden) or logits (…, vocabulary). Leaves: the same shape, scaled.
Invariant: `scaled_logits(text, head(scaled_hidden(text, hidden)))` is what the base's own class computes, bit for bit;
a base for which it is not is refused when it is opened (`merging_mmer/head_check.py`).
"""

import torch
from transformers import PreTrainedConfig


def scaled_hidden(text: PreTrainedConfig, hidden: torch.Tensor) -> torch.Tensor:
    """Before the head: minicpm3 divides."""
    return hidden / text.logits_scaling if text.model_type == "minicpm3" else hidden


def scaled_logits(text: PreTrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """After the head: granite divides, cohere and hyperclovax multiply, gemma2 caps."""
    if text.model_type.startswith("granite"):
        logits = logits / text.logits_scaling
    if text.model_type.startswith("hyperclovax"):
        logits = logits * text.logits_scaling
    if text.model_type.startswith("cohere") and text.logit_scale is not None:
        logits = logits * text.logit_scale
    cap = getattr(text, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
