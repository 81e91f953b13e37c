"""How likely a model finds each choice as its answer.

Enters: (item, choice) pairs. Leaves: for each the sum of the log-probabilities of the choice's tokens behind the
item's prompt, and their number; the choice with the highest mean is the answer. Invariants: a choice's tokens are
those that the tokenizer gives for prompt and choice written as one text, where the prompt's own stay as they are; only
they are scored; padding changes nothing.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .subjects import TOKEN_COLUMNS, Subject
from .tasks import Item

Pair = tuple[Item, str]


def delimiter_of(prompt: str, special_tokens: Sequence[str]) -> str:
    """What a model writes between prompt and answer: nothing behind white space or a special token, else a space."""
    ends = prompt[-1:].isspace() or any(prompt.endswith(token) for token in special_tokens)
    return "" if ends or not prompt else " "


def choice_tokens(subject: Subject, item: Item, prompt: str, choice: str, delimiter: str | None = None) -> list[int]:
    """The ids of a choice behind a prompt. Where both together read otherwise than the prompt did at its end, the
    choice is read alone: behind the prompt's own tokens, which is where a model begins to write.
    """
    tokenizer = subject.reader(item)
    between = delimiter_of(prompt, tokenizer.all_special_tokens) if delimiter is None else delimiter
    before, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + between + choice)
    )
    ids = whole[len(before) :]
    if whole[: len(before)] != before or not ids:
        ids = tokenizer(between + choice, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{item.where}: the choice {choice!r} has no tokens; expected words that the tokenizer knows")
    return ids


def likelihoods(subject: Subject, pairs: Sequence[Pair], delimiter: str | None = None) -> list[tuple[float, int]]:
    """(sum of log-probabilities, tokens) of each pair, in one forward."""
    items = [item for item, _ in pairs]
    prompts = subject.prompts(items)
    answers = [
        choice_tokens(subject, item, prompt, choice, delimiter)
        for (item, choice), prompt in zip(pairs, prompts, strict=True)
    ]
    inputs = _with_answers(subject.inputs(items), answers, subject.tokenizer.pad_token_id)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    kept = max(map(len, answers)) + 1
    inputs |= {"use_cache": False, **_last_logits(subject.model, kept)}
    with torch.inference_mode():
        logits = subject.model(**inputs).logits[:, -kept:].float()
        if never := getattr(subject.model.generation_config, "suppress_tokens", None):
            logits[..., never] = -torch.inf
        scores = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, -kept + 1 :].unsqueeze(-1)).squeeze(-1)
    return [(float(row[-len(own) :].sum()), len(own)) for row, own in zip(scores.cpu(), answers, strict=True)]


def _last_logits(model: Any, kept: int) -> dict[str, int]:
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = "logits_to_keep" in inspect.signature(whole.forward).parameters
    return {"logits_to_keep": kept} if known else {}


def _with_answers(inputs: dict[str, Any], answers: list[list[int]], pad: int) -> dict[str, Any]:
    """The rows with their answers behind them, padded on the left anew; the answers take their text's route."""
    mask = inputs["attention_mask"].bool()
    joined = dict(inputs)
    routes = inputs.get("text_route")
    for name in TOKEN_COLUMNS:
        if name not in inputs:
            continue
        rows = []
        for place, (row, real, own) in enumerate(zip(inputs[name], mask, answers, strict=True)):
            route = 0 if routes is None else int(routes[place])
            fill = {"input_ids": pad, "route_ids": route}.get(name, 0)
            new = {"input_ids": own, "attention_mask": [1] * len(own), "route_ids": [route] * len(own)}
            tail = row.new_tensor(new.get(name, [0] * len(own)))
            rows.append((torch.cat([row[real], tail]), fill))
        longest = max(len(row) for row, _ in rows)
        joined[name] = torch.stack(
            [torch.nn.functional.pad(row, (longest - len(row), 0), value=fill) for row, fill in rows]
        )
    return joined


def best(scores: Sequence[tuple[float, int]]) -> int:
    """The place of the highest log-probability per token; the first of several alike."""
    means = [total / tokens for total, tokens in scores]
    return means.index(max(means))


__all__ = ["best", "choice_tokens", "delimiter_of", "likelihoods"]
