"""Whether config.json says which tokens see each other, as the experts' own classes have it.

Enters: `MergedFolder`. Leaves: what was seen, or a `Fault`. Each expert's class is built without memory from the
config in its entry, and its forward is read as the merge read it; a composed expert's tokens never see each other.
Invariant: an entry that lost or gained `bidirectional` is found without the originals. Nothing else would: such a
folder loads, and the expert's pictures are masked as it never was.
"""

from configuration_mmer.composed_config_mmer import ComposedConfig

from .fitness import bidirectional
from .folder_checks import Fault, MergedFolder
from .naming import class_on_meta


def check_attention(merged: MergedFolder) -> str:
    """`bidirectional` of every expert's entry is what its class does."""
    seen = []
    for name in merged.config.expert_names:
        config, expected = merged.config.expert_config(name), list[str]()
        kind = "a composed expert"
        if not isinstance(config, ComposedConfig):
            model = class_on_meta(config, multimodal=True)
            kind = type(model).__name__
            expected = [m for m in bidirectional(model, config) if m in merged.config.modalities(name)]
        found = merged.config.experts[name].get("bidirectional", [])
        if sorted(found) != sorted(expected):
            wanted = f'"bidirectional": {expected}'.replace("'", '"')
            raise Fault(
                f"config.json: experts.{name} has {f'bidirectional {found}' if found else 'no bidirectional'}",
                f"{wanted}, since in {kind} the tokens of such a medium see each other: write it into the entry, or "
                "merge again"
                if expected
                else f"none, since {kind} lets every token see those before it alone: take it out of the entry, or "
                "merge again",
            )
        seen += [f"{modality} of {name}" for modality in expected]
    return f"tokens see each other: {', '.join(seen)}" if seen else "every token sees those before it"
