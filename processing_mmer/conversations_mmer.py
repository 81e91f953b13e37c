"""Conversations to prompts and media: what `MMERProcessor.apply_chat_template` does before the text is tokenized.

Enters: conversations whose messages hold text and media blocks. Leaves: per conversation a prompt with placeholders,
and the media in their order. Invariant: each conversation is decided for itself, so a batch gives what each gives
alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from configuration_mmer.routes_mmer import AUTO, MODALITIES, ROUTE_NAMES

from .chat_templates_mmer import ChatPlanner, block_source, media_blocks, render
from .expert_processors_mmer import ExpertProcessor
from .media_mmer import ARGUMENTS, Media, sort_media


class ConversationProcessor(ProcessorMixin):
    """The experts of a processor, and chat with them. What makes tensors of it is `_process`, MMERProcessor's own."""

    experts: dict[str, ExpertProcessor]
    default_experts: dict[str, str]
    text_route: str
    expert_templates: dict[str, str]
    _added_tokens: tuple[str, ...]
    # (texts, media by modality, chosen experts, routes, settings, special tokens) -> everything the model takes
    _process: Callable[..., BatchFeature]

    def _modalities_in_words(self) -> str:
        words = [f"{own.name} ({', '.join(own.modalities)})" for own in self.experts.values()]
        return f"the experts {', '.join(words)}" if words else "no experts"

    def _expert_for(self, modality: str, name: str | None, where: str) -> ExpertProcessor:
        if name is None and modality not in self.default_experts:
            raise ValueError(
                f"{where}: no expert takes {modality} media; this model has {self._modalities_in_words()}"
            )
        name = name or self.default_experts[modality]
        if name not in self.experts or modality not in self.experts[name].placeholders:
            reason = f"expert {name!r} takes no {modality} media" if name in self.experts else f"no expert {name!r}"
            raise ValueError(f"{where}: {reason}; this model has {self._modalities_in_words()}")
        return self.experts[name]

    def _check_route(self, route: str):
        known = [AUTO, *ROUTE_NAMES, *self.experts]
        if route not in known:
            raise ValueError(f"text_route: found {route!r}, expected one of {known}")

    def _routes(self, text_route: str | list[str] | None, samples: int) -> list[str]:
        text_route = self.text_route if text_route is None else text_route
        routes = [text_route] * samples if isinstance(text_route, str) else list(text_route)
        if len(routes) != samples:
            raise ValueError(
                f"text_route names {len(routes)} routes for {samples} samples: give one name, or one each"
            )
        for route in routes:
            self._check_route(route)
        return routes

    def _chosen(self, experts: dict[str, str] | None) -> dict[str, str]:
        return {
            modality: self._expert_for(modality, name, "experts").name for modality, name in (experts or {}).items()
        }

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        experts: dict[str, str] | None = None,
        text_route: str | list[str] | None = None,
        **kwargs,
    ):
        """One conversation or a list of them, as text, ids or everything the model takes.

        A content block is {"type": "text", "text": …}, or {"type": "image" | "video" | "audio" | "point_cloud"} with
        one of the type's own name, "path", "url", "array", "base64", and, where asked, "expert". Without one the
        expert is that of `experts` (modality -> name), else `text_route` where it is an expert with that modality,
        else the default one. Which template is used: see chat_templates_mmer; `chat_template` (a template, or the name
        of one of ours) overrides.

        Raises ValueError as `__call__` does, and where a template does not place a conversation's media.
        """
        if not conversation:
            raise ValueError("Cannot apply chat template to an empty conversation. Provide at least one message.")
        conversations, is_batched = self._normalize_conversations(conversation)
        settings = dict(processor_kwargs or {})
        text_route = settings.pop("text_route", None) if text_route is None else text_route
        chosen = self._chosen(settings.pop("experts", None) if experts is None else experts)
        routes = self._routes(text_route, len(conversations))
        planner = self._planner(tools)
        template, template_of = self._asked_template(chat_template)
        blocks = [media_blocks(messages) for messages in conversations]
        # `transformers serve` sets the flag with every clip; it asks for nothing unless an audio block is left empty
        sounds = [block for here in blocks for block in here if block["type"] == "audio"]
        if load_audio_from_video and any(block_source(block) is None for block in sounds):
            raise ValueError(
                "load_audio_from_video: an empty audio block asks for the sound of the clip before it; give that "
                "sound as an audio block of its own, after the video's block"
            )
        owners = [[self._block_expert(block, chosen, route) for block in here] for here, route in zip(blocks, routes)]
        plans = [
            planner.plan(messages, owned, route, template, template_of)
            for messages, owned, route in zip(conversations, owners, routes)
        ]
        # which keyword arguments are the templates' and which ours is asked of all templates at once
        settings = self._prepare_processor_kwargs(
            "\n".join(sorted({plan.template for plan in plans})),
            settings,
            kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=bool(continue_final_message),
            return_assistant_tokens_mask=return_assistant_tokens_mask,
        )
        extras: list[tuple[Any, Any, dict[str, Any]]] = [(tools, documents, kwargs)] * len(plans)
        if sanitize_control_tokens:
            settings["sanitize_control_tokens"] = True
            for place, (messages, plan) in enumerate(zip(conversations, plans)):
                marked, *extras[place] = self.tokenizer._mark_chat_inputs(
                    plan.template, [messages], tools, documents, kwargs, tokenize, return_assistant_tokens_mask
                )
                plans[place] = planner.plan(marked[0], owners[place], routes[place], template, template_of)
        prompts: list[str] = []
        generated: list[Any] = []
        for plan, owned, here, (its_tools, its_documents, variables) in zip(plans, owners, blocks, extras):
            options: dict[str, Any] = {**plan.special_tokens, **variables}
            rendered, indices = render(
                [plan.messages],
                tools=its_tools,
                documents=its_documents,
                chat_template=plan.template,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                continue_final_message=continue_final_message,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
            planner.check_placed(rendered[0], owned, here, marked=sanitize_control_tokens)
            prompts.append(rendered[0])
            generated.extend(indices)
        if not tokenize:
            return prompts if is_batched else prompts[0]
        if return_tensors != "auto":
            settings["return_tensors"] = return_tensors
        media = self._chat_media(blocks, settings)
        flags = [planner.adds_special_tokens(plan, prompt, settings) for plan, prompt in zip(plans, prompts)]
        out = self._process(prompts, media, {}, routes, settings, flags)
        if not return_dict:
            return out["input_ids"]
        if return_assistant_tokens_mask:
            masks = self._adjust_assistant_masks_indices(out.data, generated)["assistant_masks"]
            out["assistant_masks"] = torch.tensor(masks) if settings.get("return_tensors", "pt") == "pt" else masks
        return out

    def _templates(self) -> dict[str, Any]:
        base = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return {**base, **self.expert_templates}

    def _planner(self, tools: list | None) -> ChatPlanner:
        templates = self._templates()
        base = templates.get("tool_use") if tools and templates.get("tool_use") else templates.get("default")
        by_owner: dict[str | None, str | None] = {None: base, **{name: templates.get(name) for name in self.experts}}
        return ChatPlanner(by_owner, self.experts, self.tokenizer.special_tokens_map, self._added_tokens)

    def _asked_template(self, chat_template: str | None) -> tuple[str | None, str | None]:
        """(template, the expert whose it is) of a template or the name of one of ours."""
        templates = self._templates()
        if chat_template is None or chat_template not in templates:
            return chat_template, None
        owner = chat_template.split(".")[0]
        return templates[chat_template], owner if owner in self.experts else None

    def _block_expert(self, block: dict[str, Any], chosen: dict[str, str], route: str) -> str:
        modality = block["type"]
        by_route = route if route in self.experts and modality in self.experts[route].placeholders else None
        asked = block.get("expert") or chosen.get(modality) or by_route
        return self._expert_for(modality, asked, f"content block of type {modality!r}").name

    def _chat_media(self, blocks: list[list[dict[str, Any]]], settings: dict[str, Any]) -> dict[str, Media]:
        """The media of each conversation; those in `settings` ("images", …) stand for blocks that hold none."""
        media = {}
        for modality in MODALITIES:
            sources = [[block_source(block) for block in here if block["type"] == modality] for here in blocks]
            items = [source for here in sources for source in here]
            apart = settings.pop(ARGUMENTS[modality], None)
            if apart is not None and any(item is not None for item in items):
                raise ValueError(
                    f"{ARGUMENTS[modality]}: given in the content blocks and in processor_kwargs; give them once"
                )
            if apart is not None:
                media[modality] = sort_media(modality, apart, len(blocks))
            elif any(item is None for item in items):
                raise ValueError(
                    f'a content block of type {modality!r} holds no medium: add "path", "url" or {modality!r}: …, '
                    f"or pass {ARGUMENTS[modality]} in processor_kwargs"
                )
            elif items:
                media[modality] = Media(items, [len(here) for here in sources])
        return media
