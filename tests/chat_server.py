"""A Space's page in a process of its own, as a user of the Hub has it: none of our rooms can be imported there.

    with ChatServer(model_folder, scratch) as server:
        Client(server.url)

usage of the script: python -m tests.chat_server SPACE_FOLDER PORT. It runs SPACE_FOLDER/app.py as the Hub does.
"""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ChatServer:
    """The page at `url` while the context lasts; `log` is what its process wrote."""

    def __init__(self, model: Path, scratch: Path, seconds: float = 600):
        self.space, self.log_file, self.seconds = scratch / "space", scratch / "server.log", seconds
        shutil.copytree(
            ROOT / "hub_cards/space", self.space, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
        (self.space / "space.json").write_text(json.dumps({"model": str(model), "revision": None}))
        (scratch / "blocked_rooms.py").write_bytes((ROOT / "tests/blocked_rooms.py").read_bytes())
        (scratch / "chat_server.py").write_bytes(Path(__file__).read_bytes())
        self.scratch = scratch

    def __enter__(self) -> "ChatServer":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(self.scratch / "uploads")}
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "chat_server.py", self.space, str(port)], cwd=self.scratch, env=env, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"the page did not start: {self.log[-4000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/config", timeout=5):
                    return self
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.2)
        self.__exit__()
        raise AssertionError(f"the page did not start in {self.seconds} s: {self.log[-4000:]}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


def main(space: str, port: str):
    import blocked_rooms

    blocked_rooms.block()
    sys.path.insert(0, space)
    sys.argv = ["app.py", "--port", port]
    runpy.run_path(f"{space}/app.py", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
