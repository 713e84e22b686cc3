"""Settings of the generator: autoencoder, encoder, latents, denoiser and their training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from pipelines.data.structures import STRUCTURES
from pipelines.graph.fields import execution, fraction, positive, require
from pipelines.learning.settings import SmallTrainingSettings


def not_negative(section: str, settings: Any, *names: str) -> None:
    for name in names:
        require(getattr(settings, name) >= 0, f"{section}.{name}", getattr(settings, name), "must not be negative")


@dataclass
class AutoencoderSettings(SmallTrainingSettings):
    """diffusers AutoencoderKL: named on the Hub, or trained on the train split; or none, for diffusion of pixels."""

    space: Literal["latent", "pixel"] = "latent"
    """pixel: no autoencoder; the denoiser works on pixels."""
    pretrained: str | None = None
    """Hub id or folder of an AutoencoderKL, whose weights are then used as they are."""
    channels: list[int] = field(default_factory=lambda: [32, 48, 64])
    """Of each level; the side is halved at every level but the last."""
    latent_channels: int = 4
    """Of a latent."""
    kl_weight: float = 1e-5
    """Of the Kullback-Leibler divergence to the standard normal."""
    perceptual: str | None = None
    """Network of MONAI's PerceptualLoss, whose weights it downloads; null: no perceptual loss."""
    perceptual_weight: float = 0.1
    """Of the perceptual loss."""
    adversarial_weight: float = 0.0
    """Of the loss by MONAI's patch discriminator; 0: no discriminator."""
    adversarial_start: float = 0.3
    """Share of the training before the discriminator takes part."""

    def check(self) -> None:
        self.check_training("autoencoder")
        not_negative("autoencoder", self, "adversarial_weight")
        fraction("autoencoder", self, "adversarial_start")
        for width in self.channels:
            require(width > 0 and width % 8 == 0, "autoencoder.channels", self.channels, "each must be a multiple of 8")


@dataclass
class EncoderSettings(SmallTrainingSettings):
    """The self-supervised image encoder whose global embedding conditions the generator."""

    pretrained: str | None = None
    """rad-dino, or a timm model with Hub weights; null: DINO on the train split."""
    architecture: str = "vit_tiny_patch16_224"
    """timm vision transformer to train."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of timm.create_model."""
    prototypes: int = 1024
    """Outputs of DINO's projection head."""
    local_crops: int = 2
    """Small views of an image beside the two large ones."""
    teacher_momentum: float = 0.99
    """Of the teacher's moving average at the start; it ends at 1."""
    koleo_weight: float = 0.1
    """Of the KoLeo term, which spreads embeddings."""

    def check(self) -> None:
        self.check_training("encoder")
        positive("encoder", self, "prototypes")
        not_negative("encoder", self, "local_crops")
        fraction("encoder", self, "teacher_momentum")


@dataclass
class LatentsSettings:
    """What is kept of every encoded image."""

    batch: int = 64
    """Images encoded at a time."""
    patch_grid: int = 0
    """Keep the encoder's patch features, averaged to a grid of this side; 0: none."""
    masks: list[str] = field(default_factory=list)
    """Structures of the images' masks to keep, at the latents' size: left_lung, right_lung, lungs, heart and others."""
    logvar: bool | None = None
    """Keep the width of the posteriors, half of every latent; null: where it is more than 1 % of the variance."""

    def check(self) -> None:
        positive("latents", self, "batch")
        not_negative("latents", self, "patch_grid")
        for structure in self.masks:
            require(structure in STRUCTURES, "latents.masks", structure, f"is none of {', '.join(STRUCTURES)}")
        require(len(set(self.masks)) == len(self.masks), "latents.masks", self.masks, "names a structure twice")


CONDITIONS = ("embedding", "patches", "labels", "mask")


