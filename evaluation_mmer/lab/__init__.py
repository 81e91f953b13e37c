"""Five small real experts on one small real LLM, for `mmer demo`, tests and measurements without a Hub account.

`build_base` and `build_expert` make folders that stock transformers and PEFT load; `load_expert` is an original
expert; `load_items` and `score` measure it on held-out items. `experts.py` says what comes from where.
"""

from .datasets import LabItem, load_items, score
from .experts import LabExpert, build_base, build_expert, load_expert

__all__ = ["LabExpert", "LabItem", "build_base", "build_expert", "load_expert", "load_items", "score"]
