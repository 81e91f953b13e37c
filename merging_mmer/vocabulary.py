"""One vocabulary for all experts: the base's, and behind it every token that an expert brought.

Enters: the base's tokenizer, each expert's processor and config. Leaves: `Vocabulary`: the merged tokenizer, the added
tokens with the rows they come from, and each expert's placeholder per modality. Invariant: a token of the base keeps
its id, so text without added tokens is tokenized as the base does it.
"""

import copy
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from configuration_mmer.routes_mmer import AUTO, MODALITIES
from processing_mmer.expert_processors_mmer import ExpertProcessor, reading_tokenizer
from processing_mmer.processing_mmer import MMERProcessor

from .media_check import check_media
from .pretrained import naming, tokenizer_files
from .tokenization import PROBES, own_reading

# the parts of a processor that show it takes a modality
_PARTS = {
    "image": ("image_processor",),
    "video": ("video_processor", "image_processor"),
    "audio": ("feature_extractor", "audio_processor"),
    "point_cloud": ("point_cloud_processor", "point_cloud_feature_extractor", "feature_extractor"),
}


@dataclass
class AddedVocabularyToken:
    """A token that the base does not have. expert_ids: expert -> the token's id in that expert's own vocabulary."""

    token: str
    id: int
    experts: list[str]
    expert_ids: dict[str, int]


@dataclass
class Vocabulary:
    """placeholders: expert -> modality -> (token, id) at which features stand. written: what a prompt says instead,
    where that is another token. renamed: expert -> its own token -> the merged one. readings: expert -> the parts of
    its tokenizer (normalizer, pre_tokenizer, post_processor) that read its prompts otherwise than the base's.
    warnings: what a user should know."""

    tokenizer: PreTrainedTokenizerBase
    added_tokens: list[AddedVocabularyToken]
    placeholders: dict[str, dict[str, tuple[str, int]]]
    written: dict[str, dict[str, str]] = field(default_factory=dict)
    renamed: dict[str, dict[str, str]] = field(default_factory=dict)
    readings: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def merge_vocabulary(
    base_tokenizer: PreTrainedTokenizerBase,
    processors: dict[str, ProcessorMixin],
    configs: dict[str, PreTrainedConfig],
    modalities: Mapping[str, list[str] | None] | None = None,
    own_tokenizers: Container[str] = (),
    earlier: Vocabulary | None = None,
) -> Vocabulary:
    """The merged vocabulary of the base and the experts, which are taken in their order, behind those of `earlier`.

    A placeholder that an earlier expert has becomes `<modality:expert>`; all other tokens are matched by text (see
    `_rename`). `modalities` narrows what experts bring (None: all); placeholders of the others are left out. Raises
    ValueError where an expert's tokenizer gives a token of the base another id, or none, where it splits ordinary
    text in another way (unless it is among `own_tokenizers`), and where an expert's placeholders cannot be found.
    """
    vocabulary = copy.deepcopy(earlier or Vocabulary(base_tokenizer, [], {}))
    tokenizer = vocabulary.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # what save_pretrained writes
    base = base_tokenizer.get_vocab()
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{tokenizer_files(base_tokenizer)}: the base's tokenizer has neither a pad token nor an eos token: "
                "set one before merging"
            )
        tokenizer.pad_token = tokenizer.eos_token
        vocabulary.warnings.append(f"the base has no pad token: {tokenizer.eos_token!r} pads")
    wanted = {token.token: token for token in vocabulary.added_tokens}
    flags = {str(flag): flag for flag in tokenizer.added_tokens_decoder.values() if str(flag) in wanted}
    taken = {token for entries in vocabulary.placeholders.values() for token, _ in entries.values()}
    taken |= {written for entries in vocabulary.written.values() for written in entries.values()}
    for name, processor in processors.items():
        own = processor.tokenizer
        with naming(tokenizer_files(own), tokenizer_files(base_tokenizer)):
            known = own.get_vocab()
            _check_base(name, base, known)
            vocabulary.readings[name], warnings = own_reading(name, base_tokenizer, own, name in own_tokenizers)
        vocabulary.warnings += warnings
        found, left_out = _brought(name, find_placeholders(name, processor, configs[name]), modalities)
        own_flags = {str(token): token for token in own.added_tokens_decoder.values()}
        own_ids = {token: own_id for token, own_id in known.items() if token not in left_out}
        own_ids.update({token: own_id for token, own_id, _ in found.values()})
        flagged = {
            token for token, flag in own_flags.items() if token in flags and _finds_otherwise(flag, flags[token])
        }
        new = [token for token in own_ids if token not in base]
        renamed = _rename(name, found, new, taken, flagged, {**base, **dict.fromkeys(wanted)})
        vocabulary.renamed[name] = renamed
        taken |= {renamed.get(token, token) for token, _, written in found.values() for token in (token, written)}
        for token in sorted({*new, *renamed}, key=own_ids.__getitem__):
            text = renamed.get(token, token)
            flag = own_flags.get(
                token, AddedToken(token, normalized=False, special=token in {t for t, *_ in found.values()})
            )
            if text not in wanted:
                wanted[text] = AddedVocabularyToken(text, -1, [], {})
                flags[text] = _renamed_token(flag, text)
            wanted[text].experts.append(name)
            wanted[text].expert_ids[name] = own_ids[token]
        vocabulary.placeholders[name] = {m: (renamed.get(token, token), -1) for m, (token, _, _) in found.items()}
        vocabulary.written[name] = {m: renamed.get(w, w) for m, (token, _, w) in found.items() if w != token}
    _add(tokenizer, wanted, flags, len(base_tokenizer))
    vocabulary.added_tokens = list(wanted.values())
    for entries in vocabulary.placeholders.values():
        for modality, (token, _) in entries.items():
            entries[modality] = (token, _id_of(tokenizer, token))
    for name in processors:
        _check_reading(name, vocabulary, processors[name].tokenizer)
    return vocabulary


