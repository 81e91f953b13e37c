"""Whether a merged folder is whole, sound and what it says it is.

Enters: a merged folder, or the Hub id of one, and if wanted the base and the original experts. Leaves: `Verification`,
a list of named checks, each passed, failed, skipped (with the reason) or remarked upon. Invariants: every check is
named in the result, whatever the others found; nothing is written, and no code of the folder is run.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .attention_check import check_attention
from .checkpoints import fetch
from .exact_check import check_exact
from .folder_checks import (
    Fault,
    MergedFolder,
    Remark,
    Skip,
    check_code,
    check_config,
    check_density,
    check_files,
    check_finite,
    check_masks,
    check_placeholders,
    check_processor,
    check_recipe,
    check_scales,
    check_tensors,
)
from .recipe import Recipe
from .source_checks import (
    Sources,
    check_base,
    check_load,
    check_residuals,
    check_sources,
    check_tokenizer,
    check_towers,
)

PASSED, FAILED, SKIPPED, WARNING = "passed", "failed", "skipped", "warning"


@dataclass(frozen=True)
class Check:
    """One check: its name, how it ended, what was found, and when it failed what was expected."""

    name: str
    status: str
    found: str
    expected: str = ""


@dataclass
class Verification:
    """The checks of one folder, in order."""

    folder: str
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No check failed. Skipped checks and warnings do not count against a folder."""
        return not self.failed

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if check.status == FAILED]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {"folder": self.folder, "ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def verify(
    folder: str | Path,
    originals: bool | Recipe | str | Path = False,
    base: str | None = None,
    load: bool = False,
    trust_remote_code: bool = False,
    on_check: Callable[[Check], None] | None = None,
) -> Verification:
    """Check a merged folder (or the Hub repository `org/name[@revision]`, which is downloaded).

    The base is compared when it is at hand (the recipe's folder, or in the Hub's cache) or given as `base`. With
    `originals` the original experts are compared too, from where the folder's own recipe says, or another recipe (its
    file); they are downloaded when they are not here. `load` loads the model beside the base and asks both. `on_check`
    is told of each check as it ends. Raises ValueError when there is no such folder.
    """
    merged = MergedFolder(fetch(str(folder)))
    other = None if isinstance(originals, bool) else originals
    if other is not None and not isinstance(other, Recipe):
        other = Recipe.load(other)
    sources = Sources(merged, base, bool(originals), other, trust_remote_code)
    result = Verification(str(folder))

    def run(name: str, check: Callable[[], str], needs: tuple[str, ...] = ()):
        broken = [needed for needed in needs if result[needed].status == FAILED]
        made = _skipped(name, broken) if broken else _made(name, check)
        result.checks.append(made)
        if on_check is not None:
            on_check(made)

    alone = {
        "config": (check_config, ()),
        "attention": (check_attention, ("config",)),
        "files": (check_files, ()),
        "tensors": (check_tensors, ("config", "files")),
        "finite": (check_finite, ("files",)),
        "masks": (check_masks, ("config", "files")),
        "scales": (check_scales, ("config", "files")),
        "density": (check_density, ("config", "files")),
        "processor": (check_processor, ("config",)),
        "placeholders": (check_placeholders, ("config",)),
        "recipe": (check_recipe, ("config",)),
        "code": (check_code, ("config",)),
    }
    for name, (check, needs) in alone.items():
        run(name, partial(check, merged), needs)
    compared = {
        "sources": (check_sources, ("config",)),
        "base": (check_base, ("config", "files")),
        "tokenizer": (check_tokenizer, ("config",)),
        "residuals": (check_residuals, ("config", "files")),
        "towers": (check_towers, ("config", "files")),
        "exact": (check_exact, ("config", "files")),
    }
    for name, (against, needs) in compared.items():
        run(name, partial(against, merged, sources), needs)
    if load:
        run("load", partial(check_load, merged, sources), ("config", "files", "tensors", "finite"))
    return result


def _skipped(name: str, broken: list[str]) -> Check:
    return Check(name, SKIPPED, f"cannot be told while {' and '.join(broken)} fails")


def _made(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, PASSED, check())
    except Fault as fault:
        return Check(name, FAILED, fault.found, fault.expected)
    except Skip as skip:
        return Check(name, SKIPPED, str(skip))
    except Remark as remark:
        return Check(name, WARNING, str(remark))
    except (ValueError, OSError) as error:  # in words, by what reads files here and in the libraries
        return Check(name, FAILED, str(error), "files that can be read")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON of another form
        return Check(name, FAILED, f"{type(error).__name__}: {error}", "files of the form that a merge writes")
