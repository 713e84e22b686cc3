"""Every setting of every stage, with its type, default and range. Hydra fills it from `conf/` and the command line.

A field marked `execution` says how a stage is run, not what it makes: changing it redoes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING


def execution(default: Any) -> Any:
    return field(default=default, metadata={"execution": True})


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r}: {rule}")


def positive(section: str, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(value is None or (value > 0 and math.isfinite(value)), f"{section}.{name}", value, "must be above 0")


def fraction(section: str, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(0 <= value <= 1, f"{section}.{name}", value, "must be between 0 and 1")


@dataclass
class Data:
    """Where images come from and what they become."""

    source: str = MISSING  # module of pipelines.data.sources
    root: str | None = None  # folder of the images
    subset: str | None = None  # which of the sets that a source holds, where it holds several
    size: int = 64  # pixels, the side of the square images that everything learns from
    images: int | None = None  # how many to take; the phantom has no end of them
    patient_regex: str | None = None  # its groups (or whole match) in the relative path name the patient
    sets: list[str] | None = None  # of a mix, those to take; all of them when null
    deduplicate: bool = True
    near_duplicates: int | None = 10  # of 256 bits of perceptual hash, so many may differ; null: equal files only
    frontal: bool = False  # take frontal views only, by what the set tells, else by aspect and symmetry
    crop_border: bool = True  # leave out uniform borders: collimation, frames, padding
    fit: str = "crop"  # crop | pad: the centre square, or all of the picture on black
    erase_text: bool = False  # replace bright letters and lead markers near the edges by their ground
    target: str | None = None  # the label that classifiers learn; chosen from the labels when null
    val_fraction: float = 0.1  # share of patients, where the source has no split of its own
    test_fraction: float = 0.1
    min_side: int = 16  # pixels; smaller images go to quarantine
    max_pixels: int = 200_000_000  # decompression bombs go to quarantine
    max_bad_fraction: float = execution(0.2)  # more quarantined images than this stop the run
    shard_rows: int = 512

    def check(self) -> None:
        positive("data", self, "images", "min_side", "max_pixels", "shard_rows")
        fraction("data", self, "val_fraction", "test_fraction", "max_bad_fraction")
        require(self.near_duplicates is None or 0 <= self.near_duplicates <= 16, "data.near_duplicates",
                self.near_duplicates, "must be between 0 and 16 (bits), or null")
        require(self.fit in ("crop", "pad"), "data.fit", self.fit, "must be crop or pad")
        require(16 <= self.size <= 2048 and self.size % 4 == 0, "data.size", self.size,
                "must be a multiple of 4 from 16 to 2048 (pixels)")
        require(self.val_fraction + self.test_fraction < 1, "data.val_fraction + data.test_fraction",
                self.val_fraction + self.test_fraction, "must leave patients to train on (below 1)")
        if self.patient_regex is not None:
            try:
                re.compile(self.patient_regex)
            except re.error as error:
                raise ValueError(f"data.patient_regex={self.patient_regex!r} is no regular expression: {error}") \
                    from error


@dataclass
class Fitting:
    """How one small network is trained in one process; shared by the autoencoder, the encoder and the classifier."""

    images: int = 100_000  # training images seen, repeats counted
    max_epochs: int = 60  # but no more passes than these over a small set
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    checkpoint_seconds: float = execution(60.0)

    def check_fitting(self, section: str) -> None:
        positive(section, self, "images", "max_epochs", "batch", "lr", "checkpoint_seconds")

    def total(self, n: int) -> int:
        """Training images seen when there are `n` to see."""
        return min(self.images, self.max_epochs * n)


@dataclass
class Autoencoder(Fitting):
    """diffusers AutoencoderKL: named on the Hub, or trained on the train split; or none, for diffusion of pixels."""

    space: str = "latent"  # latent | pixel: without an autoencoder
    pretrained: str | None = None  # Hub id or folder; its weights are then used as they are
    channels: list[int] = field(default_factory=lambda: [32, 48, 64])
    latent_channels: int = 4
    kl_weight: float = 1e-5
    perceptual: str | None = None  # network of MONAI's PerceptualLoss, whose weights it downloads; null: none
    perceptual_weight: float = 0.1
    adversarial_weight: float = 0.0  # of MONAI's patch discriminator; 0: none
    adversarial_after: float = 0.3  # share of the training before the discriminator has a say

    def check(self) -> None:
        self.check_fitting("autoencoder")
        require(self.space in ("latent", "pixel"), "autoencoder.space", self.space, "must be latent or pixel")
        require(self.adversarial_weight >= 0, "autoencoder.adversarial_weight", self.adversarial_weight,
                "must not be negative")
        fraction("autoencoder", self, "adversarial_after")
        for width in self.channels:
            require(width > 0 and width % 8 == 0, "autoencoder.channels", self.channels, "each must be a multiple of 8")


@dataclass
class Encoder(Fitting):
    """The self-supervised image encoder whose global embedding conditions the generator."""

    pretrained: str | None = None  # rad-dino, or a timm model with Hub weights; null: DINO on the train split
    architecture: str = "vit_tiny_patch16_224"
    options: dict[str, Any] = field(default_factory=dict)  # passed on to timm
    prototypes: int = 1024
    local_crops: int = 2
    teacher_momentum: float = 0.99
    koleo_weight: float = 0.1

    def check(self) -> None:
        self.check_fitting("encoder")
        positive("encoder", self, "prototypes")
        require(self.local_crops >= 0, "encoder.local_crops", self.local_crops, "must not be negative")
        fraction("encoder", self, "teacher_momentum")


@dataclass
class Latents:
    batch: int = 64
    patch_grid: int = 0  # keep the encoder's patch features, too, averaged to a grid of this side; 0: not
    masks: int = 0  # keep so many structures of the images' masks, too, at the latents' size; 0: none

    def check(self) -> None:
        positive("latents", self, "batch")
        for name in ("patch_grid", "masks"):
            require(getattr(self, name) >= 0, f"latents.{name}", getattr(self, name), "must not be negative")


@dataclass
class Condition:
    """What the generator is given beside noise. Dropped parts are replaced by a null that is learned."""

    embedding_tokens: int = 4  # that the image embedding becomes in cross-attention; 0: no embedding
    patches: bool = False  # one token for each patch feature (latents.patch_grid)
    labels: bool = True  # one token for the labels, where the data have any
    mask: bool = False  # one input channel for each structure of the masks (latents.masks)
    drop_all: float = 0.1  # share of images without any condition, as guidance's other side needs it
    drop_embedding: float = 0.05  # of the others, each condition alone
    drop_patches: float = 0.05
    drop_labels: float = 0.05
    drop_mask: float = 0.05

    @property
    def used(self) -> list[str]:
        """Names of the conditions in use."""
        wanted = {"embedding": self.embedding_tokens > 0, "patches": self.patches, "labels": self.labels,
                  "mask": self.mask}
        return [name for name in CONDITIONS if wanted[name]]

    def check(self) -> None:
        require(self.embedding_tokens >= 0, "condition.embedding_tokens", self.embedding_tokens, "must not be negative")
        fraction("condition", self, "drop_all", *(f"drop_{name}" for name in CONDITIONS))


CONDITIONS = ("embedding", "patches", "labels", "mask")


@dataclass
class Denoiser:
    """diffusers' UNet2DConditionModel or PixArtTransformer2DModel, with the condition in cross-attention."""

    architecture: str = "unet"  # unet | dit
    channels: list[int] = field(default_factory=lambda: [48, 64, 96])  # of a UNet, per level
    attention: list[bool] = field(default_factory=lambda: [False, False, True])  # of a UNet, per level
    layers: int = 1  # of a UNet per level; of a DiT in all
    norm_groups: int = 16  # of a UNet
    width: int = 384  # of a DiT
    patch: int = 2  # of a DiT: side of the squares of latent that are its tokens
    head_dim: int = 24
    cross_attention_dim: int = 128

    def check(self) -> None:
        require(self.architecture in ("unet", "dit"), "denoiser.architecture", self.architecture, "must be unet or dit")
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