def _check_reading(name: str, vocabulary: Vocabulary, own: PreTrainedTokenizerBase):
    """Raises ValueError where what an expert puts around a text is not what its reading of the merged ids puts."""
    if not vocabulary.readings[name]:
        return
    ids = {token.expert_ids[name]: token.id for token in vocabulary.added_tokens if name in token.expert_ids}
    theirs = [ids.get(token, token) for token in own(PROBES[0])["input_ids"]]
    found = reading_tokenizer(vocabulary.tokenizer, vocabulary.readings[name])(PROBES[0])["input_ids"]
    if found != theirs:
        raise ValueError(
            f"expert {name!r} puts tokens around a text that the base does not have: {own(PROBES[0])['input_ids']} "
            f"for {PROBES[0]!r}. Such a tokenizer cannot be taken over; save it with the base's bos and eos"
        )


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    return found if isinstance(found, int) else found[0]


def _check_base(name: str, base: dict[str, int], own: dict[str, int]):
    wrong = min(((own_id, token) for token, own_id in base.items() if own.get(token) != own_id), default=None)
    if wrong is None:
        return
    base_id, token = wrong
    here = [text for text, own_id in own.items() if own_id == base_id]
    raise ValueError(
        f"expert {name!r} was not tuned from this base: token {base_id} of the base is {token!r}, but in the expert's "
        f"tokenizer {base_id} is {here[0] if here else 'no token'!r} and {token!r} has the id {own.get(token)}. "
        "Name the base that the expert was tuned from"
    )


def _brought(
    name: str, found: dict[str, tuple[str, int, str]], modalities: Mapping[str, list[str] | None] | None
) -> tuple[dict[str, tuple[str, int, str]], set[str]]:
    """(placeholders of the modalities that the expert shall bring, tokens of the others, which get no row)."""
    kept = (modalities or {}).get(name) or list(found)
    if lost := set(kept) - set(found):
        raise ValueError(f"expert {name!r}: asked for {sorted(lost)}, but it brings {sorted(found)}")
    brought = {modality: entry for modality, entry in found.items() if modality in kept}
    tokens, others = (
        {text for entry in entries for text in (entry[0], entry[2])}
        for entries in (brought.values(), [entry for modality, entry in found.items() if modality not in kept])
    )
    return brought, others - tokens


