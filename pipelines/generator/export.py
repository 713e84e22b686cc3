"""Writes a generator as a diffusers folder that samples without this project, reads it back, and checks it."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipelines.generator.components.conditioner import Conditioner
from pipelines.generator.components.encoder import Encoder
from pipelines.generator.components.pipeline import RayographPipeline

SOURCES = Path(__file__).parent / "components"
CUSTOM = {"conditioner": "Conditioner", "encoder": "Encoder"}
INDEX = "model_index.json"


def save_pipeline(
    folder: Path,
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    conditioner: Conditioner,
    encoder: Encoder,
    num_inference_steps: int,
    guidance_scale: float,
) -> None:
    """Writes the modules, as safetensors in their own dtype, with the code that loads and samples them to `folder`.

    Files of an earlier export in `folder` are overwritten; `num_inference_steps` and `guidance_scale` become the
    defaults of a call.
    """
    pipeline = RayographPipeline(
        vae, unet, scheduler, conditioner, encoder, int(num_inference_steps), float(guidance_scale)
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    shutil.copyfile(SOURCES / "pipeline.py", folder / "pipeline.py")
    index = json.loads((folder / INDEX).read_text())
    index["_class_name"] = ["pipeline", RayographPipeline.__name__]
    for name, class_name in CUSTOM.items():
        shutil.copyfile(SOURCES / f"{name}.py", folder / name / f"{name}.py")
        index[name] = [name, class_name]
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_pipeline(folder: Path, **kwargs: Any) -> RayographPipeline:
    """Loads an export with the project's own classes: no code of the folder runs, and only safetensors are read.

    Args:
        folder: what `save_pipeline` wrote.
        kwargs: for every model's `from_pretrained`, such as `torch_dtype`.

    Raises:
        ValueError: where the folder is no export of ours, or names a scheduler that diffusers does not have.
        OSError: where a file is missing.
    """
    index = json.loads((folder / INDEX).read_text())
    if index.get("_class_name") != ["pipeline", RayographPipeline.__name__]:
        raise ValueError(f"{folder} holds {index.get('_class_name')}, not a {RayographPipeline.__name__}")
    scheduler = getattr(diffusers, index["scheduler"][1], None)
    if not isinstance(scheduler, type) or not issubclass(scheduler, SchedulerMixin):
        raise ValueError(f"{folder} names {index['scheduler'][1]}, which is no diffusers scheduler")
    options = {"use_safetensors": True, "low_cpu_mem_usage": is_accelerate_available(), **kwargs}
    models: dict[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "conditioner": Conditioner,
                              "encoder": Encoder}
    return RayographPipeline(
        scheduler=scheduler.from_pretrained(folder / "scheduler"),  # type: ignore[attr-defined]
        num_inference_steps=index["num_inference_steps"],
        guidance_scale=index["guidance_scale"],
        **{name: model.from_pretrained(folder / name, **options) for name, model in models.items()},
    )


def _stored(folder: Path) -> set[str]:
    """Returns the names of all tensors in a component's safetensors files."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


def _compare(name: str, given: ModelMixin, loaded: ModelMixin) -> None:
    """Raises RuntimeError where `loaded` has not the very parameters of `given`."""
    ours, theirs = given.state_dict(), loaded.state_dict()
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{name}: the export differs in the parameters {sorted(ours.keys() ^ theirs.keys())}")
    if differing := [key for key in ours if not torch.equal(ours[key], theirs[key])]:
        raise RuntimeError(f"{name}: the export differs in the values of {differing}")


@torch.no_grad()
def _forward(unet: UNet2DConditionModel, conditioner: Conditioner, noise: Tensor, embedding: Tensor) -> Tensor:
    """Returns the noise prediction (2, c, h, w): the first sample conditioned, the second not."""
    labels = torch.ones(2, len(conditioner.config.labels), device=noise.device)
    drop = torch.tensor([False, True], device=noise.device)
    tokens = conditioner(embedding, labels, drop, drop)
    timesteps = torch.tensor([1, 500], device=noise.device)
    return unet(noise.to(unet.dtype), timesteps, encoder_hidden_states=tokens.to(unet.dtype)).sample.float()


def verify(folder: Path, unet: UNet2DConditionModel, conditioner: Conditioner) -> None:
    """Reloads an export and checks it against the modules it was made of, which stay on their device.

    Raises:
        RuntimeError: naming what differs: in any component a parameter that is missing, left over or not finite; in
            `unet` and `conditioner` one of another shape or value, or a forward pass that gives other numbers.
    """
    try:
        pipeline = load_pipeline(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RuntimeError(f"the export in {folder} does not load: {error}") from error
    for name, model in pipeline.components.items():
        if isinstance(model, ModelMixin):
            state = model.state_dict()
            if odd := state.keys() ^ _stored(folder / name):
                raise RuntimeError(f"{name}: the export's files lack, or have beyond the model, {sorted(odd)}")
            if broken := [key for key, value in state.items() if not torch.isfinite(value).all()]:
                raise RuntimeError(f"{name}: the export is not finite in {broken}")
    loaded_unet = nn.Module.to(pipeline.unet, device=unet.device, dtype=unet.dtype)  # diffusers' own warns of dtypes
    loaded_conditioner = nn.Module.to(pipeline.conditioner, device=conditioner.device, dtype=conditioner.dtype)
    _compare("unet", unet, loaded_unet)
    _compare("conditioner", conditioner, loaded_conditioner)

    generator = torch.Generator().manual_seed(0)
    size = unet.config.sample_size
    side = (size, size) if isinstance(size, int) else tuple(size)
    noise = torch.randn(2, unet.config.in_channels, *side, generator=generator).to(unet.device)
    embedding = torch.randn(2, conditioner.config.embedding_dim, generator=generator).to(unet.device)
    modes = {module: module.training for module in (unet, conditioner)}
    try:
        expected = _forward(unet.eval(), conditioner.eval(), noise, embedding)
    finally:
        for module, training in modes.items():
            module.train(training)
    tolerance = 1e-5 if unet.dtype == torch.float32 else 1e-2
    actual = _forward(loaded_unet, loaded_conditioner, noise, embedding)
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
        worst = (actual - expected).abs().max().item()
        raise RuntimeError(f"unet: the export's forward pass differs by up to {worst:.3g}")
