"""The page itself: a chat, what may be chosen, the routes of the latest prompt, and the mask densities.

Enters: a MergedModel and its shares of masks. Leaves: gradio Blocks. Invariant: what the page offers is what the
model's config has: inputs that some expert takes, a choice where several take one, routes by name; a chat lives in
the browser's session alone.
"""

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from . import clouds
from .chats import ENDINGS, WORDS, Refused, Span, assistant_turn, modality_of, user_turn
from .mask_shares import Shares, table
from .merged_model import AUTO, MergedModel

LOG = logging.getLogger("chat_page")
PARAMETER_COLORS = {"base": "#7b8794", "merged": "#7c5cd6"}
EXPERT_COLORS = ("#2f7ed8", "#e2801d", "#1f9d6b", "#d6457f", "#0fa3b1", "#a3762c", "#5b67d8", "#8aa51c")
UNKNOWN_FAULT = "Something went wrong here, not in what you gave. The server's log says what."
SECONDS_BETWEEN = 0.1  # of what is shown while an answer grows
AT_ONCE = 4
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
CSS = """
.gradio-container {max-width: 1180px !important; margin: auto !important}
#head h1 {margin: 0; font-size: 1.5rem} #head p {margin: .15rem 0 .5rem; color: var(--body-text-color-subdued)}
.routes span {display: inline-block; margin: 0 .35rem .35rem 0; padding: .1rem .6rem; border-radius: 1rem;
  color: white; font-size: .8rem}
.spans {max-height: 400px; overflow-y: auto !important} .spans .label {text-transform: none}
#chat .message img {min-width: 6rem; min-height: 6rem; object-fit: contain !important}
#note p {font-size: .85rem; color: var(--body-text-color-subdued)}
.spans .textfield {word-break: normal; overflow-wrap: anywhere}
table.shares {width: 100%; border-collapse: collapse; border: none !important; font-size: .85rem;
  font-variant-numeric: tabular-nums}
table.shares th {font-weight: 600; text-align: left; padding: .3rem .5rem; white-space: nowrap}
table.shares td {padding: .3rem .5rem} table.shares tr {border: none !important}
table.shares th, table.shares td {border: none !important;
  border-bottom: 1px solid var(--border-color-primary) !important}
table.shares i {display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .45rem}
table.shares td > div {height: .35rem; border-radius: .2rem; margin-top: .2rem;
  background: var(--border-color-primary)}
table.shares td > div > div {height: 100%; border-radius: .2rem}
footer {display: none !important}
"""


