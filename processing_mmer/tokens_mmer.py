"""Text with placeholders to rows of token ids: finding placeholders, writing their stand-ins, padding.

Enters: texts, and the experts whose placeholders may stand in them. Leaves: lists of equal length per sample.
Invariant: the text around a placeholder is tokenized together with what the expert's processor wrote for it, as that
processor would.
"""

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .expert_processors_mmer import ExpertProcessor


@dataclass
class Spot:
    """A placeholder: where it stands in which sample, whose it is, and once encoded the text that takes its place."""

    sample: int
    start: int
    end: int
    expert: str
    modality: str
    stand_in: str = ""


def find_spots(texts: list[str], experts: dict[str, ExpertProcessor], marked: bool = False) -> list[Spot]:
    """All placeholders in order. `marked`: the texts carry transformers' marks around control tokens that users wrote;
    those are no placeholders."""
    owners = {own.written(modality): (own.name, modality) for own in experts.values() for modality in own.modalities}
    if not owners:
        return []
    pattern = "|".join(re.escape(token) for token in sorted(owners, key=len, reverse=True))
    if marked:
        from transformers.processing_utils import _UNMARKED

        pattern = f"{_UNMARKED}(?:{pattern})"
    return [
        Spot(sample, found.start(), found.end(), *owners[found.group()])
        for sample, text in enumerate(texts)
        for found in re.finditer(pattern, text)
    ]


def write_stand_ins(texts: list[str], spots: list[Spot]) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """(texts, offsets): each placeholder replaced, and per sample what stood where, in transformers' form."""
    written, offsets = [], []
    for sample, text in enumerate(texts):
        pieces, replaced, last, length = [], [], 0, 0
        for spot in (spot for spot in spots if spot.sample == sample):
            pieces += [text[last : spot.start], spot.stand_in]
            start = length + spot.start - last
            length = start + len(spot.stand_in)
            last = spot.end
            replaced.append({"type": spot.modality, "span": (spot.start, spot.end), "new_span": (start, length)})
        written.append("".join([*pieces, text[last:]]))
        offsets.append(replaced)
    return written, offsets


def tokenize(
    tokenizers: list[PreTrainedTokenizerBase],
    texts: list[str],
    add_special_tokens: list[bool],
    settings: dict[str, Any],
) -> dict[str, list[list[Any]]]:
    """Rows of ids, attention mask and what `settings` ask for, not padded; tokenizer and special tokens sample by
    sample."""
    rows: list[dict[str, Any]] = [{} for _ in texts]
    alike: dict[tuple[int, bool], list[int]] = {}
    for place, (tokenizer, wanted) in enumerate(zip(tokenizers, add_special_tokens)):
        alike.setdefault((id(tokenizer), wanted), []).append(place)
    for (_, wanted), places in alike.items():
        given = [texts[place] for place in places]
        made = tokenizers[places[0]](given, add_special_tokens=wanted, padding=False, **settings)
        for row, place in enumerate(places):
            rows[place] = {name: values[row] for name, values in made.items()}
    return {name: [list(row[name]) for row in rows] for name in rows[0]}


def check_stand_ins(rows: list[list[int]], experts: dict[str, ExpertProcessor], spots: list[Spot]):
    """Raises ValueError where tokenizing lost tokens at which features stand (truncation does that)."""
    for name, modality in sorted({(spot.expert, spot.modality) for spot in spots}):
        entry = experts[name].placeholders[modality]
        for sample in sorted({spot.sample for spot in spots}):
            wanted = sum(
                spot.stand_in.count(entry["token"])
                for spot in spots
                if (spot.sample, spot.expert, spot.modality) == (sample, name, modality)
            )
            found = rows[sample].count(entry["id"])
            if found != wanted:
                raise ValueError(
                    f"sample {sample}: {found} of {wanted} {entry['token']} tokens are left in the text, and features "
                    "need all of them: raise max_length or leave truncation off"
                )


def pad_rows(
    columns: dict[str, list[list[Any]]], fills: dict[str, list[Any]], settings: dict[str, Any], side: str
) -> dict[str, list[list[Any]]]:
    """Rows filled up on `side` with `fills[column][row]`, to the longest, or to `max_length` with
    padding="max_length".
    """
    padding = settings.get("padding", True)
    if padding in (False, None, "do_not_pad"):
        return columns
    length = max(map(len, columns["input_ids"]))
    if padding == "max_length":
        if settings.get("max_length") is None:
            raise ValueError('padding="max_length" needs max_length')
        length = max(length, settings["max_length"])
    elif padding not in (True, "longest"):
        raise ValueError(f"padding: found {padding!r}, expected True, False, 'longest', 'max_length' or 'do_not_pad'")
    step = settings.get("pad_to_multiple_of") or 1
    length = -(-length // step) * step
    padded = {}
    for name, rows in columns.items():
        filler = [[fill] * (length - len(row)) for fill, row in zip(fills[name], rows)]
        padded[name] = [more + row if side == "left" else row + more for more, row in zip(filler, rows)]
    return padded
