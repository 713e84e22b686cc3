"""Stage `publish`: a generator and a corpus that stand alone, each with its card; local, or pushed to the Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.progress import say
from pipelines.publish.card import corpus_card, generator_card
from pipelines.publish.gate import failed_gates
from pipelines.publish.settings import PublishSettings

DESCRIBED = ("ingest", "autoencoder", "encoder", "train", "sample", "evaluate", "finetune")  # on the cards


def publish(stage: Stage) -> Metrics:
    """Returns the number of images and files, where they went, and the privacy gates that failed.

    Raises:
        UserError: a push to the Hub is asked for and a gate fails that `publish.allow` does not name.
    """
    settings = stage.section(PublishSettings)
    figures = {role: stage.metrics_of(role) for role in DESCRIBED}
    failed = failed_gates(figures)
    for gate, why in failed.items():
        say(f"publish: the gate {gate!r} fails: {why}")
    refused = sorted(set(failed) - set(settings.allow))
    if settings.target != "local" and refused:
        raise UserError(f"nothing is pushed: {'; '.join(f'{gate}: {failed[gate]}' for gate in refused)}; "
                         f"publish.allow=[{','.join(refused)}] pushes all the same")
    record = stage.record_of("train")
    cards = {"generator": generator_card(stage.settings, figures, record, failed),
             "corpus": corpus_card(stage.settings, figures, record, failed)}
    files = 0
    sources = {"generator": stage.input("train") / "generator", "corpus": stage.input("sample") / "corpus"}
    for part, source in sources.items():
        with tempfile.TemporaryDirectory() as staging:
            local = Path(staging)
            source.download(local / "data" if part == "corpus" else local)
            (local / "README.md").write_text(cards[part])
            if part == "generator":
                set_defaults(local, figures["sample"])
            Folder(f"{stage.folder.uri}/{part}").upload(local)
            files += sum(path.is_file() for path in local.rglob("*"))
            if settings.target != "local":
                from pipelines.publish.hub import push

                push(local, f"{settings.target}/{stage.settings.name}-{part}",
                     "model" if part == "generator" else "dataset", private=settings.private)
    return {"images": figures["sample"]["images"], "files": files, "failed_gates": sorted(failed),
            "where": stage.folder.uri if settings.target == "local" else settings.target}


def set_defaults(generator: Path, sampled: Metrics) -> None:
    """Let a call without arguments sample as the corpus was sampled."""
    index = json.loads((generator / "model_index.json").read_text())
    index |= {"num_inference_steps": sampled["steps"], "guidance_scale": sampled["guidance"]}
    (generator / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
