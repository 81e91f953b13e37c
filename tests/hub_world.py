"""A Hub of local_hub.py, and the clients that work with it in processes of their own: huggingface_hub reads
HF_ENDPOINT once, and what users do is to be seen where our rooms cannot be imported.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .local_hub import LocalHub

ROOT = Path(__file__).resolve().parent.parent


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
        env |= dict(HF_ENDPOINT=self.hub.url, HF_TOKEN=self.hub.token, HF_HOME=str(self.folder / home))
        env |= dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1", **settings)
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
