"""Settings of the generator's networks: autoencoder, encoder, latents, denoiser and objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.data.structures import STRUCTURES
from pipelines.graph.fields import fraction, not_negative, positive, require
from pipelines.learning.settings import SmallTrainingSettings


@dataclass
class AutoencoderSettings(SmallTrainingSettings):
    """The autoencoder, an AutoencoderKL of diffusers: from the Hub, or trained on the train split; or none."""

    space: Literal["latent", "pixel"] = "latent"
    """pixel: no autoencoder; the denoiser works on pixels."""
    pretrained: str | None = None
    """Hub id or folder of an AutoencoderKL whose weights are used unchanged; null: trained here."""
    channels: list[int] = field(default_factory=lambda: [32, 48, 64])
    """Feature channels of each resolution level; every level but the last halves the side."""
    latent_channels: int = 4
    """Channels of the latent."""
    kl_weight: float = 1e-5
    """Weight of the KL divergence from the posterior to a standard normal."""
    spectral_weight: float = 1.0
    """Weight of the spectral loss: amplitudes, and their logarithms, in windows of 16 px; 0: none."""
    perceptual: str | None = None
    """Network of MONAI's PerceptualLoss, whose weights are downloaded; null: no perceptual loss."""
    perceptual_weight: float = 0.1
    """Weight of the perceptual loss."""
    adversarial_weight: float = 0.0
    """Weight of the adversarial loss (MONAI's PatchGAN discriminator); 0: no discriminator."""
    adversarial_start: float = 0.3
    """Fraction of training after which the adversarial loss is added."""

    def check(self) -> None:
        self.check_training("autoencoder")
        not_negative("autoencoder", self, "spectral_weight", "adversarial_weight")
        fraction("autoencoder", self, "adversarial_start")
        for width in self.channels:
            require(width > 0 and width % 8 == 0, "autoencoder.channels", self.channels, "each must be a multiple of 8")


@dataclass
class EncoderSettings(SmallTrainingSettings):
    """The self-supervised image encoder whose global embedding conditions the generator."""

    pretrained: str | None = None
    """rad-dino, or a timm model with Hub weights; null: trained here by DINO."""
    architecture: str = "vit_tiny_patch16_224"
    """timm vision transformer to train."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of timm.create_model."""
    prototypes: int = 1024
    """Outputs of DINO's projection head."""
    local_crops: int = 2
    """Local crops per image, in addition to the two global ones."""
    teacher_momentum: float = 0.99
    """Initial momentum of the EMA teacher; it rises to 1 on a cosine schedule."""
    koleo_weight: float = 0.1
    """Weight of the KoLeo regulariser, which spreads embeddings apart."""

    def check(self) -> None:
        self.check_training("encoder")
        positive("encoder", self, "prototypes")
        not_negative("encoder", self, "local_crops")
        fraction("encoder", self, "teacher_momentum")


@dataclass
class LatentsSettings:
    """What is stored for every encoded image."""

    batch: int = 64
    """Images encoded per forward pass."""
    patch_grid: int = 0
    """Store the encoder's patch features, average-pooled to a grid of this side; 0: none."""
    masks: list[str] = field(default_factory=list)
    """Structures of the images' masks to store, at the latents' resolution: left_lung, right_lung, lungs, heart and
    others."""
    logvar: bool | None = None
    """Store the posterior log-variances, which doubles the size of a latent; null: only if they account for more
    than 1 % of a channel's variance."""

    def check(self) -> None:
        positive("latents", self, "batch")
        not_negative("latents", self, "patch_grid")
        for structure in self.masks:
            require(structure in STRUCTURES, "latents.masks", structure, f"must be one of {', '.join(STRUCTURES)}")
        require(len(set(self.masks)) == len(self.masks), "latents.masks", self.masks, "names a structure twice")


CONDITIONS = ("embedding", "patches", "labels", "mask")


