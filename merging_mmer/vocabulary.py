"""One vocabulary for all experts: the base's, and behind it every token that an expert brought.

Enters: the base's tokenizer, each expert's processor and config. Leaves: `Vocabulary`: the merged tokenizer, the added
tokens with the rows they come from, and each expert's placeholder per modality. Invariant: a token of the base keeps
its id, so text without added tokens is tokenized as the base does it.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from configuration_mmer.routes_mmer import AUTO, MODALITIES
from processing_mmer.expert_processors_mmer import ExpertProcessor
from processing_mmer.processing_mmer import MMERProcessor

# the parts of a processor that show it takes a modality
_PARTS = {
    "image": ("image_processor",),
    "video": ("video_processor", "image_processor"),
    "audio": ("feature_extractor", "audio_processor"),
    "point_cloud": ("point_cloud_processor", "point_cloud_feature_extractor", "feature_extractor"),
}
# words and signs that tokenizers are known to split in different ways although their vocabularies agree
_PROBES = ("Hello world", " two  spaces", "a\nb\n\nc", "1234.5", "naïve café", "{'x': [0]}", "USER: Hi\nASSISTANT:")


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
    where that is another token. renamed: expert -> its own token -> the merged one. warnings: what a user should
    know."""

    tokenizer: PreTrainedTokenizerBase
    added_tokens: list[AddedVocabularyToken]
    placeholders: dict[str, dict[str, tuple[str, int]]]
    written: dict[str, dict[str, str]] = field(default_factory=dict)
    renamed: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def merge_vocabulary(
    base_tokenizer: PreTrainedTokenizerBase,
    processors: dict[str, ProcessorMixin],
    configs: dict[str, PreTrainedConfig],
    modalities: dict[str, list[str] | None] | None = None,
) -> Vocabulary:
    """The merged vocabulary of the base and the experts, which are taken in their order.

    A placeholder that an earlier expert (or another modality) uses becomes `<modality:expert>`; all other tokens are
    matched by text. `modalities` narrows what experts bring (None: all). Raises ValueError where an expert's tokenizer
    gives a token of the base another id, or none, and where an expert's placeholders cannot be found.
    """
    tokenizer = copy.deepcopy(base_tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # what save_pretrained writes
    base = base_tokenizer.get_vocab()
    vocabulary = Vocabulary(tokenizer, [], {})
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("the base's tokenizer has neither a pad token nor an eos token: set one before merging")
        tokenizer.pad_token = tokenizer.eos_token
        vocabulary.warnings.append(f"the base has no pad token: {tokenizer.eos_token!r} pads")
    wanted: dict[str, AddedVocabularyToken] = {}
    flags: dict[str, AddedToken] = {}
    taken: set[str] = set()
    for name, processor in processors.items():
        own = processor.tokenizer
        _check_base(name, base, own.get_vocab())
        vocabulary.warnings += _differences(name, base_tokenizer, own)
        found = find_placeholders(name, processor, configs[name])
        kept = (modalities or {}).get(name) or list(found)
        if lost := set(kept) - set(found):
            raise ValueError(f"expert {name!r}: asked for {sorted(lost)}, but it brings {sorted(found)}")
        found = {modality: entry for modality, entry in found.items() if modality in kept}
        renamed = _rename(name, found, taken, {**base, **dict.fromkeys(wanted, 0)})
        vocabulary.renamed[name] = renamed
        taken |= {renamed.get(token, token) for token, _, written in found.values() for token in (token, written)}
        own_ids = {token: own_id for token, own_id in own.get_vocab().items() if token not in base or token in renamed}
        own_ids.update({token: own_id for token, own_id, _ in found.values() if token not in base or token in renamed})
        own_flags = {str(token): token for token in own.added_tokens_decoder.values()}
        for token, own_id in sorted(own_ids.items(), key=lambda item: item[1]):
            text = renamed.get(token, token)
            flag = own_flags.get(
                token, AddedToken(token, normalized=False, special=token in {t for t, *_ in found.values()})
            )
            if text not in wanted:
                wanted[text] = AddedVocabularyToken(text, -1, [], {})
                flags[text] = _renamed_token(flag, text)
            elif _flags(flag) != _flags(flags[text]):
                first = wanted[text].experts[0]
                vocabulary.warnings.append(
                    f"token {text!r}: {name} and {first} flag it differently; {first}'s flags hold"
                )
            wanted[text].experts.append(name)
            wanted[text].expert_ids[name] = own_id
        vocabulary.placeholders[name] = {m: (renamed.get(token, token), -1) for m, (token, _, _) in found.items()}
        vocabulary.written[name] = {m: renamed.get(w, w) for m, (token, _, w) in found.items() if w != token}
    _add(tokenizer, wanted, flags, len(base_tokenizer))
    vocabulary.added_tokens = list(wanted.values())
    for entries in vocabulary.placeholders.values():
        for modality, (token, _) in entries.items():
            entries[modality] = (token, _id_of(tokenizer, token))
    return vocabulary


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


def _differences(name: str, base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> list[str]:
    """What the expert's tokenizer splits in another way than the base's, or marks with other special tokens."""
    for text in _PROBES:
        mine, theirs = (one(text, add_special_tokens=False)["input_ids"] for one in (base, own))
        if mine != theirs:
            return [f"expert {name!r} splits {text!r} into {theirs}, the base into {mine}, whose way is taken"]
    mine, theirs = (one(_PROBES[0])["input_ids"] for one in (base, own))
    if mine != theirs:
        return [
            f"expert {name!r} marks {_PROBES[0]!r} as {theirs}, the base as {mine}: the base's special tokens are used"
        ]
    return []


def find_placeholders(
    name: str, processor: ProcessorMixin, config: PreTrainedConfig
) -> dict[str, tuple[str, int, str]]:
    """modality -> (token at which features stand, its id in the expert's vocabulary, token that a prompt writes).

    The id is the config's (`image_token_id`, `image_token_index`), as the model scatters there, else the processor's.
    """
    found: dict[str, tuple[str, int, str]] = {}
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
        token, place = _token_of(name, modality, processor, written, place)
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
    name: str, modality: str, processor: ProcessorMixin, written: str | None, place: int | None
) -> tuple[str, int]:
    own = processor.tokenizer.get_vocab()
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
                f"at {own[written]}: correct one of them"
            )
        return str(written), place
    return places[0], place


