"""Stage `publish`: a self-contained generator and corpus, each with its card; local, or pushed to the Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.generator.export import half_folder
from pipelines.graph.stage import Metrics, Stage
from pipelines.monitor.progress import say
from pipelines.publish.card import corpus_card, generator_card
from pipelines.publish.gate import failed_gates
from pipelines.publish.settings import PublishSettings

CARD_STAGES = ("ingest", "autoencoder", "encoder", "train", "sample", "evaluate", "finetune")  # on the cards


def publish(stage: Stage) -> Metrics:
    """Returns the number of images and files, where they went, and the privacy gates that failed.

    Raises:
        UserError: publish.target is the Hub and a gate fails that is not in `publish.allow`.
    """
    settings = stage.section(PublishSettings)
    metrics = {role: stage.metrics_of(role) for role in CARD_STAGES}
    failed = failed_gates(metrics)
    for gate, reason in failed.items():
        say(f"publish: the gate {gate!r} fails: {reason}")
    blocking = sorted(set(failed) - set(settings.allow))
    if settings.target != "local" and blocking:
        raise UserError(f"nothing is pushed: {'; '.join(f'{gate}: {failed[gate]}' for gate in blocking)}; "
                        f"add publish.allow=[{','.join(blocking)}] to push regardless")
    record = stage.record_of("train")
    cards = {"generator": generator_card(stage.settings, metrics, record, failed),
             "corpus": corpus_card(stage.settings, metrics, record, failed)}
    files = 0
    sources = {"generator": stage.input("train") / "generator", "corpus": stage.input("sample") / "corpus"}
    for artefact, source in sources.items():
        with tempfile.TemporaryDirectory() as staging:
            local = Path(staging)
            source.download(local / "data" if artefact == "corpus" else local)
            (local / "README.md").write_text(cards[artefact])
            if artefact == "generator":
                if (half := half_folder(source)).names():
                    half.download(local)
                set_defaults(local, metrics["sample"])
            Folder(f"{stage.folder.uri}/{artefact}").upload(local)
            files += sum(path.is_file() for path in local.rglob("*"))
            if settings.target != "local":
                from pipelines.publish.hub import push

                push(local, f"{settings.target}/{stage.settings.name}-{artefact}",
                     "model" if artefact == "generator" else "dataset", private=settings.private)
    return {"images": metrics["sample"]["images"], "files": files, "failed_gates": sorted(failed),
            "where": stage.folder.uri if settings.target == "local" else settings.target}


def set_defaults(generator: Path, sampling: Metrics) -> None:
    """Set the generator's default steps and guidance to those of the corpus."""
    index = json.loads((generator / "model_index.json").read_text())
    index |= {"num_inference_steps": sampling["steps"], "guidance_scale": sampling["guidance"]}
    (generator / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
