"""Samples chest X-rays from a published generator. Standalone: copied as is into published folders."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

DEPTHS = {torch.uint8: 255, torch.uint16: 65535}
LUMA = (0.299, 0.587, 0.114)
Images = Image.Image | Tensor | list[Image.Image | Tensor]
States = list[str] | dict[str, int]
Labels = Tensor | str | States | list[States]


def to_gray(image: Image.Image | Tensor) -> Tensor:
    """Returns (N, 1, H, W) float32 gray images in [0, 1].

    Takes a PIL image of any mode (I modes are read as 16 bit), or a uint8, uint16 or float [0, 1] tensor (H, W),
    (C, H, W) or (N, C, H, W) with C of 1 or 3. Raises TypeError on another type, ValueError on another shape or range.
    """
    if isinstance(image, Image.Image):
        wide = image.mode.startswith("I")
        image = torch.from_numpy(np.array(image).astype(np.float32) / 65535 if wide else np.array(image.convert("L")))
    if not isinstance(image, Tensor):
        raise TypeError(f"an image must be a PIL image or a tensor, not {type(image).__name__}")
    pixels = image.float() / DEPTHS.get(image.dtype, 1)
    pixels = pixels[(None,) * max(0, 4 - image.ndim)]
    if image.ndim not in (2, 3, 4) or pixels.shape[1] not in (1, 3) or pixels.numel() == 0:
        raise ValueError(f"an image tensor must be (H, W), (C, H, W) or (N, C, H, W), C 1 or 3: {tuple(image.shape)}")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError("image floats must lie in [0, 1]")
    if pixels.shape[1] == 3:
        pixels = (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True).clamp(0, 1)
    return pixels


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) over an interval of the steps."""

    scale: float
    rescale: float
    start: float
    end: float

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """The guided prediction of two predictions (B, c, h, w)."""
        guided = torch.lerp(unconditional, conditional, self.scale)
        if self.rescale == 0:
            return guided
        spread = conditional.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        return torch.lerp(guided, guided * spread, self.rescale)