@dataclass
class ConditionSettings:
    """What the denoiser is conditioned on. A dropped condition is replaced by a learned null token."""

    embedding_tokens: int = 4
    """Cross-attention tokens that encode the image embedding; 0: no conditioning on it."""
    patches: bool = False
    """Condition on patch features (latents.patch_grid), as one token each."""
    labels: bool = True
    """Condition on labels, as one token; an unlabelled image gets the learned null token."""
    mask: bool = False
    """Condition on the mask (latents.masks), as one input channel per structure."""
    drop_all: float = 0.1
    """Probability of dropping all conditions, for classifier-free guidance."""
    drop_embedding: float = 0.05
    """Probability of dropping only the embedding."""
    drop_patches: float = 0.05
    """Probability of dropping only the patch features."""
    drop_labels: float = 0.05
    """Probability of dropping only the labels."""
    drop_mask: float = 0.05
    """Probability of dropping only the mask."""
    hide_findings: float = 0.2
    """Fraction of training images for which a random subset of the findings is set to unknown, so that the
    generator can be conditioned on single findings."""

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
    """diffusers' UNet2DConditionModel or PixArtTransformer2DModel, conditioned by cross-attention."""

    architecture: Literal["unet", "dit"] = "unet"
    """unet, or dit (diffusion transformer)."""
    pretrained: str | None = None
    """UNet: Hub id or folder of a UNet, or of a pipeline with one, such as Stable Diffusion, whose architecture is used
    (in place of channels, attention, adaptive_norm, layers, norm_groups and head_dim) and from whose weights training
    starts; null: newly initialised. Cross-attention is new if cross_attention_dim is not the published UNet's."""
    channels: list[int] = field(default_factory=lambda: [48, 64, 96])
    """UNet: feature channels of each resolution level."""
    attention: list[bool] = field(default_factory=lambda: [False, False, True])
    """UNet: whether each level has attention."""
    adaptive_norm: bool = True
    """UNet: time and conditions together scale and shift the normalised features of every level (adaptive group
    normalisation, Dhariwal & Nichol 2021, arXiv 2105.05233), in addition to cross-attention; false: only time shifts
    them, as in Stable Diffusion."""
    layers: int = 1
    """UNet: residual blocks per level; DiT: number of transformer blocks."""
    norm_groups: int = 16
    """UNet: groups of group normalisation."""
    width: int = 384
    """DiT: token width."""
    patch: int = 2
    """DiT: patch size, in latent pixels."""
    head_dim: int = 24
    """Width of an attention head."""
    cross_attention_dim: int = 128
    """Width of a conditioning token."""

    def check_with(self, settings: Any) -> None:
        if self.pretrained is not None:
            require(settings.objective.process == "diffusion", "denoiser.pretrained", self.pretrained,
                    f"was trained by diffusion, not with objective.process={settings.objective.process}")
            require(settings.autoencoder.space == "latent", "denoiser.pretrained", self.pretrained,
                    "is of latents, not of autoencoder.space=pixel")

    def check(self) -> None:
        require(self.pretrained is None or self.architecture == "unet", "denoiser.pretrained", self.pretrained,
                "is of a UNet, but denoiser.architecture=dit")
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


# Noise-level distributions of each process, default first, with the mean and standard deviation of their normal.
NOISE_LEVELS: dict[str, dict[str, tuple[float, float]]] = {
    "diffusion": {"uniform": (0.0, 1.0), "logit_normal": (0.0, 1.0)},
    "edm": {"log_normal": (0.3, 1.0)},  # of log sigma: EDM2's -0.4 for data of standard deviation 0.5, scaled to 1
    "flow": {"logit_normal": (0.0, 1.0), "uniform": (0.0, 1.0)},  # Esser et al. 2024, arXiv 2403.03206
}


@dataclass
class ObjectiveSettings:
    """Noise process, prediction target, loss and noise levels."""

    process: Literal["diffusion", "edm", "flow"] = "diffusion"
    """diffusion, edm (Karras et al. 2022) or flow (rectified flow, Liu et al. 2022)."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Distance between prediction and target."""
    huber_delta: float = 1.0
    """Absolute error above which the Huber loss is linear."""
    noise_levels: Literal["uniform", "logit_normal", "log_normal"] | None = None
    """Distribution of the training noise levels; null: the default of the process."""
    level_mean: float | None = None
    """Mean of the normal distribution behind logit_normal and log_normal; null: the default of the process."""
    level_std: float | None = None
    """Standard deviation of that normal distribution; null: the default of the process."""
    prediction: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"
    """diffusion: prediction type, by its diffusers name."""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """diffusion: beta schedule, by its diffusers name."""
    timesteps: int = 1000
    """diffusion: number of timesteps; flow: scale of the time that the network is given."""
    beta_start: float = 0.00085
    """diffusion: first beta."""
    beta_end: float = 0.012
    """diffusion: last beta."""
    min_snr: float | None = 5.0
    """diffusion: gamma of min-SNR loss weighting (Hang et al. 2023, arXiv 2303.09556); null: no weighting."""
    sigma_min: float = 0.002
    """edm: lowest noise level, at which sampling ends."""
    sigma_max: float = 80.0
    """edm: highest noise level, at which sampling starts."""

    def check(self) -> None:
        known = NOISE_LEVELS[self.process]
        require(self.noise_levels is None or self.noise_levels in known, "objective.noise_levels", self.noise_levels,
                f"must be {' or '.join(known)} where objective.process={self.process}")
        positive("objective", self, "timesteps", "beta_start", "beta_end", "min_snr", "huber_delta", "level_std",
                 "sigma_min")
        require(self.sigma_max > self.sigma_min, "objective.sigma_max", self.sigma_max,
                "must be above objective.sigma_min")
