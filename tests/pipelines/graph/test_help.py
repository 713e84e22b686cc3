"""Every setting has a sentence, a default that fits its type, and a place on the page of settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cluster.errors import UserError
from pipelines.graph.compose import section_types
from pipelines.graph.fields import descriptions
from pipelines.graph.help import settings_page
from pipelines.graph.overrides import check_overrides

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


@pytest.mark.parametrize("section", section_types())
def test_every_field_has_its_sentence(section):
    kind = section_types()[section]
    sentences = descriptions(kind)
    for field in dataclasses.fields(kind):
        assert sentences.get(field.name, "").endswith("."), f"{section}.{field.name}"


def test_the_page_of_settings_is_up_to_date():
    assert PAGE.read_text() == settings_page(), "run `make docs`"


@pytest.mark.parametrize(("override", "close"), [
    ("trainer.zero_stge=3", "trainer.zero_stage"), ("sample.n=5", "sample"), ("data=kermanny", "kermany"),
    ("profle=demo", "profile"), ("+nosuch=1", "rayograph run --help")])
def test_an_override_of_what_is_not_there_is_told_with_what_comes_closest(override, close):
    with pytest.raises(UserError, match=close):
        check_overrides([override])


def test_what_is_there_passes():
    check_overrides(["trainer.lr=1,2", "data=kermany", "+graph.train.with={seed: 1}", "encoder.options.depth=2",
                     "--multirun", "hydra.verbose=true", "~graph.publish"])