def find_placeholders(
    name: str, processor: ProcessorMixin, config: PreTrainedConfig
) -> dict[str, tuple[str, int, str]]:
    """modality -> (token at which features stand, its id in the expert's vocabulary, token that a prompt writes).

    The id is the config's (`image_token_id`, `image_token_index`), as the model scatters there, else the processor's.
    """
    found: dict[str, tuple[str, int, str]] = {}
    known = processor.tokenizer.get_vocab()
    for modality in MODALITIES:
        written = getattr(processor, f"{modality}_token", None)
        if written is None and any(getattr(processor, part, None) is not None for part in _PARTS[modality][:1]):
            written = getattr(processor.tokenizer, f"{modality}_token", None)
        place = getattr(config, f"{modality}_token_id", getattr(config, f"{modality}_token_index", None))
        if place is None:
            place = next(iter(getattr(processor, f"{modality}_token_ids", None) or [None]))
        if place is None:
            place = getattr(processor, f"{modality}_token_id", None)
        has_part = any(getattr(processor, part, None) is not None for part in _PARTS[modality])
        if not has_part or (written is None and place is None):
            continue
        if place is None and found and written not in known:
            continue  # only a word that the processor replaces (SmolVLM's videos become images)
        if isinstance(written, AddedToken):
            written = str(written)
        if not isinstance(written, str | None) or not isinstance(place, int | None):
            raise ValueError(
                f"expert {name!r}: its {modality} placeholder is {written!r} with the id {place!r}, expected a token "
                "and a number"
            )
        token, place = _token_of(name, modality, known, written, place)
        if any(token == other for other, *_ in found.values()):
            continue  # one token for two kinds of media: the first kind is how features get in
        found[modality] = (token, place, written or token)
    if not found:
        raise ValueError(
            f"expert {name!r}: {type(processor).__name__} names no placeholder token for any of {list(MODALITIES)}: "
            "expected image_token, video_token, audio_token or point_cloud_token"
        )
    return found


def _token_of(
    name: str, modality: str, own: Mapping[str, int], written: str | None, place: int | None
) -> tuple[str, int]:
    """`own`: the expert's vocabulary."""
    if place is None:
        if written not in own:
            raise ValueError(f"expert {name!r}: its {modality} placeholder {written!r} is not in its tokenizer")
        return str(written), own[str(written)]
    places = [token for token, own_id in own.items() if own_id == place]
    if not places and written is None:
        raise ValueError(
            f"expert {name!r}: its {modality} placeholder has the id {place}, which its tokenizer does not know"
        )
    if not places:
        if written in own:
            raise ValueError(
                f"expert {name!r}: its config puts {modality} features at id {place}, its tokenizer has {written!r} "
                f"at {own[str(written)]}: correct one of them"
            )
        return str(written), place
    return places[0], place


def _rename(
    name: str,
    found: dict[str, tuple[str, int, str]],
    new: list[str],
    taken: set[str],
    flagged: set[str],
    known: Container[str],
) -> dict[str, str]:
    """The expert's tokens that cannot keep their text in the merged vocabulary -> their new text.

    Those are its placeholders, where that text is a placeholder or a new token of an earlier expert; its other `new`
    tokens, where an earlier expert's features stand at them (`taken`); and tokens that are found in a text by other
    rules than an earlier expert's (`flagged`). All others share one id with the earlier expert's token of that text.
    """
    renamed: dict[str, str] = {}
    for modality, (token, _, written) in found.items():
        for text in dict.fromkeys((written, token)):
            if text in taken or text in flagged or (text in new and text in known):
                renamed[text] = f"<{modality}:{name}>" if text == written else _with_name(text, name)
    for text in new:
        if text in taken | flagged and text not in renamed:
            called = _with_name(text, name)
            # another placeholder of this expert may be called so: <image:name>
            renamed[text] = _with_name(called, "word") if called in renamed.values() else called
    for text in renamed.values():
        if text in known or text in new:
            raise ValueError(
                f"expert {name!r}: a token of it must be called {text!r}, but that token exists: rename it"
            )
    return renamed


def possible_texts(text: str, name: str, vocabulary: Vocabulary) -> list[str]:
    """What an expert's token, called `text` in `vocabulary`, may be called beside other experts: see `_rename`."""
    back = {renamed: own for own, renamed in vocabulary.renamed[name].items()}
    own = back.get(text, text)
    written = {vocabulary.written[name].get(m, token): m for m, (token, _) in vocabulary.placeholders[name].items()}
    called = [f"<{written[text]}:{name}>"] if text in written else []
    return [text, own, *called, _with_name(own, name), _with_name(_with_name(own, name), "word")]


def _with_name(token: str, name: str) -> str:
    """<soft_token> -> <soft_token:name>, and likewise for other brackets."""
    found = re.fullmatch(r"(.*?)([|]?[>\])}]*)", token, re.DOTALL)
    assert found is not None
    return f"{found[1]}:{name}{found[2]}"


def _finds_otherwise(flag: AddedToken, other: AddedToken) -> bool:
    """Whether two tokens of one text are found in texts by other rules; `special` only matters when decoding."""
    return _flags(flag)[:4] != _flags(other)[:4]


