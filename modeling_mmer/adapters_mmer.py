"""A LoRA adapter of PEFT that acts on one route's tokens alone.

Enters: a model on which PEFT has put an adapter, and a route. Leaves: the same modules; for tokens of other routes
B·A gives zeros, which its layer adds to what it had. Invariant: on every other route the model computes what it
computes without the adapter, and the adapter learns from its own route's tokens alone. The route is remembered by the
name of a buffer beside B, which PEFT saves and loads with the adapter.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from configuration_mmer.routes_mmer import BASE_ROUTE, named_route

from .route_plan_mmer import current_plan

_MARK = "only_on_"


class OnRoute:
    """A forward hook of B: zeros for the tokens of other routes. (batch, sequence, out) in and out."""

    def __init__(self, route: int):
        self.route = route

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        plan = current_plan()
        if (BASE_ROUTE if plan is None else plan.single) == self.route:
            return output
        if plan is None or plan.single is not None:
            return output.masked_fill(torch.ones((), dtype=torch.bool, device=output.device), 0)
        if output.shape[:2] != plan.route_ids.shape:
            raise ValueError(
                f"an adapter that is kept to a route got tokens {tuple(output.shape[:2])}, but the routes are for "
                f"{tuple(plan.route_ids.shape)}: expected the whole batch, without `adapter_names`"
            )
        others = plan.route_ids.to(output.device) != self.route
        return output.masked_fill(others.unsqueeze(-1), 0)


class NotMerged:
    """In the place of a layer's `merge`: the weights that it would add to belong to every route."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, safe_merge: bool = False, adapter_names: list[str] | None = None):
        kept = {name: route for name, b in self.layer.lora_B.items() if (route := kept_route(b)) is not None}
        for name in self.layer.active_adapters if adapter_names is None else adapter_names:
            if name in kept:
                raise ValueError(
                    f"adapter {name!r} is kept to the route {kept[name]!r}, and merging would put it into every "
                    f"route: leave it unmerged, or let it act on all by keep_adapter_to(None, {name!r}) first"
                )
        return type(self.layer).merge(self.layer, safe_merge=safe_merge, adapter_names=adapter_names)


def kept_route(b: nn.Module) -> str | None:
    """The name of the route that the adapter with this B is kept to."""
    return next((name.removeprefix(_MARK) for name in b._buffers if name.startswith(_MARK)), None)


class RouteAdapters:
    """Mixed into the model."""

    config: Any
    named_modules: Any
    get_submodule: Any

    def keep_adapter_to(self, route: str | None, adapter: str = "default"):
        """Let a LoRA adapter of PEFT act on the tokens of one route (base, merged, an expert's name) alone.

        Called after `get_peft_model`, or `add_adapter`, and before training; saved and loaded with the adapter. With
        None it acts on all routes again. Parts of it in the expert's own encoder act there. Raises ValueError for an
        unknown route or adapter, and for an adapter of which something would act on other routes too.
        """
        number = None if route is None else named_route(route, self.config.expert_names)
        modules = dict(self.named_modules())

        def having(part: str) -> list[str]:
            return [name for name, module in modules.items() if adapter in (getattr(module, part, None) or ())]

        layers = having("lora_B")
        if not layers:
            raise ValueError(f"this model has no LoRA adapter {adapter!r}: put one on it with PEFT first")
        everywhere = {
            "modules_to_save": having("modules_to_save"),
            "embeddings": having("lora_embedding_B"),
            "DoRA and other variants": having("lora_variant"),
            "other experts' encoders": [n for n in layers if _in_towers(n) and f".experts.{route}." not in f".{n}"],
        }
        for what, found in everywhere.items():
            if found and route is not None:
                raise ValueError(
                    f"adapter {adapter!r} changes {found[0]}, which acts on other routes too: to keep it to "
                    f"{route!r}, make it without {what}"
                )
        for name in layers:
            if not _in_towers(name):
                _mark(modules[name], adapter, route, number)

    def restore_adapter_routes(self, keys: Collection[str]) -> dict[str, str]:
        """Keep adapters that are being loaded to the routes that their tensors' names tell.

        Those names, and what they are called in this model: PEFT puts an adapter's name into what it knows alone.
        """
        told = {}
        for key in keys:
            path, _, leaf = key.rpartition(".")
            layer, _, adapter = path.removesuffix(".lora_B").partition(".lora_B.")
            if ".lora_B" not in path or not leaf.startswith(_MARK):
                continue
            if not adapter:
                beside = f"{layer}.lora_B."
                named = next(other for other in keys if other.startswith(beside) and other != key)
                adapter = named.removeprefix(beside).partition(".")[0]
            route = leaf.removeprefix(_MARK)
            _mark(self.get_submodule(layer), adapter, route, named_route(route, self.config.expert_names))
            told[key] = f"{layer}.lora_B.{adapter}.{leaf}"
        return told

    def _load_from_state_dict(self, state_dict, prefix, *others):
        # what PEFT loads passes here before it reaches the layers
        here = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        for key, name in self.restore_adapter_routes(here).items():
            state_dict[prefix + name] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[misc]


def _in_towers(name: str) -> bool:
    return ".experts." in f".{name}"


def _mark(layer: Any, adapter: str, route: str | None, number: int | None):
    b = layer.lora_B[adapter]
    for name in [name for name in b._buffers if name.startswith(_MARK)]:
        delattr(b, name)
    for key in [key for key, hook in b._forward_hooks.items() if isinstance(hook, OnRoute)]:
        del b._forward_hooks[key]
    if number is not None:
        b.register_buffer(f"{_MARK}{route}", torch.ones((1, 1), dtype=torch.uint8, device=b.weight.device))
        b.register_forward_hook(OnRoute(number))
        layer.merge = NotMerged(layer)
