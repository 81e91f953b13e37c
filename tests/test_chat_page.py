"""The chat page, asked over its own interface: answers, experts and routes, refusals, and many users at once.

The page runs as a Space does, in a process that cannot import our rooms; what it should answer is asked of the model
directly.
"""

import threading
import time
import wave

import numpy as np
import pytest
from PIL import Image

from hub_cards.space.chat_page import merged_model
from mmer import merge
from modeling_mmer import MMERForConditionalGeneration
from processing_mmer import MMERProcessor
from tests import tiny_world
from tests.chat_server import ChatServer

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
page = pytest.importorskip("hub_cards.space.chat_page.page")
TOKENS = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    samples = np.random.default_rng(1).integers(-9000, 9000, 8000).astype(np.int16)
    for name, times in (("sound.wav", 1), ("long.wav", 6)):
        with wave.open(str(folder / name), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(16000)
            sound.writeframes(samples.tobytes() * times)
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:60])
    (folder / "broken.wav").write_bytes(b"RIFF\x00\x00\x00\x00WAVEnothing")
    (folder / "secret.png").write_bytes((folder / "picture.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    recipe = {**tiny_world.make(folder / "world"), "decoupling": {"kind": "mask", "rank": 2}}
    recipe["experts"]["other"] = {"model": recipe["experts"]["image"], "modality": "image", "lambda": 3.0}
    merge(recipe, folder / "merged", progress=False)
    return folder / "merged"


@pytest.fixture(scope="module")
def server(merged, tmp_path_factory):
    with ChatServer(merged, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def model(merged):
    return MMERForConditionalGeneration.from_pretrained(merged).eval(), MMERProcessor.from_pretrained(merged)


def client(server):
    return gradio_client.Client(server.url, verbose=False)


def ask(client, text, *paths, route="auto", expert="", tokens=TOKENS, heat=0, cut=False):
    """(what the chat shows, spans of the prompt, spans of the answer, note) of one question."""
    message = {"text": text, "files": [gradio_client.handle_file(str(path)) for path in paths]}
    _, chatbot, read, wrote, note = client.predict(message, route, tokens, heat, cut, expert, api_name="/ask")

    def spans(update):
        return [(span["token"], span["class_or_confidence"]) for span in update["value"] or []]

    return chatbot, spans(read), spans(wrote), note


def said(chatbot):
    return "".join(part["text"] for part in chatbot[-1]["content"])


def wanted(model, chat, route="auto", **settings):
    whole, processor = model
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, text_route=route, processor_kwargs=settings
    )
    out = whole.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), inputs


def user(text, *paths, **more):
    kinds = {".png": "image", ".wav": "audio"}
    media = [{"type": kinds[path.suffix], "path": str(path), **more} for path in paths]
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def plain(text):
    return " ".join(text.split())


def test_a_picture_is_answered_as_the_model_answers(server, model, files):
    chatbot, read, wrote, note = ask(client(server), "what is shown ?", files / "picture.png")
    answer, inputs = wanted(model, [user("what is shown ?", files / "picture.png")])
    assert plain(said(chatbot)) == plain(answer) and answer.strip()
    assert [message["role"] for message in chatbot] == ["user", "user", "assistant"]
    names = ["base", "merged", "image", "audio", "other"]
    routes = inputs["route_ids"][0].tolist()
    runs = [names[route] for place, route in enumerate(routes) if place == 0 or routes[place - 1] != route]
    assert {route for _, route in read} == set(runs) == {"image"}
    media = int((inputs["mm_token_type_ids"] == 1).sum())
    assert [text for text, _ in read if text.startswith("[")] == [f"[image × {media}]"]
    assert [route for _, route in wrote] == ["image"] and f"{len(routes)} tokens read" in note


def test_media_of_two_experts_have_their_own_colours(server, model, files):
    paths = files / "picture.png", files / "sound.wav"
    chatbot, read, wrote, _ = ask(client(server), "what is this ?", *paths)
    answer, _ = wanted(model, [user("what is this ?", *paths)])
    assert plain(said(chatbot)) == plain(answer)
    media = [(text.split(" ×")[0], route) for text, route in read if text.startswith("[")]
    assert media == [("[image", "image"), ("[audio", "audio")]
    assert {route for text, route in read if not text.startswith("[")} == {"merged"} == {route for _, route in wrote}


@pytest.mark.parametrize("route", ["base", "merged", "audio"])
def test_a_route_can_be_asked_for(server, model, route):
    chatbot, read, wrote, _ = ask(client(server), "what is red ?", route=route)
    assert plain(said(chatbot)) == plain(wanted(model, [user("what is red ?")], route)[0])
    assert {name for _, name in [*read, *wrote]} == {route}


def test_a_second_expert_is_asked_by_name(server, model, files):
    chatbot, read, wrote, _ = ask(client(server), "what is shown ?", files / "picture.png", expert="other")
    answer, _ = wanted(model, [user("what is shown ?", files / "picture.png", expert="other")])
    assert plain(said(chatbot)) == plain(answer) and {name for _, name in [*read, *wrote]} == {"other"}


def test_a_chat_keeps_its_media_and_begins_anew_for_others(server, model, files):
    mine = client(server)
    first, *_ = ask(mine, "what is shown ?", files / "picture.png")
    chatbot, read, _, _ = ask(mine, "describe the sound", files / "sound.wav")
    answer = wanted(model, [user("what is shown ?", files / "picture.png")])[0]
    history = [{"role": "assistant", "content": [{"type": "text", "text": said(first)}]}]
    chat = [user("what is shown ?", files / "picture.png"), *history, user("describe the sound", files / "sound.wav")]
    assert plain(answer) == plain(said(first)) and plain(said(chatbot)) == plain(wanted(model, chat)[0])
    assert len([text for text, _ in read if text.startswith("[")]) == 2
    other, read, _, _ = ask(client(server), "describe the dog")
    assert len(other) == 2 and not [text for text, _ in read if text.startswith("[")]


@pytest.mark.parametrize(
    ("file", "words"), [("broken.png", "cannot read the image broken.png"), ("broken.wav", "broken.wav")]
)
def test_a_broken_file_is_one_clear_message_and_the_chat_goes_on(server, model, files, file, words):
    mine = client(server)
    before = len(server.log)
    chatbot, read, wrote, _ = ask(mine, "what is shown ?", files / file)
    assert said(chatbot).startswith("**Not answered:**") and words in said(chatbot)
    assert "Traceback" not in said(chatbot) and "/" not in said(chatbot) and not read and not wrote
    chatbot, read, _, _ = ask(mine, "what is red ?")
    assert plain(said(chatbot)) == plain(wanted(model, [user("what is red ?")])[0])
    assert "Traceback" not in server.log[before:]


def test_a_sound_that_is_too_long_is_refused_or_cut(server, model, files):
    chatbot, *_ = ask(client(server), "what word is spoken ?", files / "long.wav")
    assert "long.wav: found 3.00 seconds, but expert 'audio' hears 1.00" in said(chatbot)
    chatbot, *_ = ask(client(server), "what word is spoken ?", files / "long.wav", cut=True)
    answer, _ = wanted(model, [user("what word is spoken ?", files / "long.wav")], audio_kwargs={"truncation": True})
    assert plain(said(chatbot)) == plain(answer)


def test_what_cannot_be_asked(server, files):
    chatbot, *_ = ask(client(server), "  ")
    assert "write a question, or attach a file" in said(chatbot)
    chatbot, *_ = ask(client(server), "what ? " * 150)
    assert "this model takes 256 together: start a new chat" in said(chatbot)


@pytest.mark.parametrize("uploaded", [True, False])
def test_files_of_the_server_cannot_be_asked_for(server, files, uploaded):
    """Without the client's help, which uploads what it is given: a path of the server's own goes into the request."""
    path = files / "secret.png"
    if uploaded:
        with path.open("rb") as content:
            (path,) = httpx.post(f"{server.url}/gradio_api/upload", files={"files": content}).json()
    file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    data = [{"text": "what ?", "files": [file]}, None, "auto", TOKENS, 0, False, ""]
    call = httpx.post(f"{server.url}/gradio_api/call/ask", json={"data": data}).json()["event_id"]
    said = httpx.get(f"{server.url}/gradio_api/call/ask/{call}", timeout=120).text
    assert ("event: complete" in said) is uploaded and ("event: error" in said) is not uploaded
    assert uploaded or "secret.png" not in said


def test_users_at_once_do_not_mix(server, model, files):
    asked = {
        "base": ("what is red ?",), "merged": ("what is blue ?",), "image": ("what is shown ?", files / "picture.png"),
        "audio": ("what word is spoken ?", files / "sound.wav"),
    }  # fmt: skip
    want = {name: plain(wanted(model, [user(*of)], name)[0]) for name, of in asked.items()}
    got = {name: [] for name in asked}

    def work(name):
        for _ in range(3):
            chatbot, read, wrote, _ = ask(client(server), *asked[name], route=name)
            got[name].append((plain(said(chatbot)), {route for _, route in [*read, *wrote]}))

    threads = [threading.Thread(target=work, args=(name,)) for name in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {name: [(want[name], {name})] * 3 for name in asked}
    assert len(set(want.values())) > 2


def test_an_answer_grows_and_can_be_stopped(server):
    before = len(server.log)
    message = {"text": "what is this ?", "files": []}
    job = client(server).submit(message, "image", 200, 1.0, False, "", api_name="/ask")
    for _ in job:
        if len(job.outputs()) >= 3:
            break
    assert len(job.outputs()) >= 3
    job.cancel()
    # the thread that generates is gone when the next question is answered
    chatbot, *_ = ask(client(server), "what is red ?", route="base")
    assert said(chatbot).strip()
    assert "Traceback" not in server.log[before:]


def test_a_call_that_is_cancelled_stops_the_model(model):
    """In this process, so that the thread that generates can be seen."""
    whole, processor = model
    built = page.build(merged_model.MergedModel(whole, processor, "tiny"), {})
    # the answer would take longer than this test may
    whole.generation_config.eos_token_id, ended = None, whole.generation_config.eos_token_id
    steps = []
    hook = whole.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.05)))
    try:
        _, url, _ = built.queue().launch(prevent_thread_lock=True, quiet=True)
        mine = gradio_client.Client(url, verbose=False)
        data = [{"text": "what is this ?", "files": []}, "image", 200, 0, False, ""]
        job = mine.submit(*data, api_name="/ask")
        wait_for(lambda: len(steps) > 3)
        job.cancel()
        wait_for(lambda: not any(thread.name == merged_model.GENERATES for thread in threading.enumerate()), 30)
        assert len(steps) < 150
    finally:
        hook.remove()
        whole.generation_config.eos_token_id = ended
        built.close()


def wait_for(happened, seconds=60):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_tags_are_shown_and_code_is_left_alone():
    assert page._plain("a <b> & `x < y` <i>") == "a &lt;b&gt; &amp; `x < y` &lt;i&gt;"
    assert page._plain("<b>\n```html\n<b>\n```\n<b>") == "&lt;b&gt;\n```html\n<b>\n```\n&lt;b&gt;"
    assert page._plain("```\nnot yet closed <b>") == "```\nnot yet closed <b>"


def test_what_the_page_offers_is_what_the_model_has(server):
    parts = {one["props"].get("elem_id"): one["props"] for one in client(server).config["components"]}
    assert [value for _, value in parts["route"]["choices"]] == ["auto", "base", "merged", "image", "audio", "other"]
    assert [value for _, value in parts["expert-image"]["choices"]] == ["", "image", "other"]
    assert "expert-audio" not in parts
    assert {".png", ".wav"} <= set(parts["box"]["file_types"]) and ".mp4" not in parts["box"]["file_types"]
    assert parts["shares"]["value"].count("<tr>") == 4  # a head and three experts
