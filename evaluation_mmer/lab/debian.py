"""Data that travels inside Debian packages: in goes a package's name, out comes the folder that it installs.

The folder is the installed one where the package is installed, else the package's own files, fetched with apt-get and
unpacked beside the cache without installing anything; they are gone when the context ends.
"""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .cache import LabError, Progress, say


@contextlib.contextmanager
def unpacked(
    package: str, installed: Path, megabytes: int, licence: str, beside: Path, progress: Progress = say
) -> Iterator[Path]:
    """The folder `installed`, or its twin in a temporary folder in `beside`, while the context lasts.

    Raises LabError where the package is neither installed nor to be had.
    """
    if installed.is_dir():
        yield installed
        return
    advice = f"Install it (apt-get install {package}), or put its files into {installed}."
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise LabError(f"these data come with Debian's {package}, and apt-get is not here. {advice}")
    progress(f"downloading {package} with apt-get ({megabytes} MB, {licence})")
    with tempfile.TemporaryDirectory(prefix=f".{package}.", dir=beside) as scratch:
        got = subprocess.run(["apt-get", "download", package], cwd=scratch, capture_output=True, text=True)
        archives = sorted(Path(scratch).glob("*.deb"))
        if got.returncode != 0 or not archives:
            raise LabError(f"apt-get download {package} failed: {got.stderr.strip()[-300:]}\n{advice}")
        subprocess.run(["dpkg-deb", "-x", str(archives[0]), scratch], check=True)
        archives[0].unlink()
        yield Path(scratch) / installed.relative_to("/")
