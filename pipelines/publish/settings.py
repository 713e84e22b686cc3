"""Settings of publishing."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PublishSettings:
    """Where generator and corpus are published, and under which licence."""

    target: str = "local"
    """local, or the Hub user or organisation to push to (token from HF_TOKEN)."""
    private: bool = True
    """Create repositories as private."""
    license: str = "other"
    """Licence identifier of generator and corpus on the Hub."""
    allow: list[str] = field(default_factory=list)
    """Privacy gates whose failure does not block a push to the Hub."""

    def check(self) -> None:
        """Every value is valid."""
