"""A Hub of local_hub.py, and the clients that work with it in processes of their own: huggingface_hub reads
HF_ENDPOINT once, and what users do is to be seen where our rooms cannot be imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .local_hub import LocalHub

ROOT = Path(__file__).resolve().parent.parent


def hub_settings(hub: LocalHub) -> dict[str, str]:
    """What huggingface_hub has to find in its environment, to work with this one and say little."""
    quiet = dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")
    return dict(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, **quiet)


def run_client(main: Callable[[LocalHub, Path], dict[str, Any]], token: str):
    """A client script with a Hub of its own: FACTS FOLDER are its arguments, FACTS gets what `main` returns."""
    with LocalHub(lfs=lambda repo, path: path.endswith(".safetensors"), token=token) as hub:
        os.environ |= {**hub_settings(hub), "HF_HUB_OFFLINE": "0", "COLUMNS": "200"}
        Path(sys.argv[1]).write_text(json.dumps(main(hub, Path(sys.argv[2]))))


@dataclass
class World:
    """One Hub, the script that plays its users, and what they said."""

    hub: LocalHub
    folder: Path
    client: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def environment(self, home: str, rooms: bool = False, **settings: str) -> dict[str, str]:
        unset = {"PYTHONPATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE"}
        env = {name: value for name, value in os.environ.items() if name not in unset}
        env |= hub_settings(self.hub) | dict(HF_HOME=str(self.folder / home), **settings)
        return env | ({"PYTHONPATH": str(ROOT)} if rooms else {})

    def run(self, task: str, argument: object, home: str, rooms: bool = False, **settings: str) -> dict[str, Any]:
        """What a task of the client saw. `home` holds its cache; only with `rooms` it can import ours."""
        scratch = self.folder / f"{task}{len(self.facts)}"
        scratch.mkdir()
        command = [sys.executable, self.client, task, scratch / "facts.json", str(argument)]
        env = self.environment(home, rooms, **settings)
        done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        self.facts[task] = json.loads((scratch / "facts.json").read_text())
        return self.facts[task]