@dataclass
class ConditionSettings:
    """What the generator is given beside noise. A dropped condition is replaced by a learned null."""

    embedding_tokens: int = 4
    """Cross-attention tokens that the image embedding becomes; 0: no embedding."""
    patches: bool = False
    """One token for each patch feature (latents.patch_grid)."""
    labels: bool = True
    """One token for the labels, where the data have any; an image without is given the learned null."""
    mask: bool = False
    """One input channel for each structure of the masks (latents.masks)."""
    drop_all: float = 0.1
    """Probability of dropping all conditions, for classifier-free guidance."""
    drop_embedding: float = 0.05
    """Probability of dropping the embedding alone."""
    drop_patches: float = 0.05
    """Probability of dropping the patch features alone."""
    drop_labels: float = 0.05
    """Probability of dropping the labels alone."""
    drop_mask: float = 0.05
    """Probability of dropping the mask alone."""
    hide_findings: float = 0.2
    """Share of images of which a random part of the findings is made unknown, so that single ones can be asked for."""

    @property
    def used(self) -> list[str]:
        """Names of the conditions in use."""
        requested = {"embedding": self.embedding_tokens > 0, "patches": self.patches, "labels": self.labels,
                     "mask": self.mask}
        return [name for name in CONDITIONS if requested[name]]

    def check(self) -> None:
        not_negative("condition", self, "embedding_tokens")
        fraction("condition", self, "hide_findings", "drop_all", *(f"drop_{name}" for name in CONDITIONS))

    def check_with(self, settings: Any) -> None:
        latents: LatentsSettings = settings.latents
        require(latents.patch_grid > 0 or not self.patches, "condition.patches", True,
                "needs latents.patch_grid above 0")
        require(len(latents.masks) > 0 or not self.mask, "condition.mask", True,
                "needs structures in latents.masks, as in latents.masks=[lungs,heart]")


@dataclass
class DenoiserSettings:
    """diffusers' UNet2DConditionModel or PixArtTransformer2DModel, with the condition in cross-attention."""

    architecture: Literal["unet", "dit"] = "unet"
    """unet, or dit (a diffusion transformer)."""
    channels: list[int] = field(default_factory=lambda: [48, 64, 96])
    """Of a UNet, per level."""
    attention: list[bool] = field(default_factory=lambda: [False, False, True])
    """Whether a level of a UNet attends."""
    layers: int = 1
    """Of a UNet per level; of a DiT in all."""
    norm_groups: int = 16
    """Of a UNet's group normalisation."""
    width: int = 384
    """Of a DiT's tokens."""
    patch: int = 2
    """Side of the squares of latent that are a DiT's tokens."""
    head_dim: int = 24
    """Width of an attention head."""
    cross_attention_dim: int = 128
    """Width of a condition token."""

    def check(self) -> None:
        positive("denoiser", self, "layers", "head_dim", "cross_attention_dim", "norm_groups", "width", "patch")
        if self.architecture == "dit":
            require(self.width % self.head_dim == 0 and self.width % 4 == 0, "denoiser.width", self.width,
                    f"must be a multiple of 4 and of denoiser.head_dim={self.head_dim}")
            return
        require(len(self.channels) == len(self.attention), "denoiser.attention", self.attention,
                "needs one entry per entry of denoiser.channels")
        for width in self.channels:
            require(width % self.norm_groups == 0, "denoiser.channels", self.channels,
                    f"each must be a multiple of denoiser.norm_groups={self.norm_groups}")


# The distributions of noise levels of each process, and the mean and deviation of the normal that they come of.
NOISE_LEVELS: dict[str, dict[str, tuple[float, float]]] = {
    "diffusion": {"uniform": (0.0, 1.0), "logit_normal": (0.0, 1.0)},
    "edm": {"log_normal": (0.3, 1.0)},  # of log sigma: EDM2's -0.4 at a deviation of 0.5, for data of 1
    "flow": {"logit_normal": (0.0, 1.0), "uniform": (0.0, 1.0)},  # Esser et al. 2024, arXiv 2403.03206
}


