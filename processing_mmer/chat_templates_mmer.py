"""Which chat template a conversation gets, and how its content blocks become text.

An expert answers well only in the format it was tuned with, so the format follows the route:
  no media                           the base's own template (text route an expert's name: that expert's)
  all media of one expert            that expert's own template
  media of several experts           the base's template, taught media blocks
  text route base or merged          the base's template, taught media blocks where there are media
Taught: each message's blocks become one string, in block order; a medium is its placeholder (with the tokens that its
expert's own template puts directly around it) on a line of its own. So no template has to be edited.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers.utils import chat_template_utils

from configuration_mmer.routes_mmer import AUTO, MODALITIES, ROUTE_NAMES

from .expert_processors_mmer import ExpertProcessor
from .tokens_mmer import find_spots

_PROBE = "Lorem ipsum"
_SOURCES = ("url", "path", "array", "base64")


@dataclass
class ChatPlan:
    """How one conversation is rendered. `owner` is the expert whose template it is; None is the base."""

    template: str
    owner: str | None
    messages: list[dict[str, Any]]
    special_tokens: dict[str, str] = field(default_factory=dict)


def block_source(block: dict[str, Any]) -> Any:
    """What a media block holds: None, or its one path, URL, array or image. Raises ValueError for several sources."""
    kind = block["type"]
    keys = [key for key in (kind, f"{kind}_url", *_SOURCES) if block.get(key) is not None]
    if len(keys) > 1:
        raise ValueError(f"a block of type {kind!r} has {keys}: give one of them")
    if not keys:
        return None
    source = block[keys[0]]
    if kind == "audio" and block.get("sampling_rate") is not None and not isinstance(source, (str, dict)):
        return {"array": source, "sampling_rate": block["sampling_rate"]}
    if keys[0] == "base64" and not source.startswith("data:"):
        return f"data:{kind}/unknown;base64,{source}"
    if keys[0].endswith("url") and isinstance(source, dict) and "url" in source:
        return source["url"]
    return source


def media_blocks(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The media blocks of a conversation in order. Raises ValueError for content of another kind."""
    found = []
    for message in messages:
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"message content: found {type(content).__name__}, expected a string or a list of blocks")
        for block in content:
            if not isinstance(block, dict) or "type" not in block:
                raise ValueError(
                    f'content block {block!r}: expected a dict with "type", e.g. {{"type": "image", "path": …}}'
                )
            if block["type"] in MODALITIES:
                found.append(block)
            elif block["type"] != "text" and (set(block) & set(MODALITIES)):
                raise ValueError(
                    f"content block of type {block['type']!r}: expected text or one of {list(MODALITIES)}"
                )
    return found


def template_owner(route: str, experts_of_media: set[str], experts: list[str]) -> str | None:
    """The expert whose template a conversation gets, None for the base's."""
    if route not in (AUTO, *ROUTE_NAMES, *experts):
        raise ValueError(f"text_route: found {route!r}, expected one of {[AUTO, *ROUTE_NAMES, *experts]}")
    if route in experts:
        return route if experts_of_media <= {route} else None
    if route in ROUTE_NAMES or len(experts_of_media) != 1:
        return None
    return next(iter(experts_of_media))


# transformers annotates it as giving a string; it gives ([prompts], [spans of assistant text])
render: Any = chat_template_utils.render_jinja_template
# jinja2's, which transformers imports where it is installed; without it there are no chats at all
_TEMPLATE_ERROR: type[Exception] = getattr(getattr(chat_template_utils, "jinja2", None), "TemplateError", ValueError)


def _render(template: str, content: Any, special_tokens: tuple[tuple[str, str], ...]) -> str | None:
    """A probe's rendering; None where the template refuses it."""
    messages = [{"role": "user", "content": content}]
    try:
        rendered, _ = render([messages], chat_template=template, **dict(special_tokens))
    except (_TEMPLATE_ERROR, TypeError, ValueError, KeyError, AttributeError):
        return None
    return rendered[0]


@lru_cache(maxsize=64)
def text_forms(template: str, special_tokens: tuple[tuple[str, str], ...]) -> tuple[bool, bool]:
    """Whether the text of (string content, block content) comes out of a template; some drop or garble one of them."""
    plain = _render(template, _PROBE, special_tokens)
    blocks = _render(template, [{"type": "text", "text": _PROBE}], special_tokens)
    garbled = blocks is None or _PROBE not in blocks or re.search(r"""['"]type['"]""", blocks) is not None
    return plain is not None and _PROBE in plain, not garbled


@lru_cache(maxsize=64)
def media_frame(
    template: str, modality: str, written: str, added: tuple[str, ...], special_tokens: tuple[tuple[str, str], ...]
) -> str | None:
    """The placeholder with the added tokens that a template puts directly before and after it, between two texts.

    None where the template does not write exactly one placeholder for a block of that modality.
    """
    text = {"type": "text", "text": _PROBE}
    rendered = _render(template, [text, {"type": modality, modality: "probe"}, text], special_tokens)
    if rendered is None or rendered.count(written) != 1 or rendered.count(_PROBE) != 2:
        return None
    before, after = rendered.split(written)
    token = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)) or r"(?!)"
    left, right = re.search(rf"(?:{token})+\Z", before), re.match(rf"(?:{token})+", after)
    # only a pair is the medium's own; a single one opens or closes the turn
    return left.group() + written + right.group() if left and right else written


