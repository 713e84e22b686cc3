"""The exported folder samples without the project, and `verify` sees damage."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, schedulers
from PIL import Image
from safetensors.torch import load_file, save_file

from cluster.storage import Folder
from pipelines.generator.denoiser.network import build_denoiser
from pipelines.generator.denoiser.objective import process
from pipelines.generator.export import assemble, export_generator, half_folder, load_pipeline, save_pipeline, verify
from pipelines.generator.settings import ConditionSettings, DenoiserSettings, ObjectiveSettings
from pipelines.generator.standalone.conditioner import Conditioner
from pipelines.generator.standalone.image_encoder import Encoder
from pipelines.generator.standalone.pipeline import Guidance
from pipelines.generator.standalone.pixel_vae import Pixels

LABELS = ["Effusion", "Mass"]
ALONE = """
import json, sys
sys.modules["pipelines"] = None  # importing it fails even where the project is installed
import numpy as np, torch
from diffusers import DiffusionPipeline
from PIL import Image

folder, out = sys.argv[1:]
DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
seed = lambda n: torch.Generator().manual_seed(n)
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
runs = {
    "nothing": {},
    "image": {"image": image},
    "images": {"image": [image, image], "labels": LABELS[:1], "generator": [seed(1), seed(2)]},
    "embedding": {"embedding": pipe.embed(image)},
    "labels": {"labels": [{"Mass": 1, "Effusion": 0}, []]},
}
report = {"defaults": [pipe.config.num_inference_steps, pipe.config.guidance_scale]}
for name, arguments in runs.items():
    images = pipe(num_inference_steps=2, **{"generator": seed(0), **arguments}).images
    report[name] = [[i.mode, list(i.size)] for i in images]
    images[0].save(f"{out}/{name}.png")
