"""From Hydra's composed configuration to checked, typed settings."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.storage import absolute
from pipelines.settings import Settings


def register_schema() -> None:
    ConfigStore.instance().store(name="schema", node=Settings)


def to_settings(config: DictConfig) -> Settings:
    """Check the configuration and freeze it.  Raises ValueError naming the key that is wrong or missing."""
    try:
        missing = OmegaConf.missing_keys(config)
        if missing:
            raise ValueError(f"set {', '.join(f'{key}=…' for key in sorted(missing))}: no default is given")
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error
    assert isinstance(settings, Settings)
    settings.check()
    settings.storage = absolute(settings.storage)
    if settings.data.root:
        settings.data.root = absolute(settings.data.root)
    return settings


def load_settings(*overrides: str, **values: Any) -> Settings:
    """Settings as `rayograph` would compose them from these overrides; for tests, notebooks and benchmarks."""
    register_schema()
    with initialize_config_module("pipelines.conf", version_base="1.3"):
        config = compose("config", [*overrides, *(f"{key}={value}" for key, value in values.items())])
    return to_settings(config)
