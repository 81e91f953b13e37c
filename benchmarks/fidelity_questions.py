"""What fidelity.py asks: a lab expert's items as embeddings, behind any linears of the common LLM.

Enters: an expert's tower and items. Leaves: the original expert's greedy answers and, for other linears, how far the
logits of those answers are from the original's (KL divergence), how many items keep every token of them (then greedy
generation writes the same), and how many are right. The media features, connector and added rows are the expert's own
and are computed once; the LLM is one `LlamaForCausalLM` whose linears are overwritten. Only rows of the base's
vocabulary can be answered.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor

from evaluation_mmer.lab.datasets import LabItem, score
from evaluation_mmer.lab.experts import NEW_TOKENS
from modeling_mmer.cache_mmer import CACHE

sys.path.append(str(Path(__file__).resolve().parent / "lab"))
from sequences import Features, media_token, project, shared_prefix  # noqa: E402

BATCH = 16


@dataclass
class Questions:
    """prefix: (tokens,) that all prompts share; prompts: (length, hidden) each, behind it; answers: token ids each."""

    prefix: torch.Tensor
    prompts: list[torch.Tensor]
    truth: list[list[int]]
    words: list[str]
    decode: Any
    answers: list[list[int]] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)  # log-probabilities of the original at its answers


@dataclass(frozen=True)
class Kept:
    """Of `n` items: same words as the original, right, and the mean KL divergence a token from the original."""

    n: int
    same: int
    right: int | None
    divergence: float


def read_tower(folder: Path, layout: Any, items: Sequence[LabItem]) -> Questions:
    model = layout.model.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    features = Features(model, processor, items, media_token(model))
    tokenizer = processor.tokenizer
    added = min(tokenizer.convert_tokens_to_ids(list(layout.added_tokens)))
    prefix = torch.tensor(shared_prefix(features[0][0], added))
    prompts, truth = [], []
    with torch.no_grad():
        for number in range(len(items)):
            ids, media, answer = features[number]
            tail = torch.tensor(ids[len(prefix) :])
            embeds = model.get_input_embeddings()(tail)
            embeds[tail == media_token(model)] = project(model, media.float(), 1)
            prompts.append(embeds.clone())
            truth.append(tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return Questions(prefix, prompts, truth, [item.answer for item in items], decode)


def answer_logits(
    llm: Any, prefix: torch.Tensor, prompts: Sequence[torch.Tensor], answers: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """(answer's tokens, vocabulary) of each item; one more row than `answer` has tokens predicts what follows it."""
    table = llm.get_input_embeddings()
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            rows = [torch.cat([prompts[i], table(torch.tensor(answers[i], dtype=torch.long))]) for i in chosen]
            context = getattr(llm.model(inputs_embeds=table(prefix[None]), use_cache=True), CACHE)
            context.batch_repeat_interleave(len(rows))
            embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            hidden = llm.model(inputs_embeds=embeds, use_cache=True, **{CACHE: context}).last_hidden_state
            for row, i in zip(hidden, chosen):
                first = len(prompts[i]) - 1
                found[i] = llm.lm_head(row[first : first + len(answers[i]) + 1])
    return [found[i] for i in range(len(prompts))]


def greedy(llm: Any, prefix: torch.Tensor, prompts: Sequence[torch.Tensor], end: int) -> list[list[int]]:
    """At most NEW_TOKENS ids each, the end among them."""
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW_TOKENS):
        going = [i for i, ids in enumerate(written) if end not in ids]
        if not going:
            break
        rows = answer_logits(llm, prefix, [prompts[i] for i in going], [written[i] for i in going])
        for i, row in zip(going, rows, strict=True):
            written[i].append(int(row[-1].argmax()))
    return written


def follow(llm: Any, questions: Questions):
    """Take the LLM as it is for the original: its greedy answers, whether they are right, and their logits."""
    forced = answer_logits(llm, questions.prefix, questions.prompts, [ids[:-1] for ids in questions.truth])
    questions.answers = [list(ids) for ids in questions.truth]
    lost = [i for i, row in enumerate(forced) if row.argmax(-1).tolist() != questions.truth[i]]
    end = questions.truth[0][-1]
    for i, ids in zip(lost, greedy(llm, questions.prefix, [questions.prompts[i] for i in lost], end)):
        questions.answers[i] = ids
    questions.right = _right(questions, questions.answers)
    again = answer_logits(
        llm, questions.prefix, [questions.prompts[i] for i in lost], [questions.answers[i][:-1] for i in lost]
    )
    for i, row in zip(lost, again):
        forced[i] = row
    questions.logits = [row.log_softmax(-1) for row in forced]


def _right(questions: Questions, answers: Sequence[Sequence[int]]) -> list[bool]:
    return [score(questions.decode(ids), words) for ids, words in zip(answers, questions.words, strict=True)]


def compare(llm: Any, questions: Questions, accuracy: bool) -> Kept:
    """The LLM as it is now against the original. Without `accuracy` items that changed are not asked for anew."""
    rows = answer_logits(llm, questions.prefix, questions.prompts, [ids[:-1] for ids in questions.answers])
    divergence, tokens, lost = 0.0, 0, []
    for i, (row, original) in enumerate(zip(rows, questions.logits, strict=True)):
        divergence += nn.functional.kl_div(row.log_softmax(-1), original, reduction="sum", log_target=True).item()
        tokens += len(row)
        if row.argmax(-1).tolist() != questions.answers[i]:
            lost.append(i)
    right = None
    if accuracy:
        end = questions.truth[0][-1]
        now = [list(ids) for ids in questions.answers]
        for i, ids in zip(lost, greedy(llm, questions.prefix, [questions.prompts[i] for i in lost], end)):
            now[i] = ids
        right = sum(_right(questions, now))
    return Kept(len(rows), len(rows) - len(lost), right, divergence / tokens)


def moments(llm: Any, questions: Questions, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """name -> E[xxᵀ] (in, in) of a linear's inputs, over all tokens behind the shared prefix, without an answer.

    The prefix is left out since it is the same in every item, and its first token's inputs are many times as large.
    `names`: matrix -> the module that it belongs to. Those that read the same input share one tensor.
    """
    sums: dict[str, torch.Tensor] = {}
    count: dict[str, int] = {}
    real = torch.empty(0)

    def note(name: str):
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]):
            flat = args[0][real]
            sums[name] = sums.get(name, 0) + flat.T @ flat
            count[name] = count.get(name, 0) + len(flat)

        return hook

    first = {shared_input(module): name for name, module in reversed(names.items())}
    handles = [llm.get_submodule(names[name]).register_forward_pre_hook(note(name)) for name in first.values()]
    table = llm.get_input_embeddings()
    with torch.no_grad():
        for start in range(0, len(questions.prompts), BATCH):
            rows = [torch.cat([table(questions.prefix), row]) for row in questions.prompts[start : start + BATCH]]
            lengths = torch.tensor([len(row) for row in rows])
            place = torch.arange(int(lengths.max()))
            real = (place >= len(questions.prefix)) & (place < lengths.unsqueeze(1))
            llm.model(inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True))
    for handle in handles:
        handle.remove()
    means = {name: total / count[name] for name, total in sums.items()}
    return {name: means[first[shared_input(module)]] for name, module in names.items()}


def shared_input(module: str) -> str:
    """q, k and v read the same input, and so do gate and up."""
    for several, one in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        module = module.replace(several, one)
    return module
