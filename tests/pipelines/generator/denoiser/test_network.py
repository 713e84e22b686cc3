"""Every size of denoiser is what its name says, and takes what it is conditioned on."""

import pytest
import torch

from pipelines.generator.denoiser.network import build_denoiser, training_flops
from pipelines.generator.settings import ConditionSettings, DenoiserSettings
from pipelines.graph.compose import load_settings

SHAPES = {"embedding": (768,)}


def empty(name, latent=(4, 32, 32)):
    """The denoiser of a config group, without its weights' memory."""
    settings = load_settings("profile=demo", f"denoiser={name}")
    with torch.device("meta"):
        return build_denoiser(settings.denoiser, settings.condition, latent, SHAPES, ["a"])


@pytest.mark.parametrize(("name", "millions"), [
    ("unet-3m", 3.3), ("unet-60m", 69), ("unet-300m", 324), ("unet-860m", 862), ("unet-annotated", 4.4),
    ("dit-xs", 1.6), ("dit-s", 31), ("dit-b", 120), ("dit-l", 414), ("dit-xl", 608),
])
def test_sizes(name, millions):
    count = sum(parameter.numel() for parameter in empty(name).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.05)


def test_flops_are_those_of_the_matrix_products():
    """DiT-S/2 at 32 x 32 latents: 6.06 G multiplications and additions (Peebles & Xie 2023, table 8), two operations
    each, before its cross-attention: queries and outputs of 256 tokens, keys and values of 5, in 12 blocks."""
    tokens, width, blocks = 256, 384, 12
    crossed = blocks * 2 * (2 * tokens * width**2 + 2 * 5 * width**2 + 2 * tokens * 5 * width)
    assert training_flops(empty("dit-s"), (4, 32, 32)) == pytest.approx(3 * (2 * 6.06e9 + crossed), rel=0.02)


@pytest.mark.parametrize("name", ["unet-annotated", "dit-xs"])
def test_the_work_of_an_unconditional_network_is_counted(name):
    settings = load_settings("profile=annotated", f"denoiser={name}")
    denoiser = build_denoiser(settings.denoiser, settings.condition, (1, 28, 28), SHAPES, [])
    assert training_flops(denoiser, (1, 28, 28)) > 1e8


@pytest.mark.parametrize("architecture", ["unet", "dit"])
def test_what_is_predicted_depends_on_the_condition_and_on_its_being_dropped(architecture):
    settings = DenoiserSettings(architecture=architecture, channels=[16, 32], attention=[False, True], norm_groups=8,
                        head_dim=8, width=32, layers=2, cross_attention_dim=16)
    torch.manual_seed(0)
    denoiser = build_denoiser(settings, ConditionSettings(), (4, 8, 8), {"embedding": (8,)}, ["a"])
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # what starts at zero would hide the rest
    conditions = {"embedding": torch.randn(2, 8), "labels": torch.ones(2, 1)}
    keep, dropped = (dict.fromkeys(conditions, torch.tensor([value] * 2)) for value in (False, True))
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        plain = denoiser(noisy, timesteps, conditions, keep)
        assert plain.shape == noisy.shape
        assert not torch.allclose(plain, denoiser(noisy, timesteps, conditions, dropped))
        other = conditions | {"embedding": torch.randn(2, 8)}
        assert not torch.allclose(plain, denoiser(noisy, timesteps, other, keep))
        assert torch.equal(denoiser(noisy, timesteps, other, dropped), denoiser(noisy, timesteps, conditions, dropped))


def test_patches_that_do_not_fill_the_latent_are_refused():
    with pytest.raises(ValueError, match=r"denoiser.patch=2 .* 7"):
        build_denoiser(DenoiserSettings(architecture="dit"), ConditionSettings(), (4, 7, 7), SHAPES, [])


@pytest.mark.parametrize("architecture", ["unet", "dit"])
def test_activation_checkpointing_changes_no_gradient(architecture):
    settings = DenoiserSettings(architecture=architecture, channels=[16, 32], attention=[False, True], norm_groups=8,
                        head_dim=8, width=32, layers=2, cross_attention_dim=16)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        denoiser = build_denoiser(settings, ConditionSettings(labels=False), (4, 8, 8), {"embedding": (8,)}, [])
        if checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        conditions, dropped = {"embedding": torch.ones(2, 8)}, {"embedding": torch.tensor([False, True])}
        denoiser(torch.ones(2, 4, 8, 8), torch.tensor([3.0, 700.0]), conditions, dropped).square().mean().backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("adaptive", [True, False])
def test_adaptive_norm_brings_the_condition_to_levels_without_attention(adaptive):
    settings = DenoiserSettings(channels=[16, 32], attention=[False, True], norm_groups=8, head_dim=8,
                                cross_attention_dim=16, adaptive_norm=adaptive)
    denoiser = build_denoiser(settings, ConditionSettings(), (4, 8, 8), {"embedding": (8,)}, ["a"])
    first_level = []
    denoiser.network.down_blocks[0].resnets[0].register_forward_hook(lambda *call: first_level.append(call[-1]))
    keep = dict.fromkeys(("embedding", "labels"), torch.zeros(1, dtype=torch.bool))
    with torch.no_grad():
        for label in (0.0, 1.0):
            conditions = {"embedding": torch.zeros(1, 8), "labels": torch.full((1, 1), label)}
            denoiser(torch.ones(1, 4, 8, 8), torch.tensor([500.0]), conditions, keep)
    assert torch.equal(*first_level) != adaptive