@dataclass
class Objective:
    process: str = "diffusion"  # diffusion | edm (Karras et al. 2022) | flow (rectified flow, Liu et al. 2022)
    distance: str = "l2"  # l2 | l1 | huber, between prediction and target
    huber_delta: float = 1.0  # beyond it the Huber distance is linear
    levels: str | None = None  # uniform | logit_normal | log_normal noise levels; null: the usual of the process
    level_mean: float | None = None  # of the normal that the levels come of; null: the usual of the process
    level_std: float | None = None
    prediction: str = "v_prediction"  # of diffusion: v_prediction | epsilon | sample, as diffusers names them
    schedule: str = "scaled_linear"
    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    min_snr: float | None = 5.0  # Hang et al. 2023, arXiv 2303.09556; null weights all noise levels alike
    sigma_min: float = 0.002  # of edm: where sampling ends and begins
    sigma_max: float = 80.0

    def check(self) -> None:
        require(self.process in LEVELS, "objective.process", self.process, f"must be one of {', '.join(LEVELS)}")
        require(self.distance in ("l2", "l1", "huber"), "objective.distance", self.distance, "must be l2, l1 or huber")
        known = LEVELS[self.process]
        require(self.levels is None or self.levels in known, "objective.levels", self.levels,
                f"must be {' or '.join(known)} where objective.process={self.process}")
        require(self.prediction in ("v_prediction", "epsilon", "sample"), "objective.prediction", self.prediction,
                "must be v_prediction, epsilon or sample")
        positive("objective", self, "timesteps", "beta_start", "beta_end", "min_snr", "huber_delta", "level_std",
                 "sigma_min")
        require(self.sigma_max > self.sigma_min, "objective.sigma_max", self.sigma_max,
                "must be above objective.sigma_min")
        require(self.schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"), "objective.schedule", self.schedule,
                "must be linear, scaled_linear or squaredcos_cap_v2")


