"""Loads a merged folder as users do and generates, while every step out of the process is noted. Run by
test_shipped_safety.py.

usage: python watched_load.py REPO FACTS.json; writes {"seen": [(kind, what)], "provoked": …, "answers": n}.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress

import blocked_rooms

blocked_rooms.block()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NOTED = {
    "socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.system", "os.exec", "os.fork",
    "os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "shutil.rmtree", "ctypes.dlopen", "urllib.Request", "webbrowser.open",
}  # fmt: skip
noted: list[tuple[str, str]] = []
watching = False


def hook(event: str, arguments: tuple):
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (mode is None and flags & WRITING):
            noted.append(("write", os.fsdecode(path) if isinstance(path, str | bytes) else str(path)))
    elif event in NOTED:
        noted.append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(hook)
repo, facts = sys.argv[1:]
rng = np.random.default_rng(0)
picture = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
sound = rng.standard_normal(16000).astype(np.float32)

watching = True
model = AutoModel.from_pretrained(repo, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
media: list[list[dict]] = [[], [{"type": "image", "image": picture}], [{"type": "audio", "audio": sound}]]
text = {"type": "text", "text": "what is this ?"}
chats = [[{"role": "user", "content": [*blocks, text]}] for blocks in media]
batch = processor.apply_chat_template(
    chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
)
with torch.no_grad():
    answers = model.generate(**batch, do_sample=False, max_new_tokens=4)
watching = False
seen, noted = noted, []

watching = True
with open("written", "w"):
    pass
os.remove("written")
with suppress(OSError), socket.socket() as line:
    line.connect(("127.0.0.1", 1))
subprocess.run([sys.executable, "--version"], stdout=subprocess.DEVNULL, check=True)
os.system("true")
watching = False

assert blocked_rooms.still_blocked()
with open(facts, "w") as file:
    json.dump({"seen": seen, "provoked": noted, "answers": len(answers)}, file)
