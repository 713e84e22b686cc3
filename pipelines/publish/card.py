"""Cards of the published generator and corpus: origin, quality, privacy, and what they are not for."""

from __future__ import annotations

from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from pipelines.graph.settings import Settings

Figures = dict[str, dict[str, Any]]

LIMITS = """\
## Intended use and limits
For research on medical image analysis: pre-training, augmentation, method development. **Not for diagnosis.** Images
are synthetic and may show anatomy or disease that no patient has; findings rare in the training data are rarer here.
The memorisation check is a heuristic over embeddings and gives no guarantee of privacy in the sense of differential
privacy."""

USE_GENERATOR = """\
## Use
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
image = pipe().images[0]  # nothing given
images = pipe(image=radiograph, batch_size=4).images  # around a real image
images = pipe(embedding=embedding).images  # at a place of the embedding manifold{labels}
```"""

USE_CORPUS = """\
## Use
```python
from datasets import load_dataset

corpus = load_dataset("parquet", data_files="DIR/data/*.parquet", split="train")
corpus[0]["image"], corpus[0]["labels"]
```"""


def generator_card(settings: Settings, figures: Figures, record: dict[str, Any], failed: dict[str, str]) -> str:
    header = ModelCardData(license=settings.publish.license, library_name="diffusers",
                           tags=["medical", "chest-x-ray", "diffusion", "rayograph"])
    labels = figures.get("ingest", {}).get("labels", {})
    known = labels and settings.condition.labels
    example = f'\nimages = pipe(labels=["{next(iter(labels))}"]).images' if known else ""
    train, autoencoder = figures.get("train", {}), figures.get("autoencoder", {})
    training = _table(("training", "figure"), [
        ("images seen", train.get("images")), ("loss", train.get("loss")), ("parameters", train.get("parameters")),
        ("images/s", train.get("images_per_second")), ("autoencoder PSNR, dB", autoencoder.get("psnr")),
        ("encoder", figures.get("encoder", {}).get("weights")), ("training fingerprint", record["fingerprint"]),
        ("code", " ".join(record["code"].values()))])
    return _join(header.to_yaml(), f"# {settings.name}: chest X-ray generator",
                 f"Latent diffusion of {figures['ingest']['size']}-pixel chest X-rays, conditioned on image "
                 "embeddings.",
                 USE_GENERATOR.format(labels=example), _sources(settings, figures), "## Training\n" + training,
                 _quality(figures), _privacy(failed), LIMITS)


def corpus_card(settings: Settings, figures: Figures, record: dict[str, Any], failed: dict[str, str]) -> str:
    header = DatasetCardData(license=settings.publish.license,
                             tags=["medical", "chest-x-ray", "synthetic", "rayograph"],
                             configs=[{"config_name": "default", "data_files": "data/*.parquet"}])
    sampled = figures.get("sample", {})
    making = _table(("sampling", "figure"), [
        ("images", sampled.get("images")), ("strategy", sampled.get("strategy")), ("steps", sampled.get("steps")),
        ("guidance", sampled.get("guidance")), ("generator (training fingerprint)", record["fingerprint"])])
    return _join(header.to_yaml(), f"# {settings.name}: synthetic chest X-rays",
                 "Every row tells the real images its condition was made from (`source_image_ids`, hashes of content), "
                 "its seed and its generator.",
                 USE_CORPUS, _sources(settings, figures), "## Sampling\n" + making, _quality(figures), _privacy(failed),
                 LIMITS)


def _join(header: str, *sections: str) -> str:
    return f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table of the rows whose figures are known."""
    known = [row for row in rows if all(value is not None for value in row)]
    lines = [head, ("---",) * len(head), *known]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


def _sources(settings: Settings, figures: Figures) -> str:
    ingest = figures.get("ingest", {})
    return (f"## Data\nLearned from the train split of `{ingest['source']}`: {ingest.get('images', '?')} images "
            f"of {ingest.get('patients', '?')} patients in all, split by patient ({ingest.get('splits', {})}). The "
            "licence and the terms of the source data bind what is made from it; check them before passing this on.")


def _quality(figures: Figures) -> str:
    found = figures.get("evaluate", {})
    names = ("frechet", "precision", "recall", "density", "coverage", "ms_ssim")
    fidelity = _table(("metric", "synthetic", "real against real"),
                      [(name, found.get(name), found.get(f"{name}_floor")) for name in names])
    utility = _table(("classifier trained on", "AUC", "F1"), [
        (arm, figures.get("finetune", {}).get(arm, {}).get("auc"), figures.get("finetune", {}).get(arm, {}).get("f1"))
        for arm in ("real", "synthetic", "mixed")])
    return (f"## Quality\nExtractor: {found.get('extractor', 'not measured')}; "
            f"{found.get('dim', '?')} dimensions; N = {found.get('n', '?')}; reference: "
            f"{found.get('reference', 'test')} split. Figures of other extractors or N do not compare.\n\n"
            f"{fidelity}\n\n{utility}")


def _privacy(failed: dict[str, str]) -> str:
    told = "\n".join(f"- **{gate} fails**: {why}" for gate, why in failed.items())
    return "## Privacy\n" + (told or "The memorisation gate passed.")
