"""The tokens of one exported route: which of the merged vocabulary it has, what they are called and numbered.

Enters: a merged folder's config and processor, and a route. Leaves: `ExportedTokens`: merged id -> exported id, merged
text -> exported text, and a tokenizer with them. Invariant: tokens of the base keep their ids.

Ids: a merged folder does not keep what ids and texts an expert's added tokens had. They are numbered behind the base's
tokens, in the merged order: the expert's original ids, unless it shares a token with an expert before it. A token that
the merge called otherwise (`<image:medical>`) takes the text that the class of the processor uses (`<image>`).
config.json, processor and template follow. `merged`, and tokenizers without a tokenizer.json, keep the merged ids and
texts. The vocabulary has no padding rows behind the last token but the base's own.
"""

import copy
import inspect
import json
import re
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from configuration_mmer.configuration_mmer import MMERConfig
from configuration_mmer.routes_mmer import BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE
from processing_mmer.expert_processors_mmer import ExpertProcessor, reading_tokenizer
from processing_mmer.processing_mmer import MMERProcessor

_PLAIN = ("bos_token", "eos_token", "pad_token", "unk_token")


class ExportedTokens:
    """texts: merged text -> exported text, where they differ. ids: merged id -> exported id of the added tokens that
    the route has. vocabulary: that of `tokenizer`. Raises ValueError for a base without a fast tokenizer."""

    def __init__(self, config: MMERConfig, processor: MMERProcessor, route: int):
        self.config, self.processor, self.route = config, processor, route
        place = route - FIRST_EXPERT_ROUTE
        self.expert = config.expert_names[place] if place >= 0 else None
        self.texts = self._texts()
        self.ids = self._ids()
        self.tokenizer = self._tokenizer()
        self.vocabulary = dict(self.tokenizer.get_vocab())

    def _texts(self) -> dict[str, str]:
        """Merged text -> exported text, of an expert's tokens that the merge had to call otherwise.

        The folder does not say what they were called: a placeholder takes the name that its processor's class gives
        it, which the class may have no argument for; of the others the expert's name is taken away.
        """
        if self.expert is None or not self.processor.tokenizer.is_fast:
            return {}
        own = self.processor.experts[self.expert]
        written = {f"<{modality}:{self.expert}>": modality for modality in own.modalities}
        texts: dict[str, str] = {}
        for token in self.config.added_tokens:
            text = token["token"]
            if token["experts"] != [self.expert]:
                continue
            if (modality := written.get(text)) is not None and own.written(modality) == text:
                called = self._called_by_class(own, modality)
            elif found := re.fullmatch(rf"(.*?):{re.escape(self.expert)}(?::word)?([|]?[>\])}}]*)", text, re.DOTALL):
                called = found[1] + found[2]
            else:
                continue
            if called is not None and called not in texts.values():
                texts[text] = called
        # a token of that text which is the expert's too, and was not called otherwise, has the better claim
        mine = {t["token"] for t in self.config.added_tokens if self.expert in t["experts"]} - set(texts)
        return {text: called for text, called in texts.items() if called not in mine}

    def _called_by_class(self, own: ExpertProcessor, modality: str) -> str | None:
        kind, key = type(own.processor), f"{modality}_token"
        parameter = inspect.signature(kind).parameters.get(key)
        if parameter is not None:
            return parameter.default if isinstance(parameter.default, str) else None
        values = own.to_dict()
        values["placeholders"] = {}  # which would give it the merged name
        tokens = {name: token for name, token in own.tokens.items() if name != key}
        # some classes add tokens to the tokenizer that they are given
        whole = copy.deepcopy(self.processor.tokenizer)
        fresh = ExpertProcessor.from_dict({**values, "tokens": tokens}, whole, None).processor
        return called if isinstance(called := getattr(fresh, key, None), str) else None

    @cached_property
    def _base_vocabulary(self) -> dict[str, int]:
        added = {token["id"] for token in self.config.added_tokens}
        known = self.processor.tokenizer.get_vocab()
        return {token: place for token, place in known.items() if place not in added}

    @property
    def base_tokens(self) -> int:
        return 1 + max(self._base_vocabulary.values())

    def _ids(self) -> dict[int, int]:
        """Merged id -> exported id of the added tokens that the route has."""
        added = sorted(self.config.added_tokens, key=lambda token: token["id"])
        if self.route == BASE_ROUTE:
            return {}
        if self.expert is None or not self.processor.tokenizer.is_fast:
            return {token["id"]: token["id"] for token in added}
        own = {token["id"]: self.texts.get(token["token"]) for token in added if self.expert in token["experts"]}
        base = self._base_vocabulary
        taken = {merged_id: base[text] for merged_id, text in own.items() if text in base}
        new = [merged_id for merged_id in own if merged_id not in taken]
        return taken | {merged_id: self.base_tokens + place for place, merged_id in enumerate(new)}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: Any = self.processor.tokenizer
        if self.route == MERGED_ROUTE:
            return tokenizer
        added = {token["id"] for token in self.config.added_tokens}
        if tokenizer.is_fast:
            core = tokenizer.backend_tokenizer
            values = json.loads(core.to_str())
            tokens = [token for token in values["added_tokens"] if token["id"] not in added]
            for token in values["added_tokens"]:
                text = self.texts.get(token["content"], token["content"])
                if token["id"] in self.ids and text not in self._base_vocabulary:
                    tokens.append({**token, "id": self.ids[token["id"]], "content": text})
            values["added_tokens"] = tokens
            tokenizer = copy.copy(tokenizer)
            tokenizer._tokenizer = type(core).from_str(json.dumps(values))
        elif added and self.route == BASE_ROUTE:
            raise ValueError(
                f"{type(tokenizer).__name__} has no tokenizer.json, so the experts' tokens cannot be taken out of it, "
                "expected a fast tokenizer. Use the checkpoint that the folder was merged from"
            )
        if self.expert is not None:
            own = self.processor.experts[self.expert]
            tokenizer = reading_tokenizer(tokenizer, own.reading)
            special, named = self.renamed(own.special_tokens), self.renamed(own.tokens)
            for key in _PLAIN:
                if special.get(key) in tokenizer.get_vocab():
                    setattr(tokenizer, key, special[key])
            tokenizer._set_model_specific_special_tokens(
                {key: token for key, token in named.items() if key not in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
            )
            templates = self.templates()
            tokenizer.chat_template = templates if len(templates) > 1 else templates.get("default")
        return tokenizer

    def templates(self) -> dict[str, str]:
        found = {}
        for key, template in self.processor.expert_templates.items():
            name, _, kind = key.partition(".")
            if name == self.expert:
                found[kind or "default"] = template
        return self.renamed(found)

    def renamed(self, values: Any) -> Any:
        """`values` (JSON) with the exported texts in all its strings."""
        if isinstance(values, dict):
            return {key: self.renamed(value) for key, value in values.items()}
        if isinstance(values, list):
            return [self.renamed(value) for value in values]
        if not isinstance(values, str) or not self.texts:
            return values
        pattern = "|".join(re.escape(token) for token in sorted(self.texts, key=len, reverse=True))
        return re.sub(pattern, lambda found: self.texts[found.group()], values)


__all__ = ["ExportedTokens"]
