"""Settings of the denoiser's training and of its validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from pipelines.graph.fields import execution, fraction, not_negative, positive, require


@dataclass
class TrainerSettings:
    """Training with Ray Train and DeepSpeed. All progress is counted in images."""

    images: int = MISSING
    """Training images seen, repeats counted."""
    batch: int = 128
    """Global batch size: images per optimizer step, over all workers."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    """Learning-rate schedule after warm-up."""
    warmup_images: int = 5_000
    """Images over which the learning rate warms up linearly."""
    final_lr_fraction: float = 0.05
    """cosine: final learning rate, as a fraction of the peak."""
    decay_after_images: int = 1_000_000
    """inverse_sqrt: images after which the learning rate starts to decay."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    beta2: float = 0.99
    """Adam's beta2; 0.99 suits runs of a few thousand steps, 0.999 longer ones."""
    grad_clip: float = 1.0
    """Maximum gradient norm."""
    ema_length: float | None = None
    """Length of the exported EMA of the weights: the standard deviation of its power-function profile, as a fraction of
    the images seen (sigma_rel in EDM2). null: the one from 0.05 to 0.2 whose samples have the lowest Fréchet distance
    from validate.images val images; 0.1 if these are fewer than four times the features' dimensions."""
    ema_snapshots: int = 16
    """Equal parts of the training, after each of which the stored EMAs are kept, with a checkpoint. An EMA of any
    length is reconstructed from them; each takes twice the room of the float32 weights."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Mixed-precision data type of matrix products; fp32 is used if the hardware has no units for the others. What
    stays in float32 under bf16 and fp16 is computed in TF32 on GPUs that have it."""
    select_by: Literal["val_loss", "val_frechet"] | None = None
    """Export the checkpoint with the lowest value of this metric, of the EMA of length 0.05; null: the last one."""
    max_skipped_batches: int = execution(10)
    """Non-finite batches to skip before the run stops."""
    reader: Literal["cached", "stream"] = "cached"
    """cached: every node memory-maps the encoded train split; stream: Ray Data encodes images during training, for
    sets that do not fit on a node."""
    shuffle_shards: int = 32
    """reader=stream: number of shards in one shuffle window."""
    augment: bool = False
    """reader=stream: augment images with small random shifts, scalings and exposure changes."""
    encoder_actors: int | None = execution(None)
    """reader=stream: Ray actors that encode images; null: one per GPU not used for training, else one per 4 CPUs."""
    accelerator: Literal["auto", "gpu", "cpu"] = execution("auto")
    """gpu: one GPU per worker; cpu: none; auto: GPUs if the cluster has any when training starts."""
    accelerator_type: str | None = execution(None)
    """Train on GPUs of this type only, by its name in Ray (H100, A100-80G, …); null: on any. With accelerator=auto it
    means gpu."""
    wait_seconds: float = execution(600.0)
    """Time limit for the cluster to have room for the least number of workers, for instance while nodes start."""
    workers: int = execution(1)
    """Ray Train workers, one per GPU."""
    min_workers: int | None = execution(None)
    """Elastic training: continue with at least this many workers when nodes are lost; null: always trainer.workers."""
    micro_batch: int | None = execution(None)
    """Images per forward pass of a worker, with gradient accumulation; null: its whole share of the batch in one
    pass."""
    zero_stage: int = execution(2)
    """DeepSpeed ZeRO stage, 0 to 3."""
    zero3_persistence: int = execution(100_000)
    """ZeRO-3: parameters with fewer elements than this are not partitioned (stage3_param_persistence_threshold)."""
    offload: bool = execution(False)
    """Offload optimizer states and EMAs to CPU memory."""
    activation_checkpointing: bool = execution(False)
    """Recompute activations in the backward pass to save memory."""
    channels_last: bool = execution(True)
    """Images enter the network in the channels_last memory format, which convolutions keep."""
    compile: bool = execution(False)
    """Apply torch.compile to the repeated blocks."""
    checkpoint_every: int = execution(50_000)
    """Images between checkpoints, at least, but for those of trainer.ema_snapshots."""
    checkpoint_seconds: float = execution(60.0)
    """Seconds between checkpoints, at least, however fast the cluster trains, but for those of
    trainer.ema_snapshots."""
    keep_checkpoints: int = execution(2)
    """Number of checkpoints to keep, in addition to milestones."""
    milestone_every: int | None = execution(None)
    """Images between milestones, checkpoints that are never deleted; null: none."""
    log_every: int = execution(2_560)
    """Images between lines of metrics.jsonl."""
    profile_steps: int = execution(0)
    """Steps to trace with torch.profiler into profile/; 0: none."""
    max_failures: int = execution(3)
    """Worker failures without a new checkpoint before the run stops; preemptions are not counted."""
    loggers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(
        default_factory=lambda: ["tensorboard"], metadata={"execution": True})
    """Loggers in addition to metrics.jsonl: tensorboard, wandb, mlflow, trackio."""

    @property
    def snapshot_every(self) -> int:
        """Images between snapshots of the EMAs."""
        return -(-self.images // self.ema_snapshots)

    def check(self) -> None:
        positive("trainer", self, "images", "batch", "lr", "workers", "min_workers", "checkpoint_every",
                 "keep_checkpoints", "milestone_every", "log_every", "grad_clip", "decay_after_images",
                 "shuffle_shards", "encoder_actors", "ema_snapshots")
        not_negative("trainer", self, "warmup_images", "checkpoint_seconds", "wait_seconds", "max_failures",
                     "max_skipped_batches", "profile_steps")
        fraction("trainer", self, "final_lr_fraction", "beta2")
        require(self.accelerator_type is None or self.accelerator != "cpu", "trainer.accelerator_type",
                self.accelerator_type, "is of GPUs, but trainer.accelerator=cpu")
        require(self.ema_length is None or 0 < self.ema_length < 12**-0.5, "trainer.ema_length", self.ema_length,
                "must be above 0 and below 0.288, the length of a plain mean")
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
    """Validation of checkpoints on the val split, in a separate task alongside training."""

    every: int | None = execution(None)
    """Images between validations; null: every checkpoint. None starts while another runs, except that of the last
    checkpoint."""
    accelerator: Literal["auto", "gpu", "cpu"] = execution("auto")
    """gpu: a GPU beside those of the workers; cpu: the CPUs of one node, too slow for a Fréchet distance of a large
    denoiser; auto: a GPU if the cluster has more than train and encode streamed images when training starts."""
    max_seconds: float = execution(3_600.0)
    """Time limit of one validation, or of sampling with one EMA: one that hangs is ended, and what follows begins."""
    images: int = execution(512)
    """Val images used for the validation loss (at fixed noise), at most, and sampled after the training with each of
    the EMAs to choose from (trainer.ema_length); 0: no validation."""
    sample_images: int = execution(8)
    """Images in the grid of samples."""
    frechet_images: int = execution(0)
    """Images sampled for the Fréchet distance during training; 0: none."""
    frechet_every: int | None = execution(None)
    """Images between Fréchet distances; null: every validation."""
    batch: int = execution(64)
    """Images per forward pass."""
    steps: int = execution(20)
    """Sampling steps; also num_inference_steps of the exported generator (publish replaces it by sample.steps)."""
    guidance: float = execution(1.0)
    """Classifier-free guidance scale; also guidance_scale of the exported generator (publish replaces it by
    sample.guidance)."""

    def check(self) -> None:
        positive("validate", self, "every", "max_seconds", "frechet_every", "batch", "steps")
        not_negative("validate", self, "images", "sample_images", "frechet_images", "guidance")
        require(self.frechet_images == 0 or self.frechet_images >= 2, "validate.frechet_images", self.frechet_images,
                "must be at least 2, or 0")
