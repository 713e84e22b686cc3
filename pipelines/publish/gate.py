"""What keeps a corpus or a generator in the house."""

from __future__ import annotations

from typing import Any

MAX_COPIES_OVER_FLOOR = 0.02  # share of images nearer to a train image than real held-out images are


def failed_gates(figures: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The gates that fail, each with the reason; a figure that was not measured fails its gate."""
    evaluated = figures.get("evaluate", {})
    if "copies" not in evaluated:
        return {"memorisation": "the share of copies was not measured"}
    copies, floor = evaluated["copies"], evaluated["copies_floor"]
    if copies > floor + MAX_COPIES_OVER_FLOOR:
        return {"memorisation": f"{copies:.1%} of the synthetic images lie nearer to a train image than real held-out "
                                f"images do ({floor:.1%})"}
    return {}
