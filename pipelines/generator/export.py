"""Writes a generator as a diffusers folder that samples without this project, reads it back, and checks it."""

import inspect
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, PixArtTransformer2DModel, SchedulerMixin, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.autoencoder.model import load_autoencoder
from pipelines.generator.denoiser.network import Denoiser
from pipelines.generator.denoiser.objective import process
from pipelines.generator.encoder.vit import load_encoder
from pipelines.generator.settings import ObjectiveSettings
from pipelines.generator.standalone.conditioner import Conditioner
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.generator.standalone.pipeline import RayographPipeline
from pipelines.generator.standalone.pixel_vae import Pixels
from pipelines.monitor.progress import say

SOURCES = Path(__file__).parent / "standalone"
# The project's own classes, and the published modules that define them.
CUSTOM = {Conditioner: "conditioner", Encoder: "image_encoder", Pixels: "pixel_vae"}
DENOISERS = {"unet": UNet2DConditionModel, "transformer": PixArtTransformer2DModel}
INDEX = "model_index.json"
HALF = "fp16"


def assemble(
    *,
    vae: ModelMixin,
    denoiser: Denoiser,
    scheduler: SchedulerMixin,
    encoder: Encoder,
    num_inference_steps: int,
    guidance_scale: float,
) -> RayographPipeline:
    """A generator from its components; `num_inference_steps` and `guidance_scale` become the defaults of a call."""
    [component] = [name for name, model in DENOISERS.items() if isinstance(denoiser.network, model)]
    return RayographPipeline(vae=vae, scheduler=scheduler, conditioner=denoiser.conditioner, encoder=encoder,
                             num_inference_steps=int(num_inference_steps), guidance_scale=float(guidance_scale),
                             **{component: denoiser.network})


def save_pipeline(folder: Path, pipeline: RayographPipeline) -> None:
    """Writes the modules, as safetensors in their own dtype, with the code that loads and samples them to `folder`.

    Files of an earlier export in `folder` are overwritten.
    """
    pipeline.save_pretrained(folder, safe_serialization=True)
    shutil.copyfile(SOURCES / "pipeline.py", folder / "pipeline.py")
    index = json.loads((folder / INDEX).read_text())
    index["_class_name"] = ["pipeline", RayographPipeline.__name__]
    for name, component in pipeline.components.items():
        if module := CUSTOM.get(type(component)):
            shutil.copyfile(SOURCES / f"{module}.py", folder / name / f"{module}.py")
            index[name] = [module, type(component).__name__]
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_half(folder: Path, pipeline: RayographPipeline) -> None:
    """Writes the models' float16 weights to `folder`, by the names that diffusers gives to `variant="fp16"`."""
    for name, model in pipeline.components.items():
        if isinstance(model, ModelMixin):
            known = inspect.signature(type(model)).parameters  # a config may hold more
            with torch.device("meta"):
                half = type(model)(**{key: value for key, value in model.config.items() if key in known})
            half.load_state_dict({key: value.half() for key, value in model.state_dict().items()}, assign=True)
            half.save_pretrained(folder / name, variant=HALF)
            (folder / name / "config.json").unlink()


def export_generator(pipeline: RayographPipeline, folder: Folder) -> None:
    """Write a diffusers folder that samples without this project, after verifying that it reproduces `pipeline`.

    A second folder beside it, with `-fp16` in its name, holds the float16 weights, if all are finite.
    """
    with tempfile.TemporaryDirectory() as staging_dir:
        local, half = Path(staging_dir) / "generator", Path(staging_dir) / "half"
        save_pipeline(local, pipeline)
        verify(local, pipeline)
        if too_large := _beyond_half(pipeline):
            say(f"export: no float16 weights, as {too_large} is beyond their range")
        else:
            save_half(half, pipeline)
            half_folder(folder).upload(half)
        folder.upload(local)


def _beyond_half(pipeline: RayographPipeline) -> str | None:
    """The first parameter that float16 cannot hold, or None."""
    largest = torch.finfo(torch.float16).max
    return next((f"{name}.{key}" for name, model in pipeline.components.items() if isinstance(model, ModelMixin)
                 for key, value in model.state_dict().items() if value.abs().max() > largest), None)


def half_folder(generator: Folder) -> Folder:
    """The folder of the float16 weights of an exported generator."""
    return Folder(f"{generator.uri}-{HALF}")


def build_pipeline(denoiser: Denoiser, autoencoder: Folder, encoder: Folder, objective: ObjectiveSettings, steps: int,
                   guidance: float) -> RayographPipeline:
    """A generator from a denoiser and the results of earlier stages, on this process's device."""
    return assemble(
        vae=load_autoencoder(autoencoder),
        denoiser=denoiser,
        scheduler=process(objective, "cpu").scheduler(),
        encoder=load_encoder(encoder),
        num_inference_steps=steps,
        guidance_scale=guidance,
    ).to(device())


