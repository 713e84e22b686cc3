"""Encoders of others, by the way their weights come: the Hub's cache."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipelines.generator.encoder.vit import from_timm

DINOV2, DINOV3 = "vit_small_patch14_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts weights where huggingface_hub keeps what it has downloaded; nothing else is to be had."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(repository: str, file: str, weights: dict[str, torch.Tensor]) -> None:
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        save_file(weights, folder / "snapshots" / "abc" / file)

    return put


def weights_of(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0).state_dict()


@pytest.mark.parametrize(("name", "side"), [(DINOV2, 56), (DINOV3, 64)])
def test_a_model_of_timm_has_its_weights_and_statistics(hub, name, side):
    weights = weights_of(name)
    hub(f"timm/{name}", "model.safetensors", weights)
    model = from_timm(name, 64)
    found = model.vit.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items() if "pos_embed" not in key)
    assert (model.config.image_size, model.config.mean) == (side, [0.485, 0.456, 0.406])
    embedding, patches = model.eval().embed_patches(torch.rand(2, 1, 64, 64), 2)
    assert (embedding.shape, patches.shape) == ((2, 384), (2, 4, 384))


def test_rad_dino_is_read_from_its_makers_file_in_the_names_of_dinov2(hub):
    weights = {name: value.half() for name, value in weights_of("vit_base_patch14_dinov2.lvd142m").items()}
    hub("microsoft/rad-dino", "backbone_compatible.safetensors", weights | {"mask_token": torch.zeros(1, 768)})
    model = from_timm("rad-dino", 64)
    assert torch.equal(model.vit.blocks[11].mlp.fc2.weight, weights["blocks.11.mlp.fc2.weight"].float())
    assert (model.config.mean, model.config.std) == ([0.5307] * 3, [0.2583] * 3)
    assert model.eval().embed(torch.rand(2, 1, 64, 64)).shape == (2, 768)


def test_features_are_those_of_the_published_network_on_the_gray_image_as_rgb(hub):
    from timm.data import create_transform, resolve_data_config
    from torchvision.transforms import Compose

    weights = {name: value + 0.1 * torch.randn_like(value) for name, value in weights_of(DINOV2).items()}
    hub(f"timm/{DINOV2}", "model.safetensors", weights)  # new networks hardly look at the image
    model = from_timm(DINOV2, 56).eval()
    published = timm.create_model(DINOV2, pretrained=True, num_classes=0, img_size=56).eval()
    normalise = Compose(create_transform(**resolve_data_config(model=published)).transforms[-1:])
    images = torch.rand(2, 1, 56, 56)
    with torch.no_grad():
        expected = published(normalise(images.expand(-1, 3, -1, -1)))
        assert torch.allclose(model(images), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["dino", "resnet18", "vit_small_patch14_dinov2.nosuch", DINOV2])
def test_what_is_unknown_or_no_transformer_or_not_to_be_had_is_refused(hub, name):
    with pytest.raises(ValueError, match=rf"encoder\.pretrained={name}"):
        from_timm(name, 64)