@dataclass(frozen=True)
class Wanted:
    """What was chosen beside the question. experts: modality -> who is to take it, None where the route says."""

    route: str
    length: int
    temperature: float
    cut_sounds: bool
    experts: dict[str, str | None]


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine: the page fetches nothing from elsewhere."""
    own = ["ui-sans-serif", "system-ui", "sans-serif"]
    soft = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=own, font_mono=["ui-monospace", "monospace"])
    plain = {
        f"block_{part}_{what}": value
        for part in ("title", "label")
        for what, value in (("background_fill", "transparent"), ("text_color", "*body_text_color"))
    }
    return soft.set(**plain, block_title_padding="0", block_border_width="1px")


def colors_of(routes: list[str]) -> dict[str, str]:
    experts = [name for name in routes if name not in PARAMETER_COLORS]
    return {
        **PARAMETER_COLORS,
        **{name: EXPERT_COLORS[place % len(EXPERT_COLORS)] for place, name in enumerate(experts)},
    }


def build(merged: MergedModel, shares: Shares) -> gr.Blocks:
    colors = colors_of(merged.routes)
    takes = merged.experts_by_modality
    several = {modality: experts for modality, experts in takes.items() if len(experts) > 1}
    what = ", ".join(WORDS[modality] for modality in takes)
    # a file that is put away after a day was uploaded by somebody who has long left
    with gr.Blocks(title=f"MMER: {merged.name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(_head(merged, colors), elem_id="head")
        with gr.Row():
            with gr.Column(scale=3, min_width=360):
                chatbot = gr.Chatbot(
                    label="Chat", height=650, elem_id="chat", feedback_options=None, buttons=["copy", "copy_all"],
                    placeholder=f"Attach {what}, or ask in text alone" if what else "Ask",
                )  # fmt: skip
                sources: Any = ["upload", "microphone"] if "audio" in takes else ["upload"]
                box = gr.MultimodalTextbox(
                    show_label=False, placeholder="Ask about what you attach", elem_id="box",
                    file_count="multiple", file_types=[end for one in takes for end in ENDINGS[one]], sources=sources,
                )  # fmt: skip
                fresh = gr.Button("New chat", size="sm", elem_id="fresh")
            with gr.Column(scale=2, min_width=320):
                route = gr.Radio(
                    [AUTO, *merged.routes], value=merged.text_route, label="Parameters that read text and answer",
                    info="auto: base without media, the expert of the media, merged with several", elem_id="route",
                )  # fmt: skip
                choices = [
                    gr.Dropdown(
                        [("as the route says, else " + experts[0], ""), *experts], value="",
                        elem_id=f"expert-{modality}", label=f"{WORDS[modality].capitalize()} are for the expert",
                    )
                    for modality, experts in several.items()
                ]  # fmt: skip
                with gr.Accordion("Settings", open=False):
                    length = gr.Slider(1, 1024, value=128, step=1, label="Tokens at most")
                    heat = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature", info="0: always the likeliest")
                    cut = gr.Checkbox(
                        label="Of sounds that are too long, hear the start", visible="audio" in takes, elem_id="cut"
                    )
                read = gr.HighlightedText(
                    label="Which parameters read which token", color_map=colors, elem_id="read", elem_classes="spans",
                    visible=False,
                )  # fmt: skip
                wrote = gr.HighlightedText(
                    label="Which wrote the answer", color_map=colors, elem_id="wrote", elem_classes="spans",
                    visible=False,
                )  # fmt: skip
                note = gr.Markdown(elem_id="note")
        with gr.Accordion("Mask densities: the share of the merged vector that each expert keeps as its own"):
            gr.HTML(table(shares, colors), elem_id="shares")
        talk = gr.State({"chat": [], "shown": []})

        def ask(
            message: dict[str, Any],
            talk: dict[str, Any],
            route: str,
            length: int,
            heat: float,
            cut: bool,
            *chosen: str,
        ) -> Iterator[dict[Any, Any]]:
            named = {modality: name or None for modality, name in zip(several, chosen)}
            wanted = Wanted(route, int(length), float(heat), bool(cut), named)
            yield from answers(merged, takes, message, talk, wanted, parts)

        parts = {"box": box, "chatbot": chatbot, "talk": talk, "read": read, "wrote": wrote, "note": note}
        asked = box.submit(
            ask, [box, talk, route, length, heat, cut, *choices], list(parts.values()), concurrency_limit=AT_ONCE,
            api_name="ask", show_progress="hidden",
        )  # fmt: skip
        # a call that is cancelled closes its generator, and with it the thread that generates
        box.stop(_idle, None, box, cancels=[asked], api_visibility="private")
        gr.on(
            [fresh.click, chatbot.clear],
            lambda: {
                chatbot: [], talk: {"chat": [], "shown": []}, note: "", box: _idle(), read: _spans(), wrote: _spans()
            },
            None, list(parts.values()), cancels=[asked], api_visibility="private",
        )  # fmt: skip
    return page


def answers(
    merged: MergedModel,
    takes: dict[str, list[str]],
    message: dict[str, Any],
    talk: dict[str, Any],
    wanted: Wanted,
    parts: dict[str, Any],
) -> Iterator[dict[Any, Any]]:
    """What changes on the page while a question is answered. A question that fails leaves the chat as it was."""
    text, files = message.get("text") or "", list(message.get("files") or [])
    asked = [*talk["shown"], *([{"role": "user", "content": text}] if text.strip() else [])]

    def refuse(words: str) -> dict[Any, Any]:
        names = [{"role": "user", "content": f"`{Path(path).name}`"} for path in files]
        said = {"role": "assistant", "content": f"**Not answered:** {words}"}
        shown = [*talk["shown"], *names, *asked[len(talk["shown"]) :], said]
        return {
            parts["box"]: _idle(), parts["chatbot"]: shown, parts["talk"]: {**talk, "shown": shown},
            parts["read"]: _spans(), parts["wrote"]: _spans(), parts["note"]: "",
        }  # fmt: skip

    yield {parts["box"]: _busy(), parts["chatbot"]: asked}
    try:
        chat = [*talk["chat"], user_turn(text, files, takes, wanted.experts)]
        prompt = merged.read(chat, wanted.route, wanted.cut_sounds)
        shown = [*talk["shown"], *map(_medium, files), *asked[len(talk["shown"]) :]]
        yield {
            parts["chatbot"]: shown, parts["read"]: _spans(prompt.spans), parts["wrote"]: _spans(), parts["note"]: "",
        }  # fmt: skip
        answer, last = "", 0.0
        for piece in merged.answer(prompt, wanted.length, wanted.temperature):
            answer += piece
            if time.monotonic() - last > SECONDS_BETWEEN:
                last = time.monotonic()
                yield _grown(parts, chat, shown, answer)
        yield {
            **_grown(parts, chat, shown, answer), parts["box"]: _idle(), parts["read"]: _spans(prompt.spans),
            parts["wrote"]: _spans([(answer or " ", prompt.answer_route)]),
            parts["note"]: f"{prompt.length} tokens read, answered by **{prompt.answer_route}**",
        }  # fmt: skip
    except Refused as error:
        yield refuse(_plain(str(error)))
    except Exception:
        LOG.exception("a question was not answered")
        yield refuse(UNKNOWN_FAULT)


def _grown(parts: dict[str, Any], chat: list[Any], shown: list[Any], answer: str) -> dict[Any, Any]:
    """The page with what was answered so far; the session knows it too, so that a stopped answer stays."""
    said = [*shown, {"role": "assistant", "content": _plain(answer)}]
    return {parts["chatbot"]: said, parts["talk"]: {"chat": [*chat, assistant_turn(answer)], "shown": said}}


def _medium(path: str) -> dict[str, Any]:
    if modality_of(path) == "point_cloud":
        viewer = gr.Model3D(value=clouds.shown(path), height=260, label=Path(path).name)
        return {"role": "user", "content": viewer}
    return {"role": "user", "content": {"path": path, "alt_text": Path(path).name}}


def _plain(text: str) -> str:
    """A chat's bubbles read Markdown, and HTML outside of code: tags that a model wrote are shown, not obeyed."""
    parts = CODE.split(text)
    return "".join(part if place % 2 else escape(part, quote=False) for place, part in enumerate(parts))


def _spans(found: list[Span] | None = None) -> dict[str, Any]:
    """A line's end is a sign of its own: a span then stays one, however many lines it has."""
    return gr.update(value=[(text.replace("\n", "↵ "), route) for text, route in found or []], visible=bool(found))


def _idle() -> dict[str, Any]:
    return gr.update(value=None, submit_btn=True, stop_btn=False)


def _busy() -> dict[str, Any]:
    return gr.update(value=None, submit_btn=False, stop_btn=True)


def _head(merged: MergedModel, colors: dict[str, str]) -> str:
    chips = "".join(f'<span style="background:{colors[name]}">{escape(name)}</span>' for name in merged.routes)
    experts = ", ".join(merged.experts)
    about = f"one language model, {len(merged.experts)} experts ({experts}), merged without training"
    return f'<h1>{escape(merged.name)}</h1><p>{escape(about)}</p><div class="routes">{chips}</div>'
