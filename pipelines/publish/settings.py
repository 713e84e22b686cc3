"""Settings of publishing."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PublishSettings:
    """Where generator and corpus go, and under what terms."""

    target: str = "local"
    """local, or the Hub user or organisation to push to (token from HF_TOKEN)."""
    private: bool = True
    """Whether repositories that are made are private."""
    license: str = "other"
    """Of generator and corpus, as the Hub names licences."""
    allow: list[str] = field(default_factory=list)
    """Names of gates that may fail and still be pushed."""

    def check(self) -> None:
        """Nothing is out of range."""
