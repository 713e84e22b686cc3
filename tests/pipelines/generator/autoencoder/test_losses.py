"""What an autoencoder learns from, with and without the parts that judge its pictures."""

import numpy as np
import pytest
import torch

from pipelines.generator.autoencoder.losses import Reconstruction, spectral_loss
from pipelines.generator.autoencoder.model import new_autoencoder, set_statistics
from pipelines.generator.settings import AutoencoderSettings
from pipelines.generator.standalone.pixel_vae import Pixels

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 1, 32, 32), dtype=np.uint8)


def learner(**options) -> Reconstruction:
    torch.manual_seed(0)
    settings = AutoencoderSettings(channels=[8, 16, 16], **options)
    return Reconstruction(new_autoencoder(settings, 32), settings)


def gradients(module: torch.nn.Module) -> float:
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


def test_detail_of_the_right_strength_is_better_than_none_wherever_it_lies():
    """Which the loss of pixels judges the other way round."""
    target, other = 0.2 * torch.randn(2, 8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = torch.zeros_like(target)
    assert (other - target).square().mean() > (smooth - target).square().mean()
    assert spectral_loss(other, target) < 0.7 * spectral_loss(smooth, target)
    assert spectral_loss(2 * target, target) > spectral_loss(target, target) == 0


@pytest.mark.parametrize("side", [8, 32, 40])
def test_the_spectral_loss_has_gradients_for_images_of_any_side_and_for_flat_ones(side):
    images = torch.zeros(2, 1, side, side, requires_grad=True)
    spectral_loss(images, torch.rand(2, 1, side, side)).backward()
    assert images.grad.isfinite().all()
    module = learner()
    values = module.loss(IMAGES, 0.0)
    assert values["spectral"] > 0
    without = learner(spectral_weight=0.0).loss(IMAGES, 0.0)
    assert values["loss"] > without["loss"]
    assert "spectral" not in without


def test_the_discriminator_waits_for_its_share_of_the_training():
    module = learner(adversarial_weight=0.5, adversarial_start=0.3)
    before, after = module.loss(IMAGES, 0.2), module.loss(IMAGES, 0.3)
    assert after.keys() - before.keys() == {"generator_loss", "discriminator_loss"}
    assert before["loss"] < after["loss"]


def test_each_side_of_the_game_has_gradients_of_its_own():
    """The autoencoder's are those of its part alone, and the discriminator's those of its own."""
    found = {}
    for parts in (("generator_loss",), ("discriminator_loss",), ("generator_loss", "discriminator_loss")):
        module = learner(adversarial_weight=0.5, adversarial_start=0.0)
        torch.manual_seed(1)
        posterior = module.model.encode(torch.from_numpy(IMAGES / 127.5 - 1).float()).latent_dist
        image = module.model.decode(posterior.sample()).sample
        values = dict(zip(("generator_loss", "discriminator_loss"), module._adversarial(image, torch.zeros_like(image)),
                          strict=True))
        sum(values[part] for part in parts).backward()
        found[parts] = gradients(module.model), gradients(module.discriminator)
    assert found[("generator_loss",)][0] > 0
    assert found[("generator_loss",)][1] == 0
    assert found[("discriminator_loss",)][0] == 0
    assert found[("generator_loss", "discriminator_loss")] == pytest.approx(
        (found[("generator_loss",)][0], found[("discriminator_loss",)][1]), rel=1e-4)


def test_a_perceptual_network_judges_reconstructions_and_is_not_trained(tmp_path, monkeypatch):
    from torchvision.models import ResNet50_Weights, resnet50

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(resnet50().state_dict(), tmp_path / "hub/checkpoints" / ResNet50_Weights.DEFAULT.url.split("/")[-1])
    module = learner(perceptual="resnet50")
    found = module.loss(IMAGES, 0.0)
    assert found["perceptual"] > 0
    found["loss"].backward()
    assert gradients(module.perceptual) == 0
    assert gradients(module.model) > 0


def test_weights_that_are_not_to_be_had_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"autoencoder.perceptual=nosuch"):
        learner(perceptual="nosuch")


def test_the_statistics_of_pixels_are_those_of_the_images():
    model = Pixels(32)
    set_statistics(model, IMAGES, 2)
    values = IMAGES / 127.5 - 1
    assert model.config.latents_mean[0] == pytest.approx(values.mean(), abs=1e-3)
    assert model.config.latents_std[0] == pytest.approx(values.std(), abs=1e-3)


def test_the_latents_that_a_generator_learns_from_have_a_variance_of_one():
    """An autoencoder that is hardly trained: its posteriors are far wider than their means differ."""
    model = learner().model
    set_statistics(model, IMAGES, 2)
    posterior = model.encode(torch.from_numpy(IMAGES / 127.5 - 1).float()).latent_dist
    mean, std = (torch.tensor(model.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    normal = (torch.cat([posterior.sample(torch.Generator().manual_seed(k)) for k in range(8)]) - mean) / std
    assert normal.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, rel=0.1)