def _flags(token: AddedToken) -> tuple[bool, ...]:
    return token.lstrip, token.rstrip, token.single_word, token.normalized, token.special


def _renamed_token(token: AddedToken, text: str) -> AddedToken:
    lstrip, rstrip, single_word, normalized, special = _flags(token)
    return AddedToken(
        text, lstrip=lstrip, rstrip=rstrip, single_word=single_word, normalized=normalized, special=special
    )


def _add(
    tokenizer: PreTrainedTokenizerBase,
    wanted: dict[str, AddedVocabularyToken],
    flags: dict[str, AddedToken],
    first_id: int,
):
    for text, token in wanted.items():
        if token.id < 0:
            tokenizer.add_tokens([flags[text]], special_tokens=flags[text].special)
        token.id = _id_of(tokenizer, text)
    ids = [token.id for token in wanted.values()]
    if len(set(ids)) != len(ids) or any(own_id < first_id for own_id in ids):
        raise ValueError(
            f"the merged tokenizer gave the added tokens the ids {ids}, expected distinct ones from {first_id}"
        )


def build_processor(
    vocabulary: Vocabulary,
    processors: dict[str, ProcessorMixin],
    base_chat_template: str | dict[str, str] | None,
    text_route: str = AUTO,
    default_experts: dict[str, str] | None = None,
    earlier: Sequence[dict[str, Any]] = (),
    earlier_templates: Mapping[str, str] | None = None,
) -> MMERProcessor:
    """The merged model's processor: the experts' own on the merged tokenizer, each with its own template.

    `earlier`: experts that come before these, as `ExpertProcessor.to_dict` has them, and their templates. Raises
    ValueError for a processor that does not do here what it does alone (see `check_media`).
    """
    clash = set(base_chat_template if isinstance(base_chat_template, dict) else ()) & set(processors)
    if clash:
        raise ValueError(f"the base has chat templates called {sorted(clash)}, like experts: rename these experts")
    experts: list[Any] = list(earlier)
    templates = dict(earlier_templates or {})
    for name, processor in processors.items():
        renamed = vocabulary.renamed[name]
        own_templates = processor.chat_template or getattr(processor.tokenizer, "chat_template", None) or {}
        if isinstance(own_templates, str):
            own_templates = {"default": own_templates}
        for kind, template in own_templates.items():
            key = name if kind == "default" else f"{name}.{kind}"
            templates[key] = _replace(template, renamed)
        own = _expert(name, processor, vocabulary, templates.get(name))
        ids = {token.expert_ids[name]: token.id for token in vocabulary.added_tokens if name in token.expert_ids}
        vocabulary.warnings += check_media(own, processor, ids, templates.get(name))
        experts.append(own)
    return MMERProcessor(
        vocabulary.tokenizer, experts, default_experts, text_route, base_chat_template, expert_templates=templates
    )


def _replace(text: str, renamed: dict[str, str]) -> str:
    if not renamed:
        return text
    pattern = "|".join(re.escape(token) for token in sorted(renamed, key=len, reverse=True))
    return re.sub(pattern, lambda found: renamed[found.group()], text)


def _expert(
    name: str, processor: ProcessorMixin, vocabulary: Vocabulary, chat_template: str | None
) -> ExpertProcessor:
    renamed = vocabulary.renamed[name]
    own = processor.tokenizer
    named = [key for key in own.SPECIAL_TOKENS_ATTRIBUTES if key not in type(own).SPECIAL_TOKENS_ATTRIBUTES]
    tokens = {key: getattr(own, key) for key in named if getattr(own, key) is not None}
    placeholders: dict[str, dict[str, Any]] = {}
    for modality, (token, token_id) in vocabulary.placeholders[name].items():
        written = vocabulary.written[name].get(modality, token)
        placeholders[modality] = {"token": token, "id": token_id}
        if written != token:
            placeholders[modality]["written"] = written
    tokens = {key: renamed.get(token, token) for key, token in tokens.items()}
    plain = {key: renamed.get(str(token), str(token)) for key, token in own.special_tokens_map.items()}
    kept = ExpertProcessor(name, processor, placeholders, tokens, plain, vocabulary.readings[name])
    values = kept.to_dict()
    values["arguments"] = {
        key: renamed.get(value, value) if isinstance(value, str) else value
        for key, value in values["arguments"].items()
    }
    return ExpertProcessor.from_dict(values, vocabulary.tokenizer, chat_template)
