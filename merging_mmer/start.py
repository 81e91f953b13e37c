"""What makes the start of a command fast: no search for garbage while thousands of modules are imported.

Leaves: `collector_paused()`, and `own_process()` for a command line. Invariant: behind a pause the collector is on or
off as it was before.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_own_process = False


def own_process():
    """To be called by a command that is all its process is for: what is there behind a pause stays until the end.

    The collector then never looks through it, not even at the end: the system takes all memory back at once, and
    looking for garbage in a million objects first takes a second.
    """
    global _own_process
    if not _own_process:
        _own_process = True
        atexit.register(gc.freeze)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without cyclic garbage collection inside.

    torch and transformers make a million objects that stay; the collector would look through them again and again,
    for a fifth of the time that importing takes.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _own_process:
            gc.freeze()
        if was_on:
            gc.enable()


__all__ = ["collector_paused", "own_process"]
