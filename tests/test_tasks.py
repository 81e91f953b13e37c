"""Tasks files and their rows: what is read, and what is refused with file and line."""

from pathlib import Path

import pytest

from evaluation_mmer.tasks import Item, load_items, load_tasks, task_type

from . import tiny_tasks as tiny

WRITTEN = {"name": "one", "data": "rows.jsonl"}
CHOSEN = {"name": "two", "data": "rows.jsonl", "scorer": "choice"}


def task_of(folder, **fields):
    (task,) = load_tasks(tiny.write_tasks(folder / "tasks.yaml", {**WRITTEN, **fields}))
    return task


def items_of(folder, rows, limit=None, **fields):
    tiny.write_rows(folder / "rows.jsonl", rows)
    return load_items(task_of(folder, **fields), limit)


def test_what_a_task_asks(tmp_path):
    tiny.write_media(tmp_path / "media", 2)
    rows = [
        {"image": "media/a0.png", "question": "what ?", "answers": "red"},
        {
            "image": ["media/a0.png", "media/a1.png"],
            "audio": "media/s0.wav",
            "question": "which ?",
            "answers": [1, "x"],
        },
        {"image": None, "question": "and ?", "answers": ["y"]},
    ]
    one, two, three = items_of(tmp_path, rows)
    assert one.modalities == ("image",) and one.text == "what ?" and one.answers == ("red",)
    assert two.modalities == ("image", "image", "audio") and two.answers == ("1", "x") and two.right is None
    assert three.media == () and three.where == f"{tmp_path / 'rows.jsonl'}:3"
    assert [medium.source for medium in two.media] == [
        str(tmp_path / "media" / name) for name in ("a0.png", "a1.png", "s0.wav")
    ]
    assert len(items_of(tmp_path, rows, limit=2)) == 2


def test_a_template_takes_any_column(tmp_path):
    rows = [{"question": "what ?", "answers": "x", "hint": "one word"}]
    (item,) = items_of(tmp_path, rows, template="{{ question }}\nAnswer in {{ hint }}.")
    assert item.text == "what ?\nAnswer in one word."
    with pytest.raises(ValueError, match=r"rows.jsonl:1: template of task 'one': 'other' is undefined.*\['answers'"):
        items_of(tmp_path, rows, template="{{ other }}")


def test_choices_of_a_row_and_of_a_task(tmp_path):
    rows = [{"question": "?", "answers": "b", "choices": ["a", "b"]}, {"question": "?", "answers": 1, "choices": "ab"}]
    (item,) = items_of(tmp_path, rows[:1], scorer="choice")
    assert item.choices == ("a", "b") and item.right == 1 and item.answers == ()
    first, second = items_of(tmp_path, rows, scorer="choice", choices=["b", "a", "7"])
    assert (first.right, second.right) == (0, 1)
    # a number that is itself a choice is that choice, not its place
    (seven,) = items_of(tmp_path, [{"question": "?", "answers": 7}], scorer="choice", choices=["b", "7"])
    assert seven.right == 1


def test_the_digest_is_of_what_is_asked(tmp_path):
    tiny.write_media(tmp_path / "media", 2)
    row = {"image": "media/a0.png", "question": "what ?", "answers": "red"}
    (item,) = items_of(tmp_path, [row])
    assert items_of(tmp_path, [{**row, "answers": "blue"}])[0].digest == item.digest
    assert items_of(tmp_path, [{**row, "question": "which ?"}])[0].digest != item.digest
    (tmp_path / "media" / "a0.png").write_bytes((tmp_path / "media" / "a1.png").read_bytes())
    assert items_of(tmp_path, [row])[0].digest != item.digest


def test_the_type_is_the_hubs_word_for_the_media(tmp_path):
    tiny.write_media(tmp_path / "media", 1)
    row = {"question": "?", "answers": "x"}
    image, audio = {"image": "media/a0.png"}, {"audio": "media/s0.wav"}
    found = [
        task_type(task_of(tmp_path), items_of(tmp_path, [{**row, **media}]))
        for media in ({}, image, audio, {**image, **audio})
    ]
    assert found == ["text-generation", "image-text-to-text", "audio-text-to-text", "any-to-any"]
    assert task_type(task_of(tmp_path, type="visual-question-answering"), []) == "visual-question-answering"