@dataclass
class ObjectiveSettings:
    """Noise process, prediction target, loss and noise levels."""

    process: Literal["diffusion", "edm", "flow"] = "diffusion"
    """diffusion, edm (Karras et al. 2022) or flow (rectified flow, Liu et al. 2022)."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Between prediction and target."""
    huber_delta: float = 1.0
    """Beyond it the Huber loss is linear."""
    noise_levels: Literal["uniform", "logit_normal", "log_normal"] | None = None
    """Distribution that noise levels are drawn from; null: the usual one of the process."""
    level_mean: float | None = None
    """Of the normal that noise levels come of; null: the usual one of the process."""
    level_std: float | None = None
    """Its standard deviation."""
    prediction: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"
    """What the network predicts under diffusion, as diffusers names it."""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """Of diffusion's betas, as diffusers names it."""
    timesteps: int = 1000
    """Of diffusion."""
    beta_start: float = 0.00085
    """First beta of diffusion."""
    beta_end: float = 0.012
    """Last beta of diffusion."""
    min_snr: float | None = 5.0
    """Clamp of the signal-to-noise ratio in the loss weight (Hang et al. 2023, arXiv 2303.09556); null: weight 1."""
    sigma_min: float = 0.002
    """Least noise of edm, where sampling ends."""
    sigma_max: float = 80.0
    """Most noise of edm, where sampling begins."""

    def check(self) -> None:
        known = NOISE_LEVELS[self.process]
        require(self.noise_levels is None or self.noise_levels in known, "objective.noise_levels", self.noise_levels,
                f"must be {' or '.join(known)} where objective.process={self.process}")
        positive("objective", self, "timesteps", "beta_start", "beta_end", "min_snr", "huber_delta", "level_std",
                 "sigma_min")
        require(self.sigma_max > self.sigma_min, "objective.sigma_max", self.sigma_max,
                "must be above objective.sigma_min")


