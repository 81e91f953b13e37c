"""What a merged folder keeps without approximation, against the originals: norms, biases, rows of added tokens.

Enters: `MergedFolder`, and `Sources` with the original experts. Leaves: what was seen, or a `Fault` or `Skip`.
Invariant: a row is held against that of the expert whose route reads it, whoever joined or left since the merge.
"""

from collections.abc import Iterator

import torch

from configuration_mmer.routes_mmer import FIRST_EXPERT_ROUTE

from .added_rows import lay_out, read_rows, row_places
from .folder_checks import Fault, MergedFolder, Skip
from .naming import stored_name
from .source_checks import Sources, all_or_skip, same_bits
from .vocabulary import AddedVocabularyToken, Vocabulary, merge_vocabulary, possible_texts


def check_exact(merged: MergedFolder, sources: Sources) -> str:
    """What is kept without approximation: each expert's norms and biases, and the rows of added tokens."""
    differing, unseen, seen = [], [], 0
    base, tokens = sources.base, len(sources.base_tokenizer)
    static = merged.config.decoupling["kind"] == "none"
    for name in [] if static else merged.config.expert_tensors:
        theta_0, (module, _, leaf) = base.tensor(name), name.rpartition(".")
        place = f"{stored_name(module + '.')}expert_{leaf}"
        try:
            copies = merged.read(place)
        except Skip:
            unseen.append(place)
            continue
        for expert, stored in zip(sources.experts, copies, strict=True):
            changed = bool(expert.task_vector(name, theta_0, tokens).any())
            original = expert.exact_tensor(name) if changed else theta_0
            seen += 1
            if not same_bits(stored, original.to(stored.dtype)):
                differing.append(f"{place} of {expert.name}")
    for place, expert_name, row, own in _added_rows(merged, sources):
        seen += 1
        try:
            if not same_bits(merged.read(place)[row], own):
                differing.append(f"{place} of {expert_name}")
        except Skip:
            unseen.append(place)
    all_or_skip(differing, unseen, "exact copies", "the bits of the original experts")
    return f"{seen} tensors" if seen else "nothing is kept apart"


def _added_rows(merged: MergedFolder, sources: Sources) -> Iterator[tuple[str, str, int, torch.Tensor]]:
    """(stored name, expert, row that its route reads, the expert's own row) of every added token that has a row.

    Tokens are found by what they may be called: where an expert has left, the others keep the names that they got
    beside it. So a placeholder that the base has too may have a row or none. In a static merge all read the mean of
    what experts tuned apart, which is passed over; so are all rows there once an expert has left, since any may be a
    mean with its own.
    """
    config, base, experts = merged.config, sources.base, sources.experts
    if not config.added_tokens or (config.decoupling["kind"] == "none" and _was_changed(merged)):
        return
    processors = {e.name: e.load_processor(sources.trust_remote_code) for e in experts}
    wanted: dict[str, list[str] | None] = {e.name: config.modalities(e.name) for e in experts}
    configs, own_ways = {e.name: e.config for e in experts}, sources.recipe.own_tokenizers
    vocabulary = merge_vocabulary(sources.base_tokenizer, processors, configs, wanted, own_ways)
    tokens, places, base_ids = vocabulary.added_tokens, row_places(base), sources.base_tokenizer.get_vocab()
    brought = {expert.name: _brought(expert.name, vocabulary, base_ids) for expert in experts}
    rows = {expert.name: read_rows(expert, list(places), brought[expert.name]) for expert in experts}
    empty = torch.zeros(len(places), config.text_config.hidden_size, dtype=merged.dtype)
    apart = lay_out(rows, [token.token for token in tokens], empty)[1] if config.decoupling["kind"] == "none" else {}
    for name, read in zip(config.expert_names, config.added_rows()[FIRST_EXPERT_ROUTE:], strict=True):
        stored = {t["token"]: place for place, t in enumerate(config.added_tokens) if name in t["experts"]}
        for token in brought[name]:
            texts = possible_texts(token.token, name, vocabulary)
            text = next((text for text in texts if text in stored), None)
            if text is None:
                if texts[1] in base_ids:  # its own text, which is all it needs where no other expert has it
                    continue
                raise Fault(f"config.json has no added token {token.token!r} of expert {name!r}", "the expert's")
            place, own = stored.pop(text), rows[name].get(token.token)
            if own is not None and token.token not in apart:
                for matrix, row in zip(places.values(), own, strict=True):
                    yield matrix, name, read[place], row.to(merged.dtype)
        if stored:
            raise Fault(f"config.json gives expert {name!r} the added tokens {list(stored)}", "those that it brings")


def _brought(name: str, vocabulary: Vocabulary, base_ids: dict[str, int]) -> list[AddedVocabularyToken]:
    """The tokens of an expert that may have a row: new ones, and of the base's those that it writes for media, which
    are told apart by a new one beside an earlier expert that writes them too."""
    texts = [token for token, _ in vocabulary.placeholders[name].values()] + [*vocabulary.written[name].values()]
    of_base = [AddedVocabularyToken(t, base_ids[t], [name], {name: base_ids[t]}) for t in texts if t in base_ids]
    return [token for token in vocabulary.added_tokens if name in token.experts] + of_base


def _was_changed(merged: MergedFolder) -> bool:
    """Whether experts have joined or left since the merge."""
    try:
        return bool(merged.report.get("notes"))
    except (Fault, Skip):
        return False