def _rename(
    name: str, found: dict[str, tuple[str, int, str]], taken: set[str], known: dict[str, Any]
) -> dict[str, str]:
    """The expert's placeholder tokens whose text is taken -> their new text."""
    renamed: dict[str, str] = {}
    for modality, (token, _, written) in found.items():
        clash = {text for text in (token, written) if text in taken}
        if not clash:
            continue
        if written != token:
            raise ValueError(
                f"expert {name!r}: a prompt writes {written!r} and features stand at {token!r}, and another expert "
                f"uses {sorted(clash)}: two experts of this kind cannot be told apart yet"
            )
        text = f"<{modality}:{name}>"
        if text in known:
            raise ValueError(
                f"expert {name!r}: its placeholder must be called {text!r}, but that token exists: rename it"
            )
        renamed[token] = text
    return renamed


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
) -> MMERProcessor:
    """The merged model's processor: the experts' own on the merged tokenizer, each with its own template."""
    clash = set(base_chat_template if isinstance(base_chat_template, dict) else ()) & set(processors)
    if clash:
        raise ValueError(f"the base has chat templates called {sorted(clash)}, like experts: rename these experts")
    experts, templates = [], {}
    for name, processor in processors.items():
        renamed = vocabulary.renamed[name]
        own_templates = processor.chat_template or getattr(processor.tokenizer, "chat_template", None) or {}
        if isinstance(own_templates, str):
            own_templates = {"default": own_templates}
        for kind, template in own_templates.items():
            key = name if kind == "default" else f"{name}.{kind}"
            templates[key] = _replace(template, renamed)
        experts.append(_expert(name, processor, vocabulary, templates.get(name)))
    return MMERProcessor(
        vocabulary.tokenizer, experts, default_experts, text_route, base_chat_template, expert_templates=templates
    )


def _replace(text: str, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        text = text.replace(old, new)
    return text


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
        if getattr(processor, f"{modality}_token", None) is not None:
            tokens.setdefault(f"{modality}_token", str(getattr(processor, f"{modality}_token")))
    tokens = {key: renamed.get(token, token) for key, token in tokens.items()}
    plain = {key: renamed.get(str(token), str(token)) for key, token in own.special_tokens_map.items()}
    kept = ExpertProcessor(name, processor, placeholders, tokens, plain)
    values = kept.to_dict()
    values["arguments"] = {
        key: renamed.get(value, value) if isinstance(value, str) else value
        for key, value in values["arguments"].items()
    }
    return ExpertProcessor.from_dict(values, vocabulary.tokenizer, chat_template)
