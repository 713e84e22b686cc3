"""Privacy gates, which block a push to the Hub if they fail."""

from __future__ import annotations

from typing import Any

MAX_COPIES_OVER_FLOOR = 0.02  # how far the share of copies may exceed that of held-out real images


def failed_gates(metrics: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The gates that fail, by name, each with the reason.  A metric that was not measured fails its gate."""
    evaluated = metrics.get("evaluate", {})
    if "copies" not in evaluated:
        return {"memorisation": "the share of copies was not measured"}
    copies, floor = evaluated["copies"], evaluated["copies_floor"]
    if copies > floor + MAX_COPIES_OVER_FLOOR:
        return {"memorisation": f"{copies:.1%} of the synthetic images are unusually close to a training image; for "
                                f"held-out real images it is {floor:.1%} (allowed: floor + "
                                f"{MAX_COPIES_OVER_FLOOR * 100:.0f} points)"}
    return {}
