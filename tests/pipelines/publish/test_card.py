"""What the cards of a published generator and corpus say."""

from __future__ import annotations

import pytest

from pipelines.graph.compose import load_settings
from pipelines.publish.card import corpus_card, generator_card

RECORD = {"fingerprint": "0123456789abcdef", "code": {"rayograph": "0.1.0"}}
METRICS = {"ingest": {"source": "mix", "size": 64, "images": 104, "patients": 90, "splits": {"train": 80}, "terms": {
    "jsrt": {"title": "JSRT", "licence": "research and education", "citation": "Shiraishi et al., 2000", "sign": ""},
    "ours": {"title": "Films of our hospital", "licence": "in-house only", "citation": "", "sign": "ethics board"}}}}


@pytest.mark.parametrize("card", [generator_card, corpus_card])
def test_licence_and_citation_of_every_source_are_on_the_card(card, tmp_path):
    text = card(load_settings(f"storage={tmp_path}"), METRICS, RECORD, {})
    assert "| JSRT | research and education | none | Shiraishi et al., 2000 |" in text
    assert "| Films of our hospital | in-house only | ethics board | none |" in text
