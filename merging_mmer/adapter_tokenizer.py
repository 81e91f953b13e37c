"""The tokenizer that trainers save beside a LoRA adapter, without a processor.

Enters: the processor of the model that the adapter was trained on, and the adapter's folder. Leaves: that processor,
with the adapter's tokenizer where it has tokens more; its chat template stays. Invariant: a token that the tower has
keeps its id, and a trained row never belongs to a token that nobody can write.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOKENIZER_FILES = {"tokenizer.json", "added_tokens.json"}
_LISTED = 4


def holds_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _PROCESSOR_FILES)


def with_own_tokenizer(name: str, processor: ProcessorMixin, folder: Path, rows_trained: bool) -> ProcessorMixin:
    """`processor` of expert `name`, with the tokenizer in `folder` where that has tokens which its own has not.

    `rows_trained`: whether the adapter changes the embedding or the head. Raises ValueError for a tokenizer that
    cannot be read, and where trained rows belong to tokens whose ids are the tower's tokens', or that lack those.
    """
    theirs: Any = processor.tokenizer
    files = _TOKENIZER_FILES | set(type(theirs).vocab_files_names.values())
    if not any((folder / file).is_file() for file in files):
        return processor
    try:
        own: Any = type(theirs).from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"expert {name!r}: the tokenizer beside its adapter in {folder} cannot be read as {type(theirs).__name__} "
            f"({error}). Save it whole, or take its files away if it is the tower's"
        ) from error
    ours, known = own.get_vocab(), theirs.get_vocab()
    new = sorted(set(ours) - set(known), key=ours.__getitem__)
    lacking = sorted((token for token, place in known.items() if ours.get(token) != place), key=known.__getitem__)
    if not new or (lacking and not rows_trained):
        return processor
    if lacking:
        places = [(token, ours[token]) for token in new[:_LISTED]]
        raise ValueError(
            f"expert {name!r}: the tokenizer beside its adapter in {folder} has new tokens {places}, but not the "
            f"tower's {[(token, known[token]) for token in lacking[:_LISTED]]} (token, id), so the rows that were "
            "trained for them have no place in the tower's vocabulary. Train with the tower's tokenizer; or, if its "
            "prompts need none of the new tokens, take the tokenizer's files out of the adapter's folder"
        )
    own.chat_template = theirs.chat_template
    own._set_model_specific_special_tokens(_named(theirs) | _named(own))
    processor.tokenizer = own  # type: ignore[attr-defined]
    return processor


def _named(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens that a processor asks its tokenizer for by name (`image_token`, …)."""
    names = set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES) - set(type(tokenizer).SPECIAL_TOKENS_ATTRIBUTES)
    return {name: getattr(tokenizer, name) for name in sorted(names) if getattr(tokenizer, name) is not None}
