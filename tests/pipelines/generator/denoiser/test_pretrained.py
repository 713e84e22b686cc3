"""A denoiser that starts from a published UNet predicts what that one predicts, whatever is fitted to it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from pipelines.generator.denoiser.network import build_denoiser
from pipelines.generator.denoiser.pretrained import load_pretrained, published_config
from pipelines.generator.settings import ConditionSettings, DenoiserSettings

SHAPES = {"embedding": (8,), "patches": (4, 8)}


def publish(folder, **changes):
    """A small UNet of Stable Diffusion's kind in the `unet/` of a pipeline's folder."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**dict(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, attention_head_dim=2, norm_num_groups=8) | changes)
    unet.save_pretrained(folder / "unet")
    return unet.eval()


def start_from(folder, latent=(4, 8, 8), width=24, structures=()):
    torch.manual_seed(0)
    settings = DenoiserSettings(pretrained=str(folder), cross_attention_dim=width)
    denoiser = build_denoiser(settings, ConditionSettings(mask=bool(structures)), latent, SHAPES, ["a"], structures,
                              published_config(str(folder)))
    load_pretrained(denoiser.network, str(folder))
    return denoiser.eval()


@torch.no_grad()
def predict(network, noisy, width=24):
    tokens = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3))
    return network(noisy, timestep=torch.tensor([10.0, 700.0]), encoder_hidden_states=tokens).sample


def test_it_starts_with_the_published_architecture_and_weights(tmp_path):
    published = publish(tmp_path)
    denoiser, noisy = start_from(tmp_path), torch.randn(2, 4, 8, 8)
    assert denoiser.network.config.attention_head_dim == published.config.attention_head_dim == 2
    assert denoiser.network.config.sample_size == 8
    torch.testing.assert_close(predict(denoiser.network, noisy), predict(published, noisy))


def test_the_folder_of_the_unet_itself_is_taken(tmp_path):
    published = publish(tmp_path)
    noisy = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(predict(start_from(tmp_path / "unet").network, noisy), predict(published, noisy))


def test_a_mask_changes_nothing_at_first_and_learns(tmp_path):
    published = publish(tmp_path)
    denoiser = start_from(tmp_path, structures=["lungs", "heart"])
    noisy, masks = torch.randn(2, 4, 8, 8), torch.rand(2, 2, 8, 8)
    torch.testing.assert_close(predict(denoiser.network, torch.cat([noisy, masks], 1)), predict(published, noisy))
    conditions = {"embedding": torch.randn(2, 8), "labels": torch.ones(2, 1), "mask": masks}
    kept = dict.fromkeys(conditions, torch.tensor([False, False]))
    denoiser(noisy, torch.tensor([3.0, 700.0]), conditions, kept).square().sum().backward()
    assert (denoiser.network.conv_in.weight.grad[:, 4:] != 0).any()


def test_what_has_another_shape_is_newly_initialised_and_the_rest_is_not(tmp_path):
    published = publish(tmp_path).state_dict()
    denoiser = start_from(tmp_path, latent=(6, 8, 8), width=40)
    found = denoiser.network.state_dict()
    differing = {name for name, value in found.items() if not torch.equal(value, published[name])}
    assert differing == {"conv_in.weight", "conv_out.weight", "conv_out.bias"} | {
        name for name in found if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert torch.equal(found["conv_in.weight"][:, :4], published["conv_in.weight"])
    assert predict(denoiser.network, torch.randn(2, 6, 8, 8), 40).shape == (2, 6, 8, 8)


def test_a_mask_in_place_of_published_channels_starts_at_zero(tmp_path):
    published = publish(tmp_path)
    first = start_from(tmp_path, latent=(2, 8, 8), structures=["lungs", "heart"]).network.conv_in.weight
    assert torch.equal(first[:, :2], published.conv_in.weight[:, :2])
    assert not first[:, 2:].any()


def test_another_network_is_refused(tmp_path):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"denoiser\.pretrained=.* is a AutoencoderKL"):
        start_from(tmp_path)


@pytest.mark.parametrize(("changes", "named"), [
    ({"class_embed_type": "timestep"}, "class_embed_type"), ({"time_cond_proj_dim": 4}, "time_cond_proj_dim"),
    ({"num_class_embeds": 3}, "num_class_embeds")])
def test_one_with_other_conditions_is_refused(tmp_path, changes, named):
    publish(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"denoiser\.pretrained=.*{named}"):
        start_from(tmp_path)


def test_one_that_is_not_there_or_holds_pickles_only_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"denoiser\.pretrained="):
        start_from(tmp_path)
    publish(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"denoiser\.pretrained="):
        start_from(tmp_path)
