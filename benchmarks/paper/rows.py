"""ModelCompose's question files to rows of `mmer evaluate`.

    python benchmarks/paper/rows.py data/test/MCUB-4.json --answers data/test/MCUB-answer.json \\
        --media data --out mcub-4.jsonl

In goes a JSON list of {"id", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}], "modal_inputs":
{"vision" | "audio" | "video" | "point": [path, …]}}, and, where the answers lie apart, a list of the same form whose
last turns are the answers, which is how their eval_avqa.py and eval_music_avqa.py read them. Out comes a row a line:
media columns with paths below --media, `question` without the placeholders and their labels (the merged model's own
template writes them), `answers`. Invariant: a row has an answer and as many media as its question has placeholders;
anything else is refused by its id.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

MODALITIES = {"vision": "image", "audio": "audio", "video": "video", "point": "point_cloud"}
_WORDS = {"image": "vision", "audio": "audio", "video": "video", "point": "point"}  # of a placeholder
_PLACEHOLDER = re.compile(r"(?:\b(?:image|audio|video|point)\s*:\s*)?<(image|audio|video|point)>[ \t]*\n?")


def answers_of(path: Path) -> dict[str, str]:
    """id -> the answer. Raises ValueError for another form."""
    found = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not turns or "id" not in entry or not isinstance(turns[-1].get("value"), str):
            shown = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{path}: found an entry with {shown}, expected id and conversations, an answer the last")
        found[str(entry["id"])] = turns[-1]["value"]
    return found


def row(entry: dict[str, Any], answers: dict[str, str] | None, media: Path) -> dict[str, Any]:
    """One row. Raises ValueError that names the id."""
    key = str(entry.get("id"))
    turns = entry.get("conversations", [])
    said = [turn["value"] for turn in turns if turn.get("from") == "human"]
    if len(said) != 1:
        raise ValueError(f"{key}: found {len(said)} turns of a human, expected one question")
    written = [turn["value"] for turn in turns if turn.get("from") == "gpt"]
    if answers is not None:
        written = [answers[key]] if key in answers else []
    if not written:
        raise ValueError(f"{key}: has no answer: give the file that has it as --answers")
    made: dict[str, Any] = {}
    for kind, paths in entry.get("modal_inputs", {}).items():
        if kind not in MODALITIES:
            raise ValueError(f"{key}: found media {kind!r}, expected some of {sorted(MODALITIES)}")
        if paths:
            made[MODALITIES[kind]] = [str(media / path) for path in paths]
    asked = [MODALITIES[_WORDS[word]] for word in _PLACEHOLDER.findall(said[0])]
    for kind in MODALITIES.values():
        if asked.count(kind) != len(made.get(kind, [])):
            raise ValueError(
                f"{key}: found {len(made.get(kind, []))} {kind} media and {asked.count(kind)} placeholders for them"
            )
    return {"id": key, **made, "question": _PLACEHOLDER.sub("", said[0]).strip(), "answers": written}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--answers", type=Path, help="where they lie apart from the questions")
    parser.add_argument(
        "--media", type=Path, default=Path("."), help="the folder that paths are below (default: here)"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    answers = answers_of(arguments.answers) if arguments.answers else None
    entries = json.loads(arguments.questions.read_text(encoding="utf-8"))
    rows = [row(entry, answers, arguments.media.absolute()) for entry in entries]
    arguments.out.write_text("".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in rows), encoding="utf-8")
    print(f"{len(rows)} rows in {arguments.out}")


if __name__ == "__main__":
    main()