class RayographPipeline(DiffusionPipeline):
    """Diffusion pipeline for one-channel images, conditioned on image embeddings, patch features, labels or masks.

    The denoiser is a `unet` or a `transformer`. `num_inference_steps` and `guidance_scale` (1 or less: no guidance)
    are the defaults of a call.
    """

    model_cpu_offload_seq = "encoder->conditioner->unet->transformer->vae"
    _optional_components = ("unet", "transformer")
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        vae: ModelMixin,
        scheduler: Any,
        conditioner: ModelMixin,
        encoder: ModelMixin,
        unet: ModelMixin | None = None,
        transformer: ModelMixin | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("a generator has either a unet or a transformer")
        self.register_modules(vae=vae, unet=unet, transformer=transformer, scheduler=scheduler,
                              conditioner=conditioner, encoder=encoder)
        self.register_to_config(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    @property
    def denoiser(self) -> ModelMixin:
        return self.transformer if self.unet is None else self.unet

    @property
    def latent(self) -> tuple[int, int, int]:
        """Channels, height and width of one image's latent."""
        config = self.denoiser.config
        return config.out_channels, config.sample_size, config.sample_size

    def _sized(self, image: Images) -> Tensor:
        """The images (B, 1, S, S) float32 in [0, 1] on the device, resized to the size the generator samples."""
        size = (self.vae.config.sample_size,) * 2
        grays = map(to_gray, image if isinstance(image, list | tuple) else [image])
        sized = [F.interpolate(gray, size=size, mode="bilinear", antialias=True, align_corners=False) for gray in grays]
        return torch.cat(sized).to(self._execution_device)

    @torch.no_grad()
    def embed(self, image: Images) -> Tensor:
        """Returns the embeddings (B, D) of one image, of a list or of a batch tensor; `to_gray` says what images are.

        Images are resized (bilinear, antialiased) to the size the generator samples.
        """
        return self.encoder.embed(self._sized(image))

    @torch.no_grad()
    def embed_patches(self, image: Images) -> Tensor:
        """Returns the patch features (B, P, D) of images, as `embed` takes them, if the generator uses them."""
        grid = math.isqrt(self.conditioner.config.patch_tokens)
        return self.encoder.embed_patches(self._sized(image), grid)[1]

    def encode_mask(self, mask: Image.Image | Tensor) -> Tensor:
        """Returns the area fraction of each structure in each latent cell, (B, K, h, w) float32.

        `mask` is a label map (PIL mode L, or integers (H, W)) with 0 for background and for each structure the values
        in `conditioner.config.structures` (others are ignored), or a batch (B, H, W) of them; or (B, K, h, w) floats
        as returned here, with a channel of -1 for an unknown structure. Raises ValueError on another shape, and on a
        map that is not empty but holds none of these values.
        """
        known, size = self.conditioner.config.structures, self.latent[1:]
        structures = len(known)
        mask = torch.from_numpy(np.array(mask)) if isinstance(mask, Image.Image) else mask
        if mask.is_floating_point():
            if mask.ndim != 4 or list(mask.shape[1:]) != [structures, *size]:
                raise ValueError(f"a mask of floats must be (B, {structures}, {size[0]}, {size[1]}), not "
                                 f"{tuple(mask.shape)}")
            return mask.float()
        maps = mask[None] if mask.ndim == 2 else mask
        if maps.ndim != 3:
            raise ValueError(f"a mask must be (H, W) or (B, H, W), not {tuple(mask.shape)}")
        planes = torch.stack([torch.isin(maps, maps.new_tensor(values)) for values in known.values()], dim=1)
        if maps.any() and not planes.any():
            raise ValueError(f"a mask must hold values of these structures: {known}")
        return F.adaptive_avg_pool2d(planes.float(), size)

    def encode_labels(self, labels: Labels) -> Tensor:
        """Returns states (B, L) float32, 1, 0 or -1 (unknown), the columns in the order of `conditioner.config.labels`.

        `labels` are the findings present in one image (all others are unknown), or a dict of findings, 1 for present
        and 0 for absent; or a list of these for several images; or the (B, L) states themselves. All unknown is the
        null condition. Raises ValueError on an unknown name, another state or another width.
        """
        known = list(self.conditioner.config.labels)
        if isinstance(labels, Tensor):
            if labels.ndim != 2 or labels.shape[1] != len(known):
                raise ValueError(f"labels must be (B, {len(known)}), not {tuple(labels.shape)}")
            return labels.float()
        items: list[Any] = [labels] if isinstance(labels, str | dict) else list(labels)
        several = bool(items) and not isinstance(labels, str) and not isinstance(items[0], str)
        rows = [row if isinstance(row, dict) else dict.fromkeys(row, 1) for row in (items if several else [items])]
        if unknown := sorted({name for row in rows for name in row} - set(known)):
            raise ValueError(f"unknown labels {unknown}; known are {known}")
        if odd := {state for row in rows for state in row.values()} - {0, 1}:
            raise ValueError(f"a label is 1 (present) or 0 (absent), not {sorted(odd)}")
        return torch.tensor([[float(row.get(name, -1)) for name in known] for row in rows])

    def _guidance_inputs(self, conditions: dict[str, Tensor], batch: int, guided: bool) -> tuple[dict, dict]:
        """The conditioner's inputs by name: values (B, ...) and whether each is dropped (B,).

        Under classifier-free guidance both are of 2B rows, the unconditional ones first.
        """
        values, dropped = {}, {}
        for name, shape in self.conditioner.shapes.items():
            shape = (shape[0], *self.latent[1:]) if name == "mask" else shape
            value = conditions.get(name, torch.zeros(1, *shape)).to(self._execution_device, torch.float32)
            value = value.expand(batch, *shape)
            missing = torch.full((batch,), name not in conditions, device=value.device)
            values[name] = torch.cat([torch.zeros_like(value), value]) if guided else value
            dropped[name] = torch.cat([torch.ones_like(missing), missing]) if guided else missing
        return values, dropped

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (B, 1, H, W), float32 in [0, 1], of normalised latents (B, c, h, w)."""
        config = self.vae.config
        latents = latents / config.scaling_factor
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
            latents = latents * std + mean
        elif config.shift_factor is not None:
            latents = latents + config.shift_factor
        pixels = self.vae.decode(latents.to(self.vae.dtype)).sample.float().mean(1, keepdim=True)
        return (pixels / 2 + 0.5).clamp(0, 1)

    def _denoise(self, latents: Tensor, conditions: dict, dropped: dict, steps: int, guidance: Guidance,
                 generator: Any, on_step_end: Callable | None) -> Tensor:
        """Denoises float32 latents; timesteps stay on the CPU so that the loop causes no host synchronisation."""
        denoiser, scheduler, rows = self.denoiser, self.scheduler, len(latents)
        tokens = self.conditioner(conditions, dropped).to(denoiser.dtype)
        guided = len(tokens) > rows
        tokens = tokens.expand(len(tokens) if guided else rows, -1, -1)
        # no image channel, only those of the mask: the conditioner may be offloaded in the loop
        mask = self.conditioner.concat_mask(latents.new_zeros(len(tokens), 0, *latents.shape[2:]), conditions, dropped)
        mask = mask.to(denoiser.dtype)
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        scale_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        device_timesteps = scheduler.timesteps.to(latents.device)
        with self.progress_bar(total=len(device_timesteps)) as progress:
            for k, (timestep, device_timestep) in enumerate(zip(scheduler.timesteps, device_timesteps, strict=True)):
                doubled = guided and guidance.start <= k / len(device_timesteps) < guidance.end
                used = slice(None) if doubled else slice(-rows, None)  # outside the interval, the conditional half
                sample = scale_input(latents, timestep).to(denoiser.dtype)
                sample = torch.cat([sample, sample]) if doubled else sample
                output = denoiser(torch.cat([sample, mask[used]], dim=1), encoder_hidden_states=tokens[used],
                                  timestep=device_timestep.expand(len(sample))).sample.float()
                if doubled:
                    output = guidance.combine(*output.chunk(2))
                latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
                if on_step_end is not None:
                    latents = on_step_end(self, k, timestep, {"latents": latents}).pop("latents", latents)
                progress.update()
        return latents

    @torch.no_grad()
    def __call__(
        self,
        image: Images | None = None,
        embedding: Tensor | None = None,
        labels: Labels | None = None,
        patches: Tensor | None = None,
        mask: Image.Image | Tensor | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Samples B images. A condition of one row serves all of them; otherwise the rows are B.

        Args:
            image: what `embed` takes: its embedding and patch features are used, whichever the generator is
                conditioned on. Not with `embedding` or `patches`.
            embedding: (B, E), as `embed` gives it.
            labels: what `encode_labels` takes.
            patches: (B, P, E), as `embed_patches` gives them.
            mask: what `encode_mask` takes.
            batch_size: B where no condition, latent or list of generators has more than one row.
            num_inference_steps: denoising steps; the generator's default if None.
            guidance_scale: the generator's default if None; without effect on the null condition.
            guidance_rescale: between 0 and 1: how far the spread of guided predictions is brought back to that of
                conditional ones, against overexposure (Lin et al. 2023, arXiv 2305.08891, section 3.4).
            guidance_start: fraction of the steps before which there is no guidance; guidance at high noise costs
                diversity (Kynkäänniemi et al. 2024, arXiv 2404.07724).
            guidance_end: fraction of the steps from which on there is none; steps without guidance cost half.
            generator: one for the batch, or a list of one per image, which makes an image independent of its batch.
            latents: (B, c, h, w) standard normal noise to start from.
            output_type: "pil" (mode L), "pt" ((B, 1, H, W) float in [0, 1]), "np" ((B, H, W, 1)) or "latent".
            return_dict: False for a plain tuple `(images,)`.
            callback_on_step_end: called as `f(pipeline, step, timestep, {"latents": latents})` after every step; the
                latents in the dict that it returns, if any, are used instead.
            callback_on_step_end_tensor_inputs: what the dict holds: "latents" or nothing.

        Raises:
            ValueError, TypeError: as `embed`, `encode_labels` and `encode_mask`; if the generator is not conditioned
                on an argument, or if two arguments do not fit each other.
        """
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ValueError(f"output_type must be pil, pt, np or latent, not {output_type!r}")
        if not (0 <= guidance_start <= guidance_end <= 1 and 0 <= guidance_rescale <= 1):
            raise ValueError("guidance_rescale must lie in [0, 1], and 0 <= guidance_start <= guidance_end <= 1")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs may hold latents only, not {sorted(unknown)}")
        requested = {"image": image, "embedding": embedding, "labels": labels, "patches": patches, "mask": mask}
        conditions = self._conditions({name: value for name, value in requested.items() if value is not None})
        seeded = [s for s in (latents, generator) if isinstance(s, Tensor | list)]
        counts = [len(value) for value in conditions.values()]
        rows = max([batch_size, *counts, *map(len, seeded)])
        if any(n not in (1, rows) for n in (batch_size, *counts)) or any(len(s) != rows for s in seeded):
            raise ValueError(f"of {rows} images, conditions give 1 or {rows} rows, latents and generators all {rows}")
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        conditions, dropped = self._guidance_inputs(conditions, rows, guided=bool(conditions) and scale > 1)

        shape, device = (rows, *self.latent), self._execution_device
        latents = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}")
        guidance = Guidance(float(scale), guidance_rescale, guidance_start, guidance_end)
        latents = self._denoise(latents.to(device, torch.float32), conditions, dropped, steps, guidance, generator,
                                callback_on_step_end)
        images: Any = latents if output_type == "latent" else self.decode(latents)
        self.maybe_free_model_hooks()
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray((pixels[..., 0] * 255).round().astype(np.uint8)) for pixels in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditions(self, requested: dict[str, Any]) -> dict[str, Tensor]:
        """The arguments of a call as the tensors (B, ...) that the conditioner takes."""
        known = self.conditioner.shapes
        if "image" in requested:
            if {"embedding", "patches"} & requested.keys():
                raise ValueError("give either image or its embedding and patches, not both")
            image, makers = requested.pop("image"), {"embedding": self.embed, "patches": self.embed_patches}
            requested |= {name: make(image) for name, make in makers.items() if name in known}
            if not makers.keys() & known.keys():
                raise ValueError("this generator is not conditioned on images")
        if unknown := requested.keys() - known.keys():
            raise ValueError(f"this generator is not conditioned on {sorted(unknown)} but on {sorted(known)}")
        for name, encode in (("labels", self.encode_labels), ("mask", self.encode_mask)):
            if name in requested:
                requested[name] = encode(requested[name])
        for name in requested.keys() & {"embedding", "patches"}:
            if tuple(requested[name].shape[1:]) != known[name]:
                raise ValueError(f"{name} must be (B, {', '.join(map(str, known[name]))}), not "
                                 f"{tuple(requested[name].shape)}")
        return requested
