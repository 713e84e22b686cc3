"""One numbering of the structures that masks outline, for all sets."""

from __future__ import annotations

from collections.abc import Collection

STRUCTURES = {"left_lung": 1, "right_lung": 2, "heart": 3, "lungs": 4, "polyp": 5, "pneumothorax": 6, "mask": 7}
"""Value of each structure in a mask; 0 is the background. Left and right are the patient's. `lungs` is both, where they
are not told apart, and `mask` what a user's own list outlines without a name."""

PARTS = {"lungs": ("left_lung", "right_lung")}
"""Structures that are also the union of others."""


def pixel_values(structure: str) -> tuple[int, ...]:
    """Values of the pixels that belong to a structure, those of its parts included."""
    return STRUCTURES[structure], *(STRUCTURES[part] for part in PARTS.get(structure, ()))


def is_outlined(structure: str, outlined: Collection[str]) -> bool:
    """Whether an image with these structures outlined tells where this one is: by itself, or by all of its parts."""
    parts = PARTS.get(structure, ())
    return structure in outlined or (bool(parts) and all(part in outlined for part in parts))