def blocks_to_text(content: list[dict[str, Any]], write: Any) -> str:
    """Blocks as one string: texts joined as they are, each medium's placeholder on a line of its own."""
    text = ""
    after_medium = False
    for block in content:
        if block["type"] in MODALITIES:
            text += ("\n" if text and not text.endswith("\n") else "") + write(block)
            after_medium = True
        elif block.get("text"):
            text += ("\n" if after_medium and not block["text"].startswith("\n") else "") + block["text"]
            after_medium = False
    return text


class ChatPlanner:
    """Plans conversations for one processor: its templates by owner, its experts, its tokenizer's special tokens."""

    def __init__(
        self,
        templates: dict[str | None, str | None],
        experts: dict[str, ExpertProcessor],
        special_tokens: dict[str, str],
        added_tokens: tuple[str, ...],
    ):
        self.templates = templates
        self.experts = experts
        self.special_tokens = special_tokens
        self.added_tokens = added_tokens

    def plan(
        self, messages: list[dict[str, Any]], owners: list[str], route: str, template: str | None, owner: str | None
    ) -> ChatPlan:
        """`owners` names the expert of each media block. `template` and `owner` are what the caller asked for, if
        anything.

        Raises ValueError where no template is there.
        """
        if template is None:
            owner = template_owner(route, set(owners), list(self.experts))
            template = self.templates.get(owner)
            if template is None and owner is not None:
                owner, template = None, self.templates.get(None)
        if template is None:
            raise ValueError(
                "this model has no chat template for such a conversation: the base came without one. Pass "
                "chat_template=, or write the prompt yourself and call the processor with text= and the media"
            )
        special = {**self.special_tokens, **(self.experts[owner].special_tokens if owner else {})}
        return ChatPlan(template, owner, self._write_messages(messages, owners, template, owner, special), special)

    def _write_messages(self, messages, owners, template, owner, special) -> list[dict[str, Any]]:
        key = tuple(sorted(special.items()))
        strings, blocks = text_forms(template, key)
        remaining = iter(owners)

        def write(block: dict[str, Any]) -> str:
            return self.frame(next(remaining), block["type"])

        # the base's template is always taught; an expert's own, or one that was asked for, writes what it knows
        kinds = {(name, block["type"]) for name, block in zip(owners, media_blocks(messages))}
        asked_for = owner is not None or template != self.templates.get(None)
        knows_media = asked_for and all(
            media_frame(template, kind, self.experts[name].written(kind), self.added_tokens, key)
            for name, kind in kinds
        )
        written = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, (list, tuple)):
                has_media = any(block["type"] in MODALITIES for block in content)
                if (has_media and not knows_media) or not blocks:
                    content = blocks_to_text(list(content), write)
                else:
                    content = [{k: v for k, v in block.items() if k != "expert"} for block in content]
            if isinstance(content, str) and blocks and not strings:
                content = [{"type": "text", "text": content}]
            written.append(message if content is None else {**message, "content": content})
        return written

    def frame(self, expert: str, modality: str) -> str:
        """An expert's placeholder as its own template writes it, without the words around."""
        own = self.experts[expert]
        written = own.written(modality)
        template = self.templates.get(expert)
        if template is None:
            return written
        key = tuple(sorted({**self.special_tokens, **own.special_tokens}.items()))
        return media_frame(template, modality, written, self.added_tokens, key) or written

    def adds_special_tokens(self, plan: ChatPlan, prompt: str, settings: dict[str, Any]) -> bool:
        """The base's template is tokenized as its tokenizer does it, without; others as transformers' processors do
        it: with, unless the prompt begins with the first of them already."""
        first = plan.special_tokens.get("bos_token")
        if (first and prompt.startswith(first)) or (plan.owner is None and plan.template == self.templates.get(None)):
            return False
        return settings.get("add_special_tokens", settings.get("text_kwargs", {}).get("add_special_tokens", True))

    def check_placed(self, prompt: str, owners: list[str], blocks: list[dict[str, Any]], marked: bool = False):
        """Raises ValueError where a prompt's placeholders are not those of the conversation's blocks, kind by kind."""
        if not blocks:
            return
        spots = find_spots([prompt], self.experts, marked)
        for modality in MODALITIES:
            found = [spot.expert for spot in spots if spot.modality == modality]
            wanted = [owner for owner, block in zip(owners, blocks) if block["type"] == modality]
            if found != wanted:
                raise ValueError(
                    f"the chat template wrote {modality} placeholders of {found} for media of {wanted}: a placeholder "
                    "may stand in a message's text (take it out), or the template does not know these media (pass "
                    "another one)"
                )
