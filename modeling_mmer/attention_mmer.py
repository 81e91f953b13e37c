"""Attention among the tokens of one medium, as Gemma 3 has it for pictures.

Enters: token ids and the placeholders whose tokens see each other. Leaves: `block_sequence_ids` (batch, sequence)
int64, the number of a token's block or -1, and from them the masks of the LLM's layers. A block is a run of one such
placeholder. A full layer sees what is causal or of the same block, a sliding layer the same within its window.
Invariant: where no token is in a block nothing is made here, and the LLM masks as the base does.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from .cache_mmer import CACHE

OUTSIDE = -1
_FULL, _SLIDING = "full_attention", "sliding_attention"
_CUT = (
    "{}: the tokens of one medium see each other, so all of them must be in one forward. Give its whole run of "
    "placeholders at once (leave prefill_chunk_size out, or give one that ends between media)"
)


def media_blocks(input_ids: torch.Tensor, placeholders: Iterable[int]) -> torch.Tensor:
    """(batch, sequence) -> `block_sequence_ids`: runs of one of the `placeholders`, counted from 0 in each sample."""
    inside = torch.zeros_like(input_ids, dtype=torch.bool)
    for token_id in placeholders:
        inside = inside | (input_ids == token_id)
    before = nn.functional.pad(input_ids, (1, 0), value=OUTSIDE)[:, :-1]
    return torch.where(inside, (inside & (input_ids != before)).cumsum(-1) - 1, OUTSIDE)


def whole_blocks(blocks: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """`blocks[:, start:end]`; positions behind the prompt were generated and are outside.

    Raises ValueError where a block goes on beyond either end.
    """
    for edge in (start, end):
        if 0 < edge < blocks.shape[1]:
            cut = (blocks[:, edge - 1] == blocks[:, edge]) & (blocks[:, edge] != OUTSIDE)
            if cut.any():
                sample = int(cut.nonzero()[0])
                raise ValueError(
                    _CUT.format(f"sample {sample} has a medium across position {edge}, where a chunk ends")
                )
    here = blocks[:, start:end]
    return nn.functional.pad(here, (0, end - start - here.shape[1]), value=OUTSIDE)


def open_ends(input_ids: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """(batch,) the placeholder that a sample ends with, -1 where its last token is outside of blocks."""
    return torch.where(blocks[:, -1] != OUTSIDE, input_ids[:, -1], OUTSIDE)


def check_open_ends(ends: torch.Tensor | None, input_ids: torch.Tensor, blocks: torch.Tensor):
    """Raises ValueError where the forward before stopped inside a block (`ends`) that these tokens go on with."""
    if ends is None or ends.shape[0] != input_ids.shape[0]:
        return
    cut = (ends.to(input_ids.device) == input_ids[:, 0]) & (blocks[:, 0] != OUTSIDE)
    if cut.any():
        raise ValueError(_CUT.format(f"sample {int(cut.nonzero()[0])} has a medium that began in an earlier forward"))


def block_masks(
    config: PreTrainedConfig,
    inputs_embeds: Any,
    attention_mask: Any,
    cache: Any,
    position_ids: torch.Tensor | None,
    blocks: torch.Tensor,
) -> Any:
    """The LLM's `attention_mask`: {layer type: mask} where its `config` has layer types, else one mask.

    inputs_embeds: (batch, sequence, hidden). attention_mask: (batch, tokens seen) or None; masks that the caller made
    are returned as they are. Raises ValueError for an attention implementation that takes no mask, and for sequences
    packed in a row.
    """
    if attention_mask is not None and (isinstance(attention_mask, dict) or len(attention_mask.shape) != 2):
        return attention_mask
    if blocks.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"block_sequence_ids has shape {tuple(blocks.shape)}, expected {tuple(inputs_embeds.shape[:2])}: a number "
            f"for each token of this forward, {OUTSIDE} outside"
        )
    given = dict(
        config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
        **{CACHE: cache},
    )  # fmt: skip
    kinds = getattr(config, "layer_types", None)
    alone = _FULL if getattr(config, "sliding_window", None) is None else _SLIDING
    blocks = _as_seen(config, blocks.to(inputs_embeds.device), attention_mask, cache)
    masks = {}
    for kind in sorted(set(kinds or [alone])):
        if kind == _FULL:
            masks[kind] = create_causal_mask(**given, block_sequence_ids=blocks)
        else:
            if attention_mask is None and cache is None and _packed(position_ids):
                raise ValueError(
                    "position_ids start again inside a row: sequences packed in a row cannot have media whose tokens "
                    "see each other in sliding layers. Give each sequence a row, with an attention_mask"
                )
            near = and_masks(blockwise_overlay(blocks), sliding_window_overlay(config.sliding_window))
            masks[kind] = create_sliding_window_causal_mask(**given, or_mask_function=near)
        if masks[kind] is None or len(masks[kind].shape) != 4:
            raise ValueError(
                f"attention implementation {config._attn_implementation!r} takes no mask, but the tokens of one "
                "medium see each other. Load the model with attn_implementation='sdpa', 'eager' or 'flex_attention'"
            )
    return masks if kinds else masks[alone]


def _as_seen(
    config: PreTrainedConfig, blocks: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any
) -> torch.Tensor:
    """The blocks by absolute position, as long as the longest layer's keys: those in the cache are outside."""
    start = 0 if cache is None else int(cache.get_seq_length())
    end = start + blocks.shape[1]
    longest = 0 if attention_mask is None else attention_mask.shape[1]
    if cache is not None:
        sizes = [cache.get_mask_sizes(blocks.shape[1], layer) for layer in range(config.num_hidden_layers)]
        longest = max(longest, *(int(length + offset) for length, offset in sizes))
    return nn.functional.pad(blocks, (start, max(0, longest - end)), value=OUTSIDE)


def _packed(position_ids: torch.Tensor | None) -> bool:
    return position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())
