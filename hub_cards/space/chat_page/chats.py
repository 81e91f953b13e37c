"""What a user typed and attached becomes a chat as the processor takes it; what the processor made becomes spans.

Enters: text, paths of files, the experts of each modality; ids, routes and kinds of one prompt, each (sequence,).
Leaves: messages with content blocks; (text, route) pairs in the order of the tokens. Invariant: a span never mixes two
routes, nor text with media, and the spans of a prompt count all its tokens.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

# `mm_token_type_ids` of transformers, and 4, point clouds
KINDS = ("text", "image", "video", "audio", "point cloud")
WORDS = {"image": "pictures", "video": "clips", "audio": "sounds", "point_cloud": "point clouds"}
ENDINGS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "video": (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"),
    "audio": (".wav", ".flac", ".ogg", ".mp3"),
    "point_cloud": (".npy", ".ply", ".obj", ".glb", ".stl"),
}
Span = tuple[str, str | None]


class Refused(ValueError):
    """What a user can mend, in words that can stand on the page."""


def modality_of(path: str | Path) -> str | None:
    """By the end of its name; None for any other."""
    ending = Path(path).suffix.lower()
    return next((modality for modality, endings in ENDINGS.items() if ending in endings), None)


def user_turn(
    text: str, files: Sequence[str], experts: dict[str, list[str]], chosen: dict[str, str | None]
) -> dict[str, Any]:
    """A user's message: the media in the order in which they were attached, then the text.

    experts: modality -> who takes it. chosen: modality -> who is to take it, None where that is left to the processor.
    Raises Refused where there is nothing to say, and for a file that no expert takes.
    """
    content: list[dict[str, Any]] = []
    for path in files:
        modality = modality_of(path)
        if modality is None or modality not in experts:
            known = ", ".join(f"{WORDS[one]} ({' '.join(ENDINGS[one])})" for one in experts)
            raise Refused(f"{Path(path).name} cannot be attached: expected {known or 'no files, text alone'}")
        expert = chosen.get(modality)
        if expert is not None and expert not in experts[modality]:
            raise Refused(f"no expert {expert!r} takes {WORDS[modality]}: expected one of {experts[modality]}")
        content.append({"type": modality, "path": str(path), **({"expert": expert} if expert else {})})
    if text.strip():
        content.append({"type": "text", "text": text.strip()})
    if not content:
        raise Refused("there is nothing to answer: write a question, or attach a file")
    return {"role": "user", "content": content}


def assistant_turn(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def media_paths(chat: Sequence[dict[str, Any]]) -> list[str]:
    return [block["path"] for message in chat for block in message["content"] if "path" in block]


def without_folders(message: str, chat: Sequence[dict[str, Any]]) -> str:
    """A message of the processor, with the names of files in place of where they lie on this machine."""
    for path in sorted(media_paths(chat), key=len, reverse=True):
        message = message.replace(path, Path(path).name)
    return message


def spans(
    ids: Sequence[int],
    routes: Sequence[int],
    kinds: Sequence[int],
    names: Sequence[str],
    decode: Callable[[list[int]], str],
) -> list[Span]:
    """Runs of tokens of one kind and route, each with its route's name; a medium is shown by its number of tokens."""
    found: list[Span] = []
    for (kind, route), run in groupby(zip(ids, routes, kinds, strict=True), key=lambda token: (token[2], token[1])):
        tokens = [token[0] for token in run]
        shown = decode(tokens) if kind == 0 else f"[{KINDS[kind]} × {len(tokens)}]"
        found.append((shown, names[route]))
    return found
