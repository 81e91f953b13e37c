"""`transformers serve` with a merged folder, asked by the openai client: text, pictures, sounds, routes, streams.

The server is a process that cannot import our rooms; what it answers is what the model generates here. Skipped where
openai, fastapi or uvicorn are missing.
"""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from merging_mmer import Recipe, merge
from modeling_mmer import MMERForConditionalGeneration
from processing_mmer import MMERProcessor
from tests import tiny_world

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

SERVE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import blocked_rooms
blocked_rooms.block()
from transformers.cli.transformers import main
main()
"""
TOKENS = 6
QUESTION = {"type": "text", "text": "what is this ?"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    merged = folder / "mmer-tiny"
    merge(Recipe.from_dict(tiny_world.make(folder / "world")), merged, progress=False)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / "picture.png")
    soundfile.write(folder / "sound.wav", rng.uniform(-0.5, 0.5, 16000), 16000)
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(Path(__file__).parent), "serve", str(merged), "--trust-remote-code"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(
            [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, env=env, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", running, folder / "log")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        yield SimpleNamespace(client=client, merged=merged, folder=folder)
    finally:
        running.terminate()
        running.wait()


def wait_for(address: str, running: subprocess.Popen, log: Path):
    for _ in range(1500):
        assert running.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(address).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer at {address}: {log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def here(served):
    """What the merged model generates in this process, for blocks with paths."""
    model = MMERForConditionalGeneration.from_pretrained(served.merged).eval()
    processor = MMERProcessor.from_pretrained(served.merged)

    def answer(*content: dict, **how) -> str:
        chat = [{"role": "user", "content": [*content, QUESTION]}]
        words = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **how)
        batch = processor.apply_chat_template(chat, **words)
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=TOKENS)
        return processor.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def in_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def blocks(served, *names: str) -> tuple[list[dict], list[dict]]:
    """(as OpenAI's API has them, as our own chats have them)."""
    picture, sound = served.folder / "picture.png", served.folder / "sound.wav"
    known = {
        "image": (
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{in_base64(picture)}"}},
            {"type": "image", "path": str(picture)},
        ),
        "audio": (
            {"type": "input_audio", "input_audio": {"data": in_base64(sound), "format": "wav"}},
            {"type": "audio", "path": str(sound)},
        ),
    }
    return [known[name][0] for name in names], [known[name][1] for name in names]


def asked(served, content: list[dict], **more):
    return served.client.chat.completions.create(
        model=str(served.merged), messages=[{"role": "user", "content": [*content, QUESTION]}], max_tokens=TOKENS,
        temperature=0, **more,
    )  # fmt: skip


@pytest.mark.parametrize("names", [(), ("image",), ("audio",), ("image", "audio")], ids="-".join)
def test_the_server_answers_as_the_model_does(served, here, names):
    theirs, ours = blocks(served, *names)
    answer = asked(served, theirs)
    assert answer.choices[0].message.content == here(*ours)
    assert answer.usage.completion_tokens <= TOKENS


def test_different_media_get_different_answers(served):
    answers = {asked(served, blocks(served, *names)[0]).choices[0].message.content for names in ((), ("image",))}
    assert len(answers) == 2


def test_a_request_may_name_a_route(served, here):
    theirs, ours = blocks(served, "image")
    answer = asked(served, theirs, extra_body={"chat_template_kwargs": {"text_route": "merged"}})
    assert answer.choices[0].message.content == here(*ours, text_route="merged") != here(*ours)


def test_a_stream_is_the_same_answer(served, here):
    theirs, ours = blocks(served, "image")
    parts = [chunk.choices[0].delta.content or "" for chunk in asked(served, theirs, stream=True)]
    assert "".join(parts) == here(*ours)


def test_the_server_lists_the_model(served):
    assert [model.id for model in served.client.models.list()] == [str(served.merged)]
