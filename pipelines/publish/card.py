"""Cards of the published generator and corpus: data, quality, privacy, intended use and limits."""

from __future__ import annotations

from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from pipelines.graph.settings import Settings

MetricsByStage = dict[str, dict[str, Any]]

LIMITS = """\
## Intended use and limits
For research on medical image analysis: pre-training, augmentation, method development. **Not for diagnosis.** Images
are synthetic and may show anatomy or disease that no patient has; findings that are rare in the training data are even
rarer here.
The memorisation check is a heuristic on embeddings; it does not guarantee differential privacy."""

USE_GENERATOR = """\
## Use
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
image = pipe().images[0]  # unconditional
images = pipe(image=radiograph, batch_size=4).images  # conditioned on a real image
images = pipe(embedding=embedding).images  # conditioned on an embedding{labels}
```
On a GPU, add `torch_dtype=torch.float16, variant="fp16"`; on one with little memory, call
`pipe.enable_model_cpu_offload()`."""

USE_CORPUS = """\
## Use
```python
from datasets import load_dataset

corpus = load_dataset("parquet", data_files="DIR/data/*.parquet", split="train")
corpus[0]["image"], corpus[0]["labels"]
```"""


def generator_card(settings: Settings, metrics: MetricsByStage, record: dict[str, Any], failed: dict[str, str]) -> str:
    header = ModelCardData(license=settings.publish.license, library_name="diffusers",
                           tags=["medical", "chest-x-ray", "diffusion", "rayograph"])
    labels = metrics.get("ingest", {}).get("labels", {})
    known = labels and settings.condition.labels
    example = f'\nimages = pipe(labels=["{next(iter(labels))}"]).images' if known else ""
    train, autoencoder = metrics.get("train", {}), metrics.get("autoencoder", {})
    training = _table(("training", "value"), [
        ("images seen", train.get("images")), ("loss", train.get("loss")), ("parameters", train.get("parameters")),
        ("images/s", train.get("images_per_second")), ("autoencoder PSNR, dB", autoencoder.get("psnr")),
        ("encoder", metrics.get("encoder", {}).get("weights")), ("training fingerprint", record["fingerprint"]),
        ("code", " ".join(record["code"].values()))])
    return _join(header.to_yaml(), f"# {settings.name}: chest X-ray generator",
                 f"Latent diffusion of {metrics['ingest']['size']}-pixel chest X-rays, conditioned on image "
                 "embeddings.",
                 USE_GENERATOR.format(labels=example), _sources(metrics), "## Training\n" + training,
                 _quality(metrics), _privacy(failed), LIMITS)


def corpus_card(settings: Settings, metrics: MetricsByStage, record: dict[str, Any], failed: dict[str, str]) -> str:
    header = DatasetCardData(license=settings.publish.license,
                             tags=["medical", "chest-x-ray", "synthetic", "rayograph"],
                             configs=[{"config_name": "default", "data_files": "data/*.parquet"}])
    sampled = metrics.get("sample", {})
    sampling = _table(("sampling", "value"), [
        ("images", sampled.get("images")), ("strategy", sampled.get("strategy")), ("steps", sampled.get("steps")),
        ("guidance", sampled.get("guidance")), ("generator (training fingerprint)", record["fingerprint"])])
    return _join(header.to_yaml(), f"# {settings.name}: synthetic chest X-rays",
                 "Every row gives the real images that its condition was made from, if any (`source_image_ids`, "
                 "content hashes), its seed and its generator.",
                 USE_CORPUS, _sources(metrics), "## Sampling\n" + sampling,
                 _quality(metrics), _privacy(failed), LIMITS)


def _join(header: str, *sections: str) -> str:
    return f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table of the rows without unknown values."""
    complete = [row for row in rows if all(value is not None for value in row)]
    lines = [head, ("---",) * len(head), *complete]
    return "\n".join("| " + " | ".join(" ".join(str(value).split()) for value in line) + " |" for line in lines)


def _sources(metrics: MetricsByStage) -> str:
    """Origin of the training images, and the terms of each data set."""
    ingest = metrics.get("ingest", {})
    terms = _table(("data set", "licence", "agreement to sign", "citation"), [
        (entry["title"] or name, entry["licence"] or "unknown", entry["sign"] or "none", entry["citation"] or "none")
        for name, entry in ingest.get("terms", {}).items()])
    return (f"## Data\nTrained on the train split of `{ingest['source']}`: {ingest.get('images', '?')} images "
            f"of {ingest.get('patients', '?')} patients in total, split by patient ({ingest.get('splits', {})}). The "
            f"licence and terms of the source data apply to derived works; check them before sharing this.\n\n{terms}")


def _quality(metrics: MetricsByStage) -> str:
    evaluated = metrics.get("evaluate", {})
    names = ("frechet", "precision", "recall", "density", "coverage", "ms_ssim")
    fidelity = _table(("metric", "synthetic", "real against real"),
                      [(name, evaluated.get(name), evaluated.get(f"{name}_floor")) for name in names])
    utility = _table(("classifier trained on", "AUC", "F1"), [
        (arm, metrics.get("finetune", {}).get(arm, {}).get("auc"), metrics.get("finetune", {}).get(arm, {}).get("f1"))
        for arm in ("real", "synthetic", "mixed")])
    return (f"## Quality\nExtractor: {evaluated.get('extractor', 'not measured')}; "
            f"{evaluated.get('dim', '?')} dimensions; N = {evaluated.get('n', '?')}; reference: "
            f"{evaluated.get('reference', 'test')} split. Values for other extractors or N are not comparable.\n\n"
            f"{fidelity}\n\n{utility}")


def _privacy(failed: dict[str, str]) -> str:
    failures = "\n".join(f"- **{gate} fails**: {reason}" for gate, reason in failed.items())
    return "## Privacy\n" + (failures or "The memorisation gate passed.")