report["default"] = len(pipe().images)
report["outside"] = [m for m in sys.modules if m.split(".")[0] in ("cluster", "pipelines", "ray") and sys.modules[m]]
print(json.dumps(report))
""".replace("LABELS", repr(LABELS))


@pytest.fixture(scope="module")
def modules() -> dict:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    latents = {"scaling_factor": 0.8, "latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.0, 2.0, 3.0, 4.0)}
    sizes = {"sample_size": 32, "block_out_channels": (16, 32, 32), "norm_num_groups": 8}
    vae = AutoencoderKL(in_channels=1, out_channels=1, **blocks, **latents, **sizes)
    encoder = Encoder(image_size=32, options={"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2})
    return {"vae": vae.eval(), "encoder": encoder.eval()}


UNET = DenoiserSettings(channels=[16, 32], attention=[True, False], norm_groups=8, head_dim=8, cross_attention_dim=24)
DIT = DenoiserSettings(architecture="dit", width=32, layers=2, head_dim=8, cross_attention_dim=24)
SHAPES = {"embedding": (16,), "patches": (4, 16), "mask": (3, 8, 8)}
STRUCTURES = ["heart", "lungs", "polyp"]


def generator(modules: dict, network: DenoiserSettings = UNET, condition: ConditionSettings | None = None):
    torch.manual_seed(0)
    denoiser = build_denoiser(network, condition or ConditionSettings(), (4, 8, 8), SHAPES, LABELS, STRUCTURES).eval()
    for parameter in denoiser.parameters():  # what starts at zero would hide what it is multiplied with
        torch.nn.init.normal_(parameter, std=0.1)
    return assemble(**modules, denoiser=denoiser, num_inference_steps=3, guidance_scale=1.5,
                    scheduler=schedulers.DPMSolverMultistepScheduler(prediction_type="v_prediction"))


@pytest.fixture
def folder(modules: dict, tmp_path: Path) -> Path:
    save_pipeline(tmp_path / "e", generator(modules))
    return tmp_path / "e"


def load(folder: Path):
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_folder_samples_without_the_project(folder: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    caches = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "hf" / "modules")}
    environment = {**os.environ, **caches, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, folder, out], cwd=out, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [report.pop(key) for key in ("defaults", "outside", "default")] == [[3, 1.5], [], 1]
    counts = {"nothing": 1, "image": 1, "images": 2, "embedding": 1, "labels": 2}
    assert {name: len(images) for name, images in report.items()} == counts
    assert all(image == ["L", [32, 32]] for images in report.values() for image in images)
    for text in ("not expected", "Expected types", "not initialized", "were not used"):
        assert text not in done.stderr
    nothing, image, embedding = (np.array(Image.open(out / f"{n}.png")) for n in ("nothing", "image", "embedding"))
    assert np.array_equal(image, embedding)
    assert not np.array_equal(nothing, image)
    ours = load(folder)(num_inference_steps=2, generator=seeds(0)[0]).images[0]
    assert np.abs(np.array(ours).astype(int) - nothing).max() <= 1


def test_only_safetensors_and_code_are_written(folder: Path) -> None:
    suffixes = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".py", ".safetensors"}
    index = json.loads((folder / "model_index.json").read_text())
    custom = [index[name] for name in ("_class_name", "conditioner", "encoder")]
    assert custom == [["pipeline", "RayographPipeline"], ["conditioner", "Conditioner"], ["image_encoder", "Encoder"]]


def test_a_seed_makes_the_image_wherever_it_stands_in_the_batch(folder: Path) -> None:
    pipeline = load(folder)
    embedding = torch.randn(2, 16, generator=seeds(7)[0])
    first = pipeline(embedding=embedding, generator=seeds(1, 2), output_type="pt").images
    again = pipeline(embedding=embedding, generator=seeds(1, 2), output_type="pt").images
    swapped = pipeline(embedding=embedding.flip(0), generator=seeds(2, 1), output_type="pt").images
    assert torch.equal(first, again)
    assert torch.allclose(first, swapped.flip(0), atol=1e-5)
    assert not torch.allclose(first[0], first[1], atol=1e-3)


def test_decode_inverts_the_latent_scaling(folder: Path) -> None:
    pipeline = load(folder)
    raw = torch.randn(2, 4, 8, 8, generator=seeds(0)[0])
    mean, std = (torch.tensor(pipeline.vae.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = (pipeline.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(pipeline.decode((raw - mean) / std * 0.8), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "FlowMatchEulerDiscrete"])
def test_other_schedulers_sample(folder: Path, kind: str) -> None:
    pipeline = load(folder)
    pipeline.scheduler = getattr(schedulers, f"{kind}Scheduler")()
    images = pipeline(labels=["Mass"], batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 1)
    assert np.isfinite(images).all()


def test_images_of_any_kind_embed_alike(folder: Path) -> None:
    pipeline = load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    tensor = torch.from_numpy(pixels)
    expected = pipeline.embed(Image.fromarray(pixels))
    assert expected.square().mean().item() == pytest.approx(1, abs=1e-3)
    wide = Image.fromarray(pixels.astype(np.uint16) * 257)
    for image in (tensor, tensor[None] / 255, tensor.repeat(1, 3, 1, 1), [wide]):
        assert torch.allclose(pipeline.embed(image), expected, atol=1e-4)


def test_bad_arguments_are_named(folder: Path) -> None:
    pipeline = load(folder)
    with pytest.raises(ValueError, match=r"Hernia.*Effusion.*Mass"):
        pipeline(labels=["Hernia"])
    with pytest.raises(ValueError, match="embedding must be"):
        pipeline(embedding=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="of 3 images"):
        pipeline(embedding=torch.zeros(3, 16), generator=seeds(0, 1))
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        pipeline(image=torch.full((8, 8), 200.0))
    with pytest.raises(ValueError, match="guidance_start <= guidance_end"):
        pipeline(guidance_start=0.8, guidance_end=0.2)
    with pytest.raises(ValueError, match="prompt_embeds"):
        pipeline(callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_verify_accepts_the_export_and_names_damage(folder: Path, modules: dict) -> None:
    made_of = generator(modules)
    verify(folder, made_of)
    for component, value, message in (("vae", float("nan"), "vae.*not finite"), ("unet", 5.0, "unet.*conv_in.bias")):
        file = folder / component / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        key = next(k for k in weights if k.endswith("conv_in.bias"))
        save_file({**weights, key: torch.full_like(weights[key], value)}, file)
        with pytest.raises(RuntimeError, match=message):
            verify(folder, made_of)
        save_file({k: v for k, v in weights.items() if k != key}, file)
        with pytest.raises(RuntimeError, match=f"{component}.*conv_in.bias"):
            verify(folder, made_of)
        save_file(weights, file)


@pytest.mark.parametrize("labels", [[], LABELS])
def test_conditioner_nulls_and_gradients(labels: list[str]) -> None:
    conditioner = Conditioner(24, 16, patch_tokens=9, labels=labels,
                              structures={"lungs": [4, 1, 2], "heart": [3]}).to(torch.bfloat16)
    conditions = {"embedding": torch.randn(2, 16), "patches": torch.randn(2, 9, 16),
                  "labels": torch.ones(2, len(labels)), "mask": torch.rand(2, 2, 4, 4)}
    dropped = dict.fromkeys(conditions, torch.tensor([True, True]))
    keep = {name: ~value for name, value in dropped.items()}
    tokens, noisy = conditioner(conditions, dropped), torch.randn(2, 3, 4, 4)
    assert tokens.shape == (2, 4 + 9 + bool(labels), 24)
    assert torch.equal(tokens[0], tokens[1])
    channels = conditioner.concat_mask(noisy, conditions, dropped)
    assert torch.equal(channels[:, :3], noisy)
    assert torch.equal(channels[:, 3:], conditioner.null_mask.expand(2, 2, 4, 4).float())
    (tokens.sum() + channels.sum()).backward()
    assert all(parameter.grad is not None for parameter in conditioner.parameters())
    assert not torch.equal(conditioner(conditions, keep), tokens)
    assert torch.equal(conditioner.concat_mask(noisy, conditions, keep)[:, 3:], conditions["mask"].bfloat16().float())
    conditions["mask"][1] = -1  # an image without a mask
    assert torch.equal(conditioner.concat_mask(noisy, conditions, keep)[1], channels[1])
    conditions["mask"][0, 1] = -1  # and one of which one structure is not known
    known = conditions["mask"][0, 0].bfloat16().float()
    assert torch.equal(conditioner.concat_mask(noisy, conditions, keep)[0, 3], known)
    assert torch.equal(conditioner.concat_mask(noisy, conditions, keep)[0, 4], channels[0, 4])


def test_unknown_labels_are_no_absent_ones() -> None:
    """Present, absent and unknown are three tokens; where nothing is known it is the null of a dropped condition."""
    torch.manual_seed(0)
    conditioner = Conditioner(24, 16, embedding_tokens=0, labels=LABELS)
    states = torch.tensor([[1.0, 0.0], [1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]])
    dropped = torch.zeros(5, dtype=torch.bool)
    tokens = conditioner({"labels": states}, {"labels": dropped})[:, 0]
    null = conditioner({"labels": states}, {"labels": ~dropped})[0, 0]
    assert torch.equal(tokens[4], null)
    assert torch.cdist(tokens, tokens)[~torch.eye(5, dtype=torch.bool)].min() > 0.1


def test_labels_are_named_present_or_told_apart(folder: Path) -> None:
    pipeline = load(folder)
    for labels, states in ((["Mass"], [[-1, 1]]), ("Mass", [[-1, 1]]), ([], [[-1, -1]]),
                           ({"Mass": 0, "Effusion": 1}, [[1, 0]]), ([["Mass"], {"Mass": 0}], [[-1, 1], [-1, 0]])):
        assert pipeline.encode_labels(labels).tolist() == states
    plain, unknown = (pipeline(generator=seeds(0)[0], output_type="pt", **conditions).images
                      for conditions in ({}, {"labels": []}))
    assert torch.allclose(plain, unknown, atol=1e-5)
    present, absent = (pipeline(labels={"Mass": state}, generator=seeds(0)[0], output_type="pt").images
                       for state in (1, 0))
    assert not torch.allclose(present, absent, atol=1e-5)
    with pytest.raises(ValueError, match="present"):
        pipeline(labels={"Mass": 2})


def test_without_any_condition_there_is_a_constant_token() -> None:
    conditioner = Conditioner(24, 16, embedding_tokens=0)
    assert conditioner.shapes == {}
    assert conditioner({}, {"embedding": torch.tensor([True, False])}).shape == (2, 1, 24)


@pytest.mark.parametrize("network", [UNET, DIT], ids=["unet", "dit"])
@pytest.mark.parametrize("condition", [
    ConditionSettings(), ConditionSettings(embedding_tokens=0, labels=False),
    ConditionSettings(embedding_tokens=1, patches=True, labels=False, mask=True),
], ids=["usual", "none", "patches-mask"])
def test_every_kind_of_generator_is_exported_and_samples(modules, tmp_path, network, condition) -> None:
    made_of = generator(modules, network, condition)
    save_pipeline(tmp_path / "e", made_of)
    verify(tmp_path / "e", made_of)
    pipeline = load(tmp_path / "e")
    known = pipeline.conditioner.shapes
    plain = pipeline(generator=seeds(0)[0], output_type="pt").images
    assert plain.shape == (1, 1, 32, 32)
    if "embedding" in known:
        around = pipeline(image=torch.rand(32, 32), generator=seeds(0)[0], output_type="pt").images
        assert not torch.equal(around, plain)
    else:
        with pytest.raises(ValueError, match="not conditioned on"):
            pipeline(image=torch.rand(32, 32))
    if "mask" in known:
        mask = torch.zeros(32, 32, dtype=torch.uint8)
        mask[8:16, 8:16] = 1  # the left lung is part of the lungs
        masked = pipeline(mask=mask, generator=seeds(0)[0], output_type="pt").images
        assert not torch.equal(masked, plain)
        assert pipeline.encode_mask(mask)[0, :, 2, 2].tolist() == [0, 1, 0]
        with pytest.raises(ValueError, match=r"values of these structures.*heart"):
            pipeline.encode_mask(mask * 255)


def test_pixels_stand_in_for_an_autoencoder(modules, tmp_path) -> None:
    denoiser = build_denoiser(DIT, ConditionSettings(), (1, 32, 32), SHAPES, LABELS)
    made_of = assemble(vae=Pixels(32, [0.1], [0.5]), encoder=modules["encoder"], denoiser=denoiser,
                       scheduler=schedulers.DPMSolverMultistepScheduler(), num_inference_steps=2, guidance_scale=1.0)
    save_pipeline(tmp_path / "e", made_of)
    verify(tmp_path / "e", made_of)
    pipeline, images = load(tmp_path / "e"), torch.rand(2, 1, 32, 32)
    latents = (pipeline.vae.encode(images * 2 - 1).latent_dist.sample() - 0.1) / 0.5
    assert torch.allclose(pipeline.decode(latents), images, atol=1e-6)
    assert pipeline(output_type="pt").images.shape == (1, 1, 32, 32)


def test_encoder_takes_crops_of_another_size() -> None:
    encoder = Encoder(image_size=32, channels=3, options={"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2})
    crops = torch.rand(2, 1, 16, 16)
    assert encoder(crops).shape == encoder(crops, resize=False).shape == (2, encoder.embedding_dim)
    assert not torch.allclose(encoder(crops), encoder(crops, resize=False))


@pytest.mark.parametrize("objective", [
    ObjectiveSettings(), ObjectiveSettings(prediction="epsilon"), ObjectiveSettings(prediction="sample"),
    ObjectiveSettings(process="edm"), ObjectiveSettings(process="flow"),
], ids=["v", "epsilon", "sample", "edm", "flow"])
def test_the_export_samples_what_its_maker_samples(modules, tmp_path, objective) -> None:
    made_of = generator(modules)
    made_of.scheduler = process(objective, "cpu").scheduler()
    made_of.set_progress_bar_config(disable=True)
    save_pipeline(tmp_path / "e", made_of)
    conditions = {"embedding": torch.randn(2, 16, generator=seeds(1)[0]), "labels": LABELS[:1]}
    inside, outside = (pipeline(**conditions, generator=seeds(3, 4), num_inference_steps=5, output_type="latent").images
                       for pipeline in (made_of, load(tmp_path / "e")))
    assert torch.equal(inside, outside)
    assert inside.isfinite().all()


def test_guidance_holds_over_an_interval_of_the_steps(folder: Path) -> None:
    pipeline = load(folder)
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda unet, arguments: rows.append(len(arguments[0])))

    def run(**arguments) -> torch.Tensor:
        rows.clear()
        return pipeline(embedding=torch.ones(1, 16), generator=seeds(0)[0], num_inference_steps=4, output_type="latent",
                        **{"guidance_scale": 3.0, **arguments}).images

    everywhere, nowhere = run(), run(guidance_scale=1.0)
    assert rows == [1, 1, 1, 1]
    middle = run(guidance_start=0.25, guidance_end=0.75)
    assert rows == [1, 2, 2, 1]
    assert torch.allclose(run(guidance_end=0.0), nowhere, atol=1e-5)
    assert torch.equal(run(guidance_start=0.0, guidance_end=1.0), everywhere)
    assert not torch.allclose(middle, everywhere, atol=1e-3)
    assert not torch.allclose(middle, nowhere, atol=1e-3)


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction(folder: Path) -> None:
    plain, conditional = torch.randn(2, 3, 4, 8, 8, generator=seeds(0)[0]) + 0.1
    guided = Guidance(5.0, 0.0, 0.0, 1.0).combine(plain, conditional)
    assert torch.allclose(guided, plain + 5 * (conditional - plain), atol=1e-5)
    rescaled = Guidance(5.0, 1.0, 0.0, 1.0).combine(plain, conditional)
    assert torch.allclose(rescaled.std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-4)
    halfway = Guidance(5.0, 0.5, 0.0, 1.0).combine(plain, conditional)
    assert torch.allclose(halfway, (guided + rescaled) / 2, atol=1e-5)
    pipeline = load(folder)
    run = {"embedding": torch.ones(1, 16), "output_type": "latent", "guidance_scale": 5.0}
    images = [pipeline(**run, generator=seeds(0)[0], guidance_rescale=rescale).images for rescale in (0.0, 0.7)]
    assert images[1].std() < images[0].std()


def test_a_callback_sees_every_step_and_may_change_its_latents(folder: Path) -> None:
    pipeline, seen = load(folder), []

    def watch(made_by, step, timestep, tensors):
        assert made_by is pipeline
        seen.append((step, int(timestep), tensors["latents"].shape))
        return {}

    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    plain = pipeline(**arguments, generator=seeds(0)[0]).images
    watched = pipeline(**arguments, generator=seeds(0)[0], callback_on_step_end=watch).images
    assert torch.equal(watched, plain)
    assert [(step, shape) for step, _, shape in seen] == [(k, (1, 4, 8, 8)) for k in range(3)]
    assert [timestep for _, timestep, _ in seen] == pipeline.scheduler.timesteps.tolist()
    zeros = pipeline(**arguments, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 8, 8)}).images
    assert not zeros.any()


@pytest.mark.parametrize("condition", [
    ConditionSettings(), ConditionSettings(embedding_tokens=1, patches=True, labels=False, mask=True),
], ids=["usual", "patches-mask"])
def test_each_model_computes_only_while_it_is_on_the_accelerator(modules, condition) -> None:
    """As under `enable_model_cpu_offload`: a model is there from its own call until the next model's."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipeline, there, used = generator(copy.deepcopy(modules), condition=condition), [None], set()

    class Move(ModelHook):
        def __init__(self, name):
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            there[0] = self.name
            return args, kwargs

    def check(name):
        def hook(module, arguments):
            assert there[0] == name, f"{name} computes while {there[0]} is on the accelerator"
            used.add(name)
        return hook

    models = {name: model for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
    for name, model in models.items():
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(check(name))
        add_hook_to_module(model, Move(name))
    arguments = {"mask": torch.ones(32, 32, dtype=torch.uint8)} if condition.mask else {}
    pipeline(image=torch.rand(32, 32), **arguments)
    assert used == models.keys()
    pipeline.embed(torch.rand(32, 32))
    if condition.patches:
        pipeline(embedding=torch.ones(1, 16))
        pipeline.embed_patches(torch.rand(32, 32))


def test_float16_weights_load_as_a_variant(modules, tmp_path) -> None:
    from diffusers import DiffusionPipeline

    made_of, exported = generator(modules), Folder(f"{tmp_path}/generator")
    export_generator(made_of, exported)
    exported.download(tmp_path / "published")
    half_folder(exported).download(tmp_path / "published")
    for file in (tmp_path / "published").rglob("*.safetensors"):
        if "fp16" not in file.name:
            file.unlink()
    arguments = {"custom_pipeline": str(tmp_path / "published"), "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "published", torch_dtype=torch.float16, variant="fp16",
                                                 **arguments)
    for name in ("unet", "vae", "conditioner", "encoder"):
        for key, value in getattr(made_of, name).state_dict().items():
            assert torch.equal(getattr(pipeline, name).state_dict()[key], value.half()), key
    images = pipeline(generator=seeds(0)[0], output_type="pt").images
    assert images.isfinite().all()
    assert torch.allclose(images, made_of(generator=seeds(0)[0], output_type="pt").images, atol=0.05)


def test_weights_beyond_float16_are_not_published_in_it(modules, tmp_path, capsys) -> None:
    made_of, exported = generator(modules), Folder(f"{tmp_path}/generator")
    with torch.no_grad():
        made_of.unet.conv_in.bias[0] = 1e5
    export_generator(made_of, exported)
    assert exported.exists("model_index.json")
    assert half_folder(exported).names() == []
    assert "unet.conv_in.bias" in capsys.readouterr().err