# The noise levels of each process, and the mean and deviation of the normal they come of.
LEVELS: dict[str, dict[str, tuple[float, float]]] = {
    "diffusion": {"uniform": (0.0, 1.0), "logit_normal": (0.0, 1.0)},
    "edm": {"log_normal": (0.3, 1.0)},  # of log sigma: EDM2's -0.4 at a deviation of 0.5, for data of 1
    "flow": {"logit_normal": (0.0, 1.0), "uniform": (0.0, 1.0)},  # Esser et al. 2024, arXiv 2403.03206
}


@dataclass
class Trainer:
    """Ray Train and DeepSpeed. All progress is counted in images."""

    images: int = MISSING
    batch: int = 128  # over all workers
    lr: float = 1e-3
    schedule: str = "cosine"  # cosine | constant | inverse_sqrt, after the warm-up
    warmup_images: int = 5_000
    final_lr_fraction: float = 0.05  # where cosine ends
    decay_after_images: int = 1_000_000  # where inverse_sqrt begins
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_halflife_images: list[int] = field(default_factory=lambda: [10_000])  # the best by validation is exported
    precision: str = "bf16"  # bf16 | fp16 | fp32; fp32 where the hardware does not multiply the others
    best: str | None = None  # export the checkpoint with the least val_loss or val_frechet; null: the last
    max_skipped: int = execution(10)  # batches whose loss is not finite; one more stops the training
    workers: int = execution(1)
    min_workers: int | None = execution(None)  # go on with as few where no more are to be had; null: trainer.workers
    micro_batch: int | None = execution(None)  # images of one forward pass of a worker; null: all of its share
    zero_stage: int = execution(2)
    zero3_persistence: int = execution(100_000)  # parameters below this many elements stay on every worker
    offload: bool = execution(False)  # optimizer and EMA in the host's memory
    activation_checkpointing: bool = execution(False)  # forward twice, for memory's sake
    channels_last: bool = execution(True)
    compile: bool = execution(False)  # torch.compile of the repeated blocks
    checkpoint_every: int = execution(50_000)
    keep_checkpoints: int = execution(2)
    milestone_every: int | None = execution(None)  # checkpoints that are kept for good
    log_every: int = execution(2_560)
    profile_steps: int = execution(0)  # trace so many steps with torch.profiler into profile/
    max_failures: int = execution(3)  # of workers; preemptions are not counted
    boards: list[str] = field(default_factory=lambda: ["tensorboard"], metadata={"execution": True})  # see BOARDS

    def check(self) -> None:
        positive("trainer", self, "images", "batch", "lr", "workers", "min_workers", "checkpoint_every",
                 "keep_checkpoints", "milestone_every", "log_every", "grad_clip", "decay_after_images")
        for name in ("warmup_images", "max_failures", "max_skipped", "profile_steps"):
            require(getattr(self, name) >= 0, f"trainer.{name}", getattr(self, name), "must not be negative")
        fraction("trainer", self, "final_lr_fraction")
        require(self.schedule in ("cosine", "constant", "inverse_sqrt"), "trainer.schedule", self.schedule,
                "must be cosine, constant or inverse_sqrt")
        require(len(self.ema_halflife_images) > 0 and min(self.ema_halflife_images) > 0
                and len(set(self.ema_halflife_images)) == len(self.ema_halflife_images), "trainer.ema_halflife_images",
                self.ema_halflife_images, "needs one or more different numbers above 0, in brackets")
        require(self.zero_stage in (0, 1, 2, 3), "trainer.zero_stage", self.zero_stage, "must be 0, 1, 2 or 3")
        require(self.precision in ("bf16", "fp16", "fp32"), "trainer.precision", self.precision,
                "must be bf16, fp16 or fp32")
        require(self.zero_stage > 0 or self.precision != "fp16", "trainer.precision", self.precision,
                "needs trainer.zero_stage=1 or more, whose optimizer scales the loss")
        require(self.zero_stage > 0 or not self.offload, "trainer.offload", self.offload,
                "needs trainer.zero_stage=1 or more")
        require(self.best in (None, *VALIDATED), "trainer.best", self.best,
                f"must be {' or '.join(VALIDATED)}, or null")
        require(self.min_workers is None or self.min_workers <= self.workers, "trainer.min_workers", self.min_workers,
                f"must not be above trainer.workers={self.workers}")
        require(self.micro_batch is None or self.micro_batch >= 2, "trainer.micro_batch", self.micro_batch,
                "must be at least 2, or null")
        for name, size in (("batch", self.batch), ("images", self.images % self.batch or self.batch)):
            require(size >= self.workers, f"trainer.{name}", getattr(self, name),
                    f"leaves a batch of {size} images, fewer than trainer.workers={self.workers}")
        unknown = set(self.boards) - set(BOARDS)
        require(not unknown, "trainer.boards", self.boards, f"must be of {', '.join(BOARDS)}")