@dataclass
class TrainerSettings:
    """Ray Train and DeepSpeed. All progress is counted in images."""

    images: int = MISSING
    """Training images seen, repeats counted."""
    batch: int = 128
    """Images of a step, over all workers."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    """Of the learning rate after the warm-up."""
    warmup_images: int = 5_000
    """Over which the learning rate rises linearly."""
    final_lr_fraction: float = 0.05
    """Of the peak, where cosine ends."""
    decay_after_images: int = 1_000_000
    """Where inverse_sqrt begins to fall."""
    weight_decay: float = 0.0
    """Of AdamW."""
    beta2: float = 0.99
    """Of Adam's second moment; 0.99 suits runs of a few thousand steps, 0.999 longer ones."""
    grad_clip: float = 1.0
    """Norm that gradients are clipped to."""
    ema_halflife_images: list[int] = field(default_factory=lambda: [10_000])
    """Half-lives of averages of the weights; the best by validation is exported."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of matrix products; fp32 where the hardware does not multiply the others."""
    select_by: Literal["val_loss", "val_frechet"] | None = None
    """Export the checkpoint that is least by this; null: the last."""
    max_skipped_batches: int = execution(10)
    """Non-finite batches to skip before the run stops."""
    reader: Literal["cached", "stream"] = "cached"
    """cached: latents in each node's memory; stream: images are encoded as they come, at any size of set."""
    shuffle_shards: int = 32
    """Shards of images that are shuffled together where they are streamed."""
    augment: bool = False
    """Shift, scale and expose images a little differently in every epoch, where they are streamed."""
    encoder_actors: int | None = execution(None)
    """Ray actors that encode streamed images; null: one per GPU that does not train, else one per 4 CPUs."""
    workers: int = execution(1)
    """Ray Train workers, one per GPU."""
    min_workers: int | None = execution(None)
    """Go on with as few where no more are available; null: trainer.workers."""
    micro_batch: int | None = execution(None)
    """Images of one forward pass of a worker, with gradient accumulation; null: all of its share."""
    zero_stage: int = execution(2)
    """DeepSpeed ZeRO stage, 0 to 3."""
    zero3_persistence: int = execution(100_000)
    """Parameters of fewer elements stay on every worker under ZeRO-3."""
    offload: bool = execution(False)
    """Keep optimizer and averages in the host's memory."""
    activation_checkpointing: bool = execution(False)
    """Compute activations again in the backward pass, which saves memory."""
    channels_last: bool = execution(True)
    """Memory format of images and convolutions."""
    compile: bool = execution(False)
    """torch.compile of the repeated blocks."""
    checkpoint_every: int = execution(50_000)
    """Images between checkpoints."""
    keep_checkpoints: int = execution(2)
    """Checkpoints kept, beside milestones."""
    milestone_every: int | None = execution(None)
    """Images between checkpoints that are kept for good; null: none."""
    log_every: int = execution(2_560)
    """Images between lines of metrics.jsonl."""
    profile_steps: int = execution(0)
    """Steps to trace with torch.profiler into profile/."""
    max_failures: int = execution(3)
    """Failures of workers before the run stops; preemptions are not counted."""
    loggers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(
        default_factory=lambda: ["tensorboard"], metadata={"execution": True})
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio."""

    def check(self) -> None:
        positive("trainer", self, "images", "batch", "lr", "workers", "min_workers", "checkpoint_every",
                 "keep_checkpoints", "milestone_every", "log_every", "grad_clip", "decay_after_images",
                 "shuffle_shards", "encoder_actors")
        not_negative("trainer", self, "warmup_images", "max_failures", "max_skipped_batches", "profile_steps")
        fraction("trainer", self, "final_lr_fraction", "beta2")
        require(len(self.ema_halflife_images) > 0 and min(self.ema_halflife_images) > 0
                and len(set(self.ema_halflife_images)) == len(self.ema_halflife_images), "trainer.ema_halflife_images",
                self.ema_halflife_images, "needs one or more different numbers above 0, in brackets")
        require(self.zero_stage in (0, 1, 2, 3), "trainer.zero_stage", self.zero_stage, "must be 0, 1, 2 or 3")
        require(self.zero_stage > 0 or self.precision != "fp16", "trainer.precision", self.precision,
                "needs trainer.zero_stage=1 or more, whose optimizer scales the loss")
        require(self.zero_stage > 0 or not self.offload, "trainer.offload", self.offload,
                "needs trainer.zero_stage=1 or more")
        require(self.min_workers is None or self.min_workers <= self.workers, "trainer.min_workers", self.min_workers,
                f"must not be above trainer.workers={self.workers}")
        require(self.reader == "stream" or not self.augment, "trainer.augment", True, "needs trainer.reader=stream")
        require(self.micro_batch is None or self.micro_batch >= 2, "trainer.micro_batch", self.micro_batch,
                "must be at least 2, or null")
        for name, size in (("batch", self.batch), ("images", self.images % self.batch or self.batch)):
            require(size >= self.workers, f"trainer.{name}", getattr(self, name),
                    f"leaves a batch of {size} images, fewer than trainer.workers={self.workers}")

    def check_with(self, settings: Any) -> None:
        validate: ValidateSettings = settings.validate
        require(self.select_by != "val_frechet" or validate.frechet_images > 0, "trainer.select_by", "val_frechet",
                "needs validate.frechet_images above 0")
        require(self.select_by is None or validate.images > 0, "trainer.select_by", self.select_by,
                "needs validate.images above 0")


@dataclass
class ValidateSettings:
    """What is measured of a checkpoint beside the training, on patients of the val split."""

    every: int | None = execution(None)
    """Images between validations; null: every checkpoint. The last one is always validated."""
    images: int = execution(512)
    """Of the val split, at most, for the loss at fixed noise; 0: no validation."""
    sample_images: int = execution(8)
    """Images sampled for the picture."""
    frechet_images: int = execution(0)
    """Images sampled for the Fréchet distance; 0: none."""
    frechet_every: int | None = execution(None)
    """Images between Fréchet distances; null: at every validation."""
    batch: int = execution(64)
    """Images computed at a time."""
    steps: int = execution(20)
    """Of the sampler; also the exported generator's default until a corpus is published with it."""
    guidance: float = execution(2.0)
    """Scale of classifier-free guidance; also the exported generator's default, as steps."""

    def check(self) -> None:
        positive("validate", self, "every", "frechet_every", "batch", "steps")
        not_negative("validate", self, "images", "sample_images", "frechet_images", "guidance")
        require(self.frechet_images == 0 or self.frechet_images >= 2, "validate.frechet_images", self.frechet_images,
                "must be at least 2, or 0")
