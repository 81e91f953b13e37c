"""Whether an expert reads text as the base does, and what of its own way of reading must travel with it.

Enters: the base's tokenizer and an expert's. Leaves: nothing where both give the same ids for any text; the expert's
own normalizer, pre-tokenizer and post-processor where they differ only in what stands around special tokens.
Invariant: an expert that splits ordinary text otherwise than the base is refused, unless the recipe says that each
shall keep its own way: one prompt would ask their language models different questions.
"""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

# words and signs that tokenizers are known to split in different ways although their vocabularies agree
PROBES = (
    "Hello world",
    " two  spaces and   three",
    "a\nb\n\nc\r\n\td",
    "1234567890 3.14 1,000",
    "naïve café, e\u0301 and ﬁ, ½",
    "Привет мир, Ελληνικά, हिन्दी, العربية, עברית",
    "你好，世界。こんにちは 안녕하세요",
    "def f(x):\n    return {'x': [0]}  # ok",
    "USER: Hi there!\nASSISTANT:",
    "<|no_token|> </tag> [INST] ## don't DON'T",
    "🙂👍🏽 \u200b\u00a0end ",
)
READING = ("normalizer", "pre_tokenizer", "post_processor")
_MOST_PIECES = 8000
_SEAMS = (1, 2, 5, 101)
_MOST_SPECIAL = 64
_FORMS = (str.upper, str.title, "  {} ".format, "{}\u0301".format)


def own_reading(
    name: str, base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, accepted: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """(reading, warnings): the parts of the expert's tokenizer, as tokenizer.json has them, that differ from the
    base's and change what its prompts become: its bos and eos, the space behind a special token. Mostly empty.

    Raises ValueError, with the text and the first token that differs, where ordinary text is split in another way:
    always where the pieces or their merge rules differ, else unless that is `accepted`.
    """
    if not (accepted and _same_model(base, own)):
        _check_ordinary(name, base, own)
    fast = base.is_fast and own.is_fast
    if not (accepted and fast) and _reads_alike(base, own):
        return {}, []
    if not fast:
        warning = (
            f"expert {name!r} puts other tokens around a text than the base, or splits it otherwise behind a special "
            "token, and a tokenizer without tokenizer.json cannot show how: the base's way is taken"
        )
        return {}, [warning]
    mine, theirs = _json(base), _json(own)
    return {part: theirs[part] for part in READING if theirs[part] != mine[part]}, []


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    flagged = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *flagged]))


def _json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]


def _same_model(base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, *parts: str) -> bool:
    """Whether both have tokenizer.json, with the same pieces and merge rules, and the same of `parts`."""
    if not (base.is_fast and own.is_fast):
        return False
    mine, theirs = _json(base), _json(own)
    return all(mine[part] == theirs[part] for part in ("model", *parts))


def _check_ordinary(name: str, base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase):
    added = {str(token) for token in own.added_tokens_decoder.values()} - set(base.get_vocab())
    # text around special tokens is no ordinary text: see `_reads_alike`
    added |= {token for one in (base, own) for token in _special(one)}
    texts = list(PROBES)
    if not _same_model(base, own, "normalizer", "pre_tokenizer"):
        texts += _pieces(base, own)
    texts = [text for text in texts if not any(token in text for token in added)]
    rows = [one(texts, add_special_tokens=False)["input_ids"] for one in (base, own)]
    for text, mine, theirs in zip(texts, *rows):
        if mine != theirs:
            pairs = zip([*mine, None], [*theirs, None])
            place = next(place for place, (one, other) in enumerate(pairs) if one != other)
            raise ValueError(
                f"expert {name!r} splits {text!r} otherwise than the base: token {place} is "
                f"{_shown(base, mine, place)} for the base and {_shown(own, theirs, place)} for the expert. Their "
                "prompts would not be the ones that they were trained on. Name the base whose tokenizer the expert "
                "was tuned with, or put the right tokenizer files into the expert's folder. If both are right, "
                f"experts.{name}.tokenizer: own lets each keep its own way; mixtures of experts take the base's"
            )


def _pieces(base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> list[str]:
    """Every piece as text, in other letters and spaces, and pieces side by side, where rules of splitting meet."""
    ids = range(0, len(base), 1 if base.is_fast and own.is_fast else -(-len(base) // _MOST_PIECES))
    pieces = [text for text in base.batch_decode([[one] for one in ids]) if text]
    some = pieces[:: -(-len(pieces) // _MOST_PIECES)]
    pairs = [pair for step in _SEAMS for pair in zip(some, some[step % len(some) :])]
    seams = [one + other for pair in pairs for one, other in (pair, pair[::-1])]
    return pieces + seams + [form(text) for form in _FORMS for text in some]


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int) -> str:
    if place >= len(ids):
        return "missing"
    return f"{tokenizer.convert_ids_to_tokens(ids[place])!r} ({ids[place]})"


def _reads_alike(base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> bool:
    """Whether both put the same tokens around a text, and split it alike behind and before a special token."""
    known = own.get_vocab()
    special = [token for token in _special(base) if token in known][:_MOST_SPECIAL]
    pieces = [f"{token}{after}" for token in special for after in ("Hello", " Hello", "\nHello", "Hello  ")]
    texts = [PROBES[0], "", *(f"{before}{piece}" for piece in pieces for before in ("", "a ", "a\n"))]
    mine, theirs = (one(texts)["input_ids"] for one in (base, own))
    return mine == theirs
