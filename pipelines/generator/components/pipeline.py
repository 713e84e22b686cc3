"""Samples chest X-rays from a published generator. Standalone: copied as is into published folders."""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

DEPTHS = {torch.uint8: 255, torch.uint16: 65535}
LUMA = (0.299, 0.587, 0.114)
Images = Image.Image | Tensor | list[Image.Image | Tensor]
Labels = Tensor | list[str] | list[list[str]]


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


class RayographPipeline(DiffusionPipeline):
    """Latent diffusion of one-channel images, conditioned on image embeddings, labels, both or nothing.

    `num_inference_steps` and `guidance_scale` (1 or less is no guidance) hold for calls that name none.
    """

    model_cpu_offload_seq = "encoder->conditioner->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: Any,
        conditioner: ModelMixin,
        encoder: ModelMixin,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, conditioner=conditioner, encoder=encoder)
        self.register_to_config(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    @torch.no_grad()
    def embed(self, image: Images) -> Tensor:
        """Returns the embeddings (B, D) of one image, of a list or of a batch tensor; `to_gray` says what images are.

        Images are resized (bilinear, antialiased) to the size the generator samples.
        """
        size = (self.vae.config.sample_size,) * 2
        grays = map(to_gray, image if isinstance(image, list | tuple) else [image])
        sized = [F.interpolate(gray, size=size, mode="bilinear", antialias=True, align_corners=False) for gray in grays]
        return self.encoder.embed(torch.cat(sized).to(self._execution_device))

    def encode_labels(self, labels: Labels) -> Tensor:
        """Returns multi-hot labels (B, L) float32, the columns in the order of `conditioner.config.labels`.

        `labels` are the names that hold for one image, a list of such lists, or (B, L) itself; no name is not the null
        condition. Raises ValueError on an unknown name, another width, or a generator without labels.
        """
        known = list(self.conditioner.config.labels)
        if not known:
            raise ValueError("this generator has no labels")
        if isinstance(labels, Tensor):
            if labels.ndim != 2 or labels.shape[1] != len(known):
                raise ValueError(f"labels must be (B, {len(known)}), not {tuple(labels.shape)}")
            return labels.float()
        names: list[Any] = [labels] if isinstance(labels, str) else list(labels)
        rows = names if names and not isinstance(names[0], str) else [names]
        unknown = sorted({name for row in rows for name in row} - set(known))
        if unknown:
            raise ValueError(f"unknown labels {unknown}; known are {known}")
        return torch.tensor([[float(name in row) for name in known] for row in rows])

    def _tokens(self, embedding: Tensor | None, labels: Tensor | None, batch: int, guided: bool) -> Tensor:
        """Condition tokens (B, T, C), or (2B, T, C) with the null condition's first where guided."""
        config, device = self.conditioner.config, self._execution_device
        inputs, drops = [], []
        for given, width in ((embedding, config.embedding_dim), (labels, len(config.labels))):
            value = (torch.zeros(1, width) if given is None else given).to(device, torch.float32).expand(batch, -1)
            drop = torch.full((batch,), given is None, device=device)
            inputs.append(torch.cat([torch.zeros_like(value), value]) if guided else value)
            drops.append(torch.cat([torch.ones_like(drop), drop]) if guided else drop)
        return self.conditioner(*inputs, *drops).to(self.unet.dtype)

    def _decode(self, latents: Tensor) -> Tensor:
        """Images (B, 1, H, W) float32 in [0, 1] of the U-Net's latents."""
        config = self.vae.config
        latents = latents / config.scaling_factor
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
            latents = latents * std + mean
        elif config.shift_factor is not None:
            latents = latents + config.shift_factor
        pixels = self.vae.decode(latents.to(self.vae.dtype)).sample.float().mean(1, keepdim=True)
        return (pixels / 2 + 0.5).clamp(0, 1)

    def _denoise(self, latents: Tensor, tokens: Tensor, steps: int, scale: float, generator: Any) -> Tensor:
        """Runs the scheduler, on the CPU so that the loop never waits for the device, over float32 latents."""
        guided, scheduler = len(tokens) > len(latents), self.scheduler
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        scale_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        placed = scheduler.timesteps.to(latents.device)
        with self.progress_bar(total=len(placed)) as progress:
            for timestep, placed_timestep in zip(scheduler.timesteps, placed, strict=True):
                sample = scale_input(latents, timestep).to(self.unet.dtype)
                sample = torch.cat([sample, sample]) if guided else sample
                output = self.unet(sample, placed_timestep, encoder_hidden_states=tokens).sample.float()
                if guided:
                    unconditional, conditional = output.chunk(2)
                    output = torch.lerp(unconditional, conditional, float(scale))
                latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
                progress.update()
        return latents

    @torch.no_grad()
    def __call__(
        self,
        image: Images | None = None,
        embedding: Tensor | None = None,
        labels: Labels | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Samples B images. A condition of one row serves all of them; otherwise the rows are B.

        Args:
            image: what `embed` takes: sample images of the same embedding. Not with `embedding`.
            embedding: (B, E), as `embed` gives it.
            labels: what `encode_labels` takes.
            batch_size: B where no condition, latent or list of generators has more than one row.
            num_inference_steps: denoising steps; the generator's default if None.
            guidance_scale: the generator's default if None; without effect on the null condition.
            generator: one for the batch, or a list of one an image, which makes an image the same in any batch.
            latents: (B, c, h, w) standard normal noise to start from.
            output_type: "pil" (mode L), "pt" ((B, 1, H, W) float in [0, 1]), "np" ((B, H, W, 1)) or "latent".
            return_dict: False for a plain tuple `(images,)`.

        Raises:
            ValueError, TypeError: as `embed` and `encode_labels`, or where two arguments do not fit each other.
        """
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ValueError(f"output_type must be pil, pt, np or latent, not {output_type!r}")
        if image is not None and embedding is not None:
            raise ValueError("give either image or embedding, not both")
        embedding = embedding if image is None else self.embed(image)
        labels = None if labels is None else self.encode_labels(labels)
        width = self.conditioner.config.embedding_dim
        if embedding is not None and (embedding.ndim != 2 or embedding.shape[1] != width):
            raise ValueError(f"embedding must be (B, {width}), not {tuple(embedding.shape)}")
        conditions = [c for c in (embedding, labels) if c is not None]
        seeded = [s for s in (latents, generator) if isinstance(s, Tensor | list)]
        rows = max([batch_size, *(len(value) for value in conditions + seeded)])
        if any(n not in (1, rows) for n in (batch_size, *map(len, conditions))) or any(len(s) != rows for s in seeded):
            raise ValueError(f"of {rows} images, conditions give 1 or {rows} rows, latents and generators all {rows}")
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        tokens = self._tokens(embedding, labels, rows, guided=bool(conditions) and scale > 1)

        size, device = self.unet.config.sample_size, self._execution_device
        shape = (rows, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        latents = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, not {tuple(latents.shape)}")
        latents = self._denoise(latents.to(device, torch.float32), tokens, steps, scale, generator)
        images: Any = latents if output_type == "latent" else self._decode(latents)
        self.maybe_free_model_hooks()
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray((pixels[..., 0] * 255).round().astype(np.uint8)) for pixels in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)
