"""Writes a generator as a diffusers folder that samples without this project, reads it back, and checks it."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, PixArtTransformer2DModel, SchedulerMixin, UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.session import device
from cluster.storage import Folder
from pipelines.generator.autoencoder.model import load_autoencoder
from pipelines.generator.denoiser.network import Denoiser
from pipelines.generator.denoiser.objective import process
from pipelines.generator.encoder.vit import load_encoder
from pipelines.generator.latents.spec import latent_spec
from pipelines.generator.standalone.conditioner import Conditioner
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.generator.standalone.pipeline import RayographPipeline
from pipelines.generator.standalone.pixel_vae import Pixels
from pipelines.generator.training import checkpoint
from pipelines.generator.training.loop import Job
from pipelines.generator.training.sharded_state import Tensors
from pipelines.graph.settings import Settings

SOURCES = Path(__file__).parent / "standalone"
# Classes of ours, and their modules.
CUSTOM = {Conditioner: "conditioner", Encoder: "image_encoder", Pixels: "pixel_vae"}
DENOISERS = {"unet": UNet2DConditionModel, "transformer": PixArtTransformer2DModel}
INDEX = "model_index.json"


def assemble(
    *,
    vae: ModelMixin,
    denoiser: Denoiser,
    scheduler: SchedulerMixin,
    encoder: Encoder,
    num_inference_steps: int,
    guidance_scale: float,
) -> RayographPipeline:
    """A generator of its parts; `num_inference_steps` and `guidance_scale` become the defaults of a call."""
    [kind] = [name for name, model in DENOISERS.items() if isinstance(denoiser.network, model)]
    return RayographPipeline(vae=vae, scheduler=scheduler, conditioner=denoiser.conditioner, encoder=encoder,
                             num_inference_steps=int(num_inference_steps), guidance_scale=float(guidance_scale),
                             **{kind: denoiser.network})


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


def export(job: Job, chosen: Folder, ema: str, autoencoder: Folder, encoder: Folder) -> int:
    """Write train/generator, a diffusers folder with one average of a checkpoint's weights, and verify it.

    Returns:
        The denoiser's number of parameters.
    """
    denoiser = job.denoiser(latent_spec(job.latents)).to(device()).eval()
    load_whole(denoiser, checkpoint.read_part(chosen, ema))
    with tempfile.TemporaryDirectory() as staging:
        pipeline = in_memory(job.settings, denoiser, autoencoder, encoder)
        save_pipeline(Path(staging) / "generator", pipeline)
        verify(Path(staging) / "generator", pipeline)
        (job.folder / "generator").upload(f"{staging}/generator")
    return sum(p.numel() for p in denoiser.parameters())


def in_memory(settings: Settings, denoiser: Denoiser, autoencoder: Folder, encoder: Folder) -> RayographPipeline:
    """The generator of a denoiser and of what earlier stages left, on this device."""
    return assemble(
        vae=load_autoencoder(autoencoder),
        denoiser=denoiser,
        scheduler=process(settings.objective, "cpu").scheduler(),
        encoder=load_encoder(encoder),
        num_inference_steps=settings.validate.steps,
        guidance_scale=settings.validate.guidance,
    ).to(device())


def load_whole(denoiser: Denoiser, tensors: Tensors) -> None:
    """Load weights after checking that none is missing, of another size or not finite (RuntimeError)."""
    expected = {name: value.shape for name, value in denoiser.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        raise RuntimeError(f"the checkpoint differs from the network in {sorted(expected.items() ^ found.items())[:3]}")
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise RuntimeError(f"the checkpoint is not finite in {broken[:3]}")
    denoiser.load_state_dict(tensors)


def load_pipeline(folder: Path, **kwargs: Any) -> RayographPipeline:
    """Loads an export with the project's own classes: no code of the folder runs, and only safetensors are read.

    Args:
        folder: what `save_pipeline` wrote.
        kwargs: for every model's `from_pretrained`, such as `torch_dtype`.

    Raises:
        UserError: where the folder is no export of ours, or names a scheduler that diffusers does not have.
        OSError: where a file is missing.
    """
    index = json.loads((folder / INDEX).read_text())
    if index.get("_class_name") != ["pipeline", RayographPipeline.__name__]:
        raise UserError(f"{folder} holds {index.get('_class_name')}, not a {RayographPipeline.__name__}")
    scheduler = getattr(diffusers, index["scheduler"][1], None)
    if not isinstance(scheduler, type) or not issubclass(scheduler, SchedulerMixin):
        raise UserError(f"{folder} names {index['scheduler'][1]}, which is no diffusers scheduler")
    options = {"use_safetensors": True, "low_cpu_mem_usage": is_accelerate_available(), **kwargs}
    vae = Pixels if index["vae"][1] == Pixels.__name__ else AutoencoderKL
    kinds = {name: model for name, model in DENOISERS.items() if index[name][0]}
    models: dict[str, Any] = {"vae": vae, "conditioner": Conditioner, "encoder": Encoder, **kinds}
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
def _forward(pipeline: RayographPipeline) -> Tensor:
    """Returns the prediction (2, c, h, w) of fixed inputs: the first image conditioned, the second not."""
    network, conditioner, latent = pipeline.denoiser, pipeline.conditioner, pipeline.latent
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(2, *shape, generator=generator).to(network.device)

    shapes = {name: latent[1:] if name == "mask" else shape[1:] for name, shape in conditioner.shapes.items()}
    given = {name: draw(shape[0], *shapes[name]) for name, shape in conditioner.shapes.items()}
    drop = {name: torch.tensor([False, True], device=network.device) for name in shapes}
    tokens = conditioner(given, drop).expand(2, -1, -1).to(network.dtype)
    noisy = conditioner.beside(draw(*latent).to(network.dtype), given, drop)
    timesteps = torch.tensor([1, 500], device=network.device)
    return network(noisy, timestep=timesteps, encoder_hidden_states=tokens).sample.float()


def verify(folder: Path, made_of: RayographPipeline) -> None:
    """Reloads an export and checks it against the pipeline it was made of, whose modules stay on their device.

    Raises:
        RuntimeError: naming what differs: in any component a parameter that is missing, left over or not finite; in
            denoiser and conditioner one of another shape or value, or a forward pass that gives other numbers.
    """
    try:
        loaded = load_pipeline(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RuntimeError(f"the export in {folder} does not load: {error}") from error
    for name, model in loaded.components.items():
        if isinstance(model, ModelMixin):
            state = model.state_dict()
            if odd := state.keys() ^ _stored(folder / name):
                raise RuntimeError(f"{name}: the export's files lack, or have beyond the model, {sorted(odd)}")
            if broken := [key for key, value in state.items() if not torch.isfinite(value).all()]:
                raise RuntimeError(f"{name}: the export is not finite in {broken}")
    trained = {name: model for name, model in made_of.components.items()
               if name in (*DENOISERS, "conditioner") and model is not None}
    for name, model in trained.items():
        there = getattr(loaded, name)
        nn.Module.to(there, device=model.device, dtype=model.dtype)  # diffusers' own warns of dtypes
        _compare(name, model, there)
    modes = {model: model.training for model in trained.values()}
    try:
        for model in trained.values():
            model.eval()
        expected = _forward(made_of)
    finally:
        for model, training in modes.items():
            model.train(training)
    tolerance = 1e-5 if made_of.denoiser.dtype == torch.float32 else 1e-2
    actual = _forward(loaded)
    if not torch.allclose(actual, expected, rtol=tolerance, atol=tolerance):
        worst = (actual - expected).abs().max().item()
        raise RuntimeError(f"the export's forward pass differs by up to {worst:.3g}")