ROWS = {
    "no answers": ({"question": "?"}, {}, r"rows.jsonl:2: has no 'answers', only \['question'\]"),
    "empty answers": ({"question": "?", "answers": []}, {}, r"rows.jsonl:2: answers: found \[\], expected one answer"),
    "no question": ({"answers": "x"}, {}, r"rows.jsonl:2: has no 'question'"),
    "empty question": ({"question": " ", "answers": "x"}, {}, "rows.jsonl:2: question: found ' ', expected the words"),
    "missing medium": (
        {"question": "?", "answers": "x", "image": "no.png"}, {}, r"rows.jsonl:2: image: there is no file .*no.png",
    ),
    "a medium that is none": ({"question": "?", "answers": "x", "image": 3}, {}, "rows.jsonl:2: image: found 3"),
    "no column": (
        {"question": "?", "answers": "x"}, {"media": {"image": "picture"}}, "rows.jsonl:2: has no 'picture' for",
    ),
    "no choices": ({"question": "?", "answers": "x"}, {"scorer": "choice"}, "rows.jsonl:2: has no 'choices'"),
    "one choice twice": (
        {"question": "?", "answers": "x", "choices": ["x", "x"]}, {"scorer": "choice"}, "rows.jsonl:2: choices: found",
    ),
    "no right choice": (
        {"question": "?", "answers": "z", "choices": ["x", "y"]}, {"scorer": "choice"},
        r"rows.jsonl:2: answers: found 'z', expected the one right choice of \['x', 'y'\]",
    ),
    "a place behind the choices": (
        {"question": "?", "answers": 2, "choices": ["x", "y"]}, {"scorer": "choice"}, "rows.jsonl:2: answers: found 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_cannot_be_asked(case, tmp_path):
    row, fields, message = ROWS[case]
    right = {"question": "?", "answers": "x", "choices": ["x", "y"], "picture": None}
    with pytest.raises(ValueError, match=message):
        items_of(tmp_path, [right, row], **fields)


def test_rows_that_are_none(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answers": "x"}\n\n{"question"\n')
    with pytest.raises(ValueError, match="rows.jsonl:3: not readable as JSON"):
        load_items(task_of(tmp_path))
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: found \[1\], expected a JSON object"):
        load_items(task_of(tmp_path))
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"tasks.yaml:2: data: .*rows.jsonl has no rows"):
        load_items(task_of(tmp_path))
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match=r"tasks.yaml:2: data: there is no file .*rows.jsonl"):
        load_items(task_of(tmp_path))


FILES = {
    "tasks:\n- name: a\n  data: x\n  scorer: bleu\n": r"tasks.yaml:4: scorer: .*'exact_match'.*found 'bleu'",
    "tasks:\n- name: a\n  data: x\n  scoer: caption\n": r"tasks.yaml:4: scoer: unknown field, expected some of",
    "tasks:\n- name: a\n": r"tasks.yaml:2: data: Field required",
    "tasks:\n- name: a b\n  data: x\n": r"tasks.yaml:2: name: .*found 'a b'",
    "tasks:\n- name: a\n  data: x\n- name: a\n  data: y\n": r"tasks.yaml:4: the name 'a' is there twice",
    "tasks:\n- name: a\n  data: x\n  media: {smell: s}\n": r"tasks.yaml:4: media.smell",
    "tasks:\n- name: a\n  data: x\n  template: '{{ a'\n": r"tasks.yaml:2: template: found '\{\{ a', which is no Jinja",
    "tasks:\n- name: a\n  data: x\n  max_new_tokens: 0\n": r"tasks.yaml:4: max_new_tokens: .*found 0",
    "tasks: []\n": "`tasks` is empty",
    "- a\n": "found list, expected a mapping `tasks` alone",
    "tasks: [a]\nmore: b\n": r"found \['more', 'tasks'\]",
    "tasks:\n- {name: a, data: x, data: y}\n": "'data' is given twice",
    "tasks: &a\n- *a\n": "has aliases",
    "tasks: [": "not readable as YAML",
    "": "found NoneType",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_is_refused(text, tmp_path):
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(ValueError, match=FILES[text]):
        load_tasks(tmp_path / "tasks.yaml")


def test_every_fault_is_listed_and_a_missing_file_named(tmp_path):
    path = tiny.write_tasks(tmp_path / "tasks.yaml", {"name": "a"}, {**WRITTEN, "scorer": "judge"})
    with pytest.raises(ValueError, match=r"(?s)tasks.yaml:2: data: .*\n.*tasks.yaml:5: scorer"):
        load_tasks(path)
    with pytest.raises(ValueError, match="nothing.yaml: there is no file of this name"):
        load_tasks(tmp_path / "nothing.yaml")


def test_a_dataset_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    task = task_of(tmp_path, data={"dataset": "org/name", "split": "test"})
    with pytest.raises(ValueError, match=r"tasks.yaml:2: data: org/name \(test\) needs the library `datasets`"):
        load_items(task)


def test_a_dataset_by_its_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    tiny.write_media(tmp_path / "media", 2)
    rows = [
        {"image": str(tmp_path / "media" / f"a{n}.png"), "question": f"what {n} ?", "answers": ["x"]} for n in range(2)
    ]
    held = [{**row, "image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in rows]
    made = datasets.Dataset.from_list(held).cast_column("image", datasets.Image())
    (tmp_path / "folder").mkdir()
    made.to_parquet(tmp_path / "folder" / "test.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = task_of(tmp_path, data={"dataset": "folder"})
    first, second = load_items(task)
    assert first.where == "folder (test)[0]" and second.text == "what 1 ?"
    assert first.media[0].encoded == (tmp_path / "media" / "a0.png").read_bytes()
    assert first.media[0].value().size == (24, 20)
    # the same bytes are the same item, wherever they come from
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    assert [item.digest for item in load_items(task_of(tmp_path, data=file.name))] == [first.digest, second.digest]


def test_items_are_told_apart_by_their_words():
    plain = Item("t", "w", (), "what ?", ("x",))
    assert plain.digest == Item("other", "place", (), "what ?", ()).digest
    assert plain.digest != Item("t", "w", (), "what ?", (), ("a", "b"), 0).digest