def load_pipeline(folder: Path, **kwargs: Any) -> RayographPipeline:
    """Loads an export with the project's own classes: no code of the folder runs, and only safetensors are read.

    Args:
        folder: written by `save_pipeline`.
        kwargs: passed to every model's `from_pretrained`, such as `torch_dtype`.

    Raises:
        UserError: the folder is not an export of this project, or names a scheduler that diffusers does not have.
        OSError: a file is missing.
    """
    index = json.loads((folder / INDEX).read_text())
    if index.get("_class_name") != ["pipeline", RayographPipeline.__name__]:
        raise UserError(f"{folder} holds {index.get('_class_name')}, not a {RayographPipeline.__name__}")
    scheduler = getattr(diffusers, index["scheduler"][1], None)
    if not isinstance(scheduler, type) or not issubclass(scheduler, SchedulerMixin):
        raise UserError(f"{folder} names {index['scheduler'][1]}, which is not a diffusers scheduler")
    options = {"use_safetensors": True, **kwargs}
    vae = Pixels if index["vae"][1] == Pixels.__name__ else AutoencoderKL
    denoisers = {name: model for name, model in DENOISERS.items() if index[name][0]}
    models: dict[str, Any] = {"vae": vae, "conditioner": Conditioner, "encoder": Encoder, **denoisers}
    return RayographPipeline(
        scheduler=scheduler.from_pretrained(folder / "scheduler"),  # type: ignore[attr-defined]
        num_inference_steps=index["num_inference_steps"],
        guidance_scale=index["guidance_scale"],
        **{name: model.from_pretrained(folder / name, **options) for name, model in models.items()},
    )


def _stored_names(folder: Path) -> set[str]:
    """Returns the names of all tensors in a component's safetensors files."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


def _compare(name: str, original: ModelMixin, loaded: ModelMixin) -> None:
    """Raises RuntimeError unless `loaded` has exactly the parameters of `original`."""
    expected, actual = original.state_dict(), loaded.state_dict()
    if expected.keys() != actual.keys():
        raise RuntimeError(f"{name}: the export differs in the parameters {sorted(expected.keys() ^ actual.keys())}")
    if differing := [key for key in expected if not torch.equal(expected[key], actual[key])]:
        raise RuntimeError(f"{name}: the export differs in the values of {differing}")


@torch.no_grad()
def _forward(pipeline: RayographPipeline) -> Tensor:
    """Returns the prediction (2, c, h, w) of fixed inputs: the first image conditioned, the second not."""
    network, conditioner, latent = pipeline.denoiser, pipeline.conditioner, pipeline.latent
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(2, *shape, generator=generator).to(network.device)

    shapes = {name: latent[1:] if name == "mask" else shape[1:] for name, shape in conditioner.shapes.items()}
    conditions = {name: draw(shape[0], *shapes[name]) for name, shape in conditioner.shapes.items()}
    dropped = {name: torch.tensor([False, True], device=network.device) for name in shapes}
    tokens = conditioner(conditions, dropped).expand(2, -1, -1).to(network.dtype)
    noisy = conditioner.concat_mask(draw(*latent).to(network.dtype), conditions, dropped)
    timesteps = torch.tensor([1, 500], device=network.device)
    return network(noisy, timestep=timesteps, encoder_hidden_states=tokens).sample.float()


def verify(folder: Path, original: RayographPipeline) -> None:
    """Reloads an export and compares it with the original pipeline, whose modules stay on their device.

    Raises:
        RuntimeError: naming the difference: in any component a missing, unexpected or non-finite parameter; in the
            denoiser and conditioner another shape or value, or a forward pass with other results.
    """
    try:
        loaded = load_pipeline(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RuntimeError(f"the export in {folder} does not load: {error}") from error
    for name, model in loaded.components.items():
        if isinstance(model, ModelMixin):
            state = model.state_dict()
            if differing := state.keys() ^ _stored_names(folder / name):
                raise RuntimeError(f"{name}: the export's files and the model differ in {sorted(differing)}")
            if non_finite := [key for key, value in state.items() if not torch.isfinite(value).all()]:
                raise RuntimeError(f"{name}: the export is not finite in {non_finite}")
    trained = {name: model for name, model in original.components.items()
               if name in (*DENOISERS, "conditioner") and model is not None}
    for name, model in trained.items():
        reloaded = getattr(loaded, name)
        nn.Module.to(reloaded, device=model.device, dtype=model.dtype)  # ModelMixin.to warns about dtypes
        _compare(name, model, reloaded)
    modes = {model: model.training for model in trained.values()}
    try:
        for model in trained.values():
            model.eval()
        expected = _forward(original)
    finally:
        for model, training in modes.items():
            model.train(training)
    tolerance = 1e-5 if original.denoiser.dtype == torch.float32 else 1e-2
    actual = _forward(loaded)
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
        worst = (actual - expected).abs().max().item()
        raise RuntimeError(f"the export's forward pass differs by up to {worst:.3g}")