BOARDS = ("tensorboard", "wandb", "mlflow", "trackio")  # beside metrics.jsonl
VALIDATED = ("val_loss", "val_frechet")


@dataclass
class Validate:
    """What is measured of a checkpoint beside the training, on patients of the val split."""

    every: int | None = execution(None)  # images between validations; null: every checkpoint; the last one always
    images: int = execution(512)  # of the val split, at most, for the loss at fixed noise; 0: no validation
    shown: int = execution(8)  # sampled for the picture
    frechet_images: int = execution(0)  # sampled for the Fréchet distance; 0: none
    frechet_every: int | None = execution(None)  # null: at every validation

    def check(self) -> None:
        positive("validate", self, "every", "frechet_every")
        for name in ("images", "shown", "frechet_images"):
            require(getattr(self, name) >= 0, f"validate.{name}", getattr(self, name), "must not be negative")
        require(self.frechet_images == 0 or self.frechet_images >= 2, "validate.frechet_images", self.frechet_images,
                "must be at least 2, or 0")


@dataclass
class Sample:
    n: int = MISSING
    steps: int = 20
    guidance: float = 2.0
    strategy: str = "reconstruction"  # module-level function of synth.strategies
    batch: int = 64
    shard_rows: int = 256
    actors: int | None = execution(None)  # one per GPU, or one on the CPUs, when null

    def check(self) -> None:
        positive("sample", self, "n", "steps", "batch", "shard_rows", "actors")
        require(self.guidance >= 0, "sample.guidance", self.guidance, "must not be negative")


