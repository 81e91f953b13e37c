"""Processor classes by name: those of transformers, and our own for what transformers has no class for.

Enters: a class's name, as processor_config.json holds it. Leaves: the class. Invariant: no name is looked up anywhere
but in transformers and among the classes marked with `own_class`.
"""

from transformers import ProcessorMixin

OWN_CLASSES: dict[str, type] = {}


def own_class(cls: type) -> type:
    """Marks a class that transformers does not have, so that its name is found."""
    OWN_CLASSES[cls.__name__] = cls
    return cls


def class_by_name(name: str) -> type:
    """The class of that name, ours or transformers'. Raises ValueError for a name that neither knows.

    Without torchvision transformers' image processors are stand-ins that fail; their Pillow twins are taken then.
    """
    if name in OWN_CLASSES:
        return OWN_CLASSES[name]
    try:
        found = ProcessorMixin.get_possibly_dynamic_module(name)
    except ValueError as error:
        raise ValueError(
            f"no class {name!r} in this version of transformers, nor among {sorted(OWN_CLASSES)}: update "
            "transformers, or register the class with its Auto class before loading"
        ) from error
    if getattr(found, "is_dummy", False) and not name.endswith("Pil"):
        return class_by_name(f"{name}Pil")
    return found
