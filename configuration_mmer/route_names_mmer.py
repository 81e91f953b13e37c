"""The words and numbers of modalities and routes, apart from the functions that need tensors.

A command line reads them before torch is there. A route is an integer: 0 is the base LLM, 1 the merged vector, 2 + i
the decoupled parameters of expert i. Invariant: a modality's place in `MODALITIES` and an expert's in the config are
what a merged folder holds; neither is ever sorted anew.
"""

# the order is that of `mm_token_type_ids` in transformers (0 text, 1 image, 2 video, 3 audio); 4 is ours
MODALITIES = ("image", "video", "audio", "point_cloud")

BASE_ROUTE = 0
MERGED_ROUTE = 1
FIRST_EXPERT_ROUTE = 2
ROUTE_NAMES = ("base", "merged")
AUTO = "auto"


def named_route(name: str, experts: list[str]) -> int:
    """The route id of `base`, `merged` or an expert's name. Raises ValueError for any other word."""
    known = [*ROUTE_NAMES, *experts]
    if name not in known:
        raise ValueError(f"unknown route {name!r}: this model knows {AUTO!r} and {known}")
    return known.index(name)