@dataclass
class Evaluate:
    n: int = 500  # images compared on each side, at most
    neighbours: int = 5  # k of precision, recall, density and coverage
    pairs: int = 200  # random pairs for MS-SSIM

    def check(self) -> None:
        positive("evaluate", self, "n", "neighbours", "pairs")


@dataclass
class Finetune(Fitting):
    backbone: str = "scratch"  # scratch (a small ResNet) | encoder (the run's own, frozen)
    channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])  # of the ResNet, one entry a level

    def check(self) -> None:
        self.check_fitting("finetune")
        require(self.backbone in ("scratch", "encoder"), "finetune.backbone", self.backbone,
                "must be scratch or encoder")
        require(len(self.channels) > 0 and min(self.channels) > 0, "finetune.channels", self.channels,
                "needs a width above 0 for every level")


@dataclass
class Publish:
    target: str = "local"  # local, or the Hub user or organisation to push to
    private: bool = True
    license: str = "other"
    allow: list[str] = field(default_factory=list)  # names of gates that may fail and still be pushed


@dataclass
class StageSpec:
    """One node of the stage graph: where its function lives, what it reads, which settings shape its result."""

    run: str = MISSING  # module:function
    needs: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)


@dataclass
class Settings:
    profile: str = MISSING
    storage: str = "runs"
    name: str = MISSING
    seed: int = 0
    changed: str | None = execution(None)  # redo | refuse, for a stage whose settings or inputs changed
    report: bool = execution(False)  # of `rayograph latents`: tell how good the cached latents are
    data: Data = field(default_factory=Data)
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    encoder: Encoder = field(default_factory=Encoder)
    latents: Latents = field(default_factory=Latents)
    condition: Condition = field(default_factory=Condition)
    denoiser: Denoiser = field(default_factory=Denoiser)
    objective: Objective = field(default_factory=Objective)
    trainer: Trainer = field(default_factory=Trainer)
    validate: Validate = field(default_factory=Validate)
    sample: Sample = field(default_factory=Sample)
    evaluate: Evaluate = field(default_factory=Evaluate)
    finetune: Finetune = field(default_factory=Finetune)
    publish: Publish = field(default_factory=Publish)
    graph: dict[str, StageSpec] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError naming the first setting that is out of its range."""
        require(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name) is not None, "name", self.name,
                "must be letters, digits, '.', '_' and '-' only: it names a folder below storage")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        for key, uri in (("storage", self.storage), ("data.root", self.data.root)):
            if uri and "://" in uri and urlsplit(uri).password:
                raise ValueError(f"{key} holds a password; credentials belong in the environment, not in a setting")
        require(self.changed in (None, "redo", "refuse"), "changed", self.changed, "must be redo or refuse")
        for section in vars(self).values():
            if hasattr(section, "check"):
                section.check()
        require(self.condition.patches <= (self.latents.patch_grid > 0), "condition.patches", True,
                "needs latents.patch_grid above 0")
        require(self.condition.mask <= (self.latents.masks > 0), "condition.mask", True, "needs latents.masks above 0")
        require(self.trainer.best != "val_frechet" or self.validate.frechet_images > 0, "trainer.best", "val_frechet",
                "needs validate.frechet_images above 0")
        require(self.trainer.best is None or self.validate.images > 0, "trainer.best", self.trainer.best,
                "needs validate.images above 0")


def outcome_settings(section: Any) -> dict[str, Any]:
    """The fields of a settings section that shape a stage's result, without those of its execution."""
    return {
        f.name: getattr(section, f.name)
        for f in dataclasses.fields(section)
        if not f.metadata.get("execution", False)
    }
