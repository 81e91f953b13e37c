"""Which parameters process which token.

A route is an integer: 0 is the base LLM, 1 the merged vector, 2 + i the decoupled parameters of expert i. Enters:
token ids and the placeholder ids of the experts. Leaves: `route_ids` (batch, sequence) and `text_route` (batch,),
int64. Invariant: the processor and the model call the same function, so they can never disagree about a route.
"""

import torch

from .route_names_mmer import AUTO, BASE_ROUTE, FIRST_EXPERT_ROUTE, MERGED_ROUTE, MODALITIES, ROUTE_NAMES, named_route

_NO_EXPERT = -1


def text_routes(experts_of_media: torch.Tensor, wanted: str | list[str], experts: list[str]) -> torch.Tensor:
    """The route of the text of each sample, int64 (batch,).

    `experts_of_media` (batch, sequence) holds at each media token the index of its expert and -1 at text. `wanted` is
    one route name for all samples or one per sample; `auto` means: base without media, the expert when all media are
    its own, merged when several experts have media in the sample.
    """
    batch = experts_of_media.shape[0]
    per_sample = [wanted] * batch if isinstance(wanted, str) else list(wanted)
    if len(per_sample) != batch:
        raise ValueError(
            f"text_route names {len(per_sample)} routes for a batch of {batch} samples: give one name, or one each"
        )
    has_media = experts_of_media != _NO_EXPERT
    highest = experts_of_media.amax(-1)
    lowest = experts_of_media.masked_fill(~has_media, len(experts)).amin(-1)
    auto = torch.where(lowest == highest, highest + FIRST_EXPERT_ROUTE, MERGED_ROUTE)
    auto = torch.where(has_media.any(-1), auto, BASE_ROUTE)
    if all(name == AUTO for name in per_sample):
        return auto
    asked = [_NO_EXPERT if name == AUTO else named_route(name, experts) for name in per_sample]
    fixed = torch.tensor(asked, dtype=torch.int64, device=auto.device)
    return torch.where(fixed == _NO_EXPERT, auto, fixed)


def route_tokens(
    input_ids: torch.Tensor,
    placeholders: dict[int, int],
    experts: list[str],
    text_route: str | list[str] | torch.Tensor = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`route_ids` (batch, sequence), `text_route` (batch,)) from token ids, both int64 on the device of `input_ids`.

    `placeholders` maps a placeholder's token id to the index of the expert whose features stand there: a media token
    takes the route of the expert that encoded it. Text, padding included, takes the sample's `text_route`.
    """
    media = torch.full_like(input_ids, _NO_EXPERT)
    for token_id, expert in placeholders.items():
        media = media.masked_fill(input_ids == token_id, expert)
    if not isinstance(text_route, torch.Tensor):
        text_route = text_routes(media, text_route, experts)
    text_route = text_route.to(device=input_ids.device, dtype=torch.int64)
    if text_route.shape != input_ids.shape[:1]:
        raise ValueError(
            f"text_route has shape {tuple(text_route.shape)}, expected ({input_ids.shape[0]},), one route a sample"
        )
    route_ids = torch.where(media == _NO_EXPERT, text_route.unsqueeze(-1), media + FIRST_EXPERT_ROUTE)
    return route_ids, text_route


__all__ = [
    "AUTO",
    "BASE_ROUTE",
    "FIRST_EXPERT_ROUTE",
    "MERGED_ROUTE",
    "MODALITIES",
    "ROUTE_NAMES",
    "named_route",
    "route_tokens",
    "text_routes",
]
