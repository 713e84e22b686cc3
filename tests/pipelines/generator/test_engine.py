"""DeepSpeed on gloo: all ZeRO stages and worker counts train alike, and state passes between them whole."""

from __future__ import annotations

import math

import pytest
import torch
from distributed import run

from pipelines.generator import checkpoint
from pipelines.settings import Denoiser, Objective, Trainer

pytestmark = pytest.mark.ray

BATCH, LATENT, WIDTH, LABELS = 16, (4, 8, 8), 8, ["a", "b"]


def build():
    from pipelines.generator.denoiser import build as build_denoiser

    torch.manual_seed(0)
    settings = Denoiser(channels=[16, 32], attention=[False, True], norm_groups=8, head_dim=8, cross_attention_dim=16)
    return build_denoiser(settings, LATENT, WIDTH, LABELS)


def make_engine(module, stage, world, precision):
    from pipelines.generator.engine import Engine

    return Engine(module, Trainer(images=1, batch=BATCH, workers=world, zero_stage=stage, zero3_persistence=0,
                                  precision=precision, ema_halflife_images=64), world)


def losses(engine, start, stop, rank, world):
    """Global losses of the steps [start, stop) on a fixed data set."""
    from pipelines.generator.objective import Objective as Diffusion

    data = torch.Generator().manual_seed(1)
    latents, embedding = torch.randn(BATCH, *LATENT, generator=data), torch.randn(BATCH, WIDTH, generator=data)
    labels = torch.zeros(BATCH, len(LABELS))
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    objective, found = Diffusion(Objective(), "cpu"), []
    for step in range(start, stop):
        draw = objective.draw((BATCH, *LATENT), 0, step * BATCH, rank, world)
        loss = objective.loss(engine.module, latents[share], embedding[share], labels[share], draw)
        engine.step(loss, 1e-3, BATCH, (step + 1) * BATCH)
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        found.append(total.item() / world)
    return found


def state_everywhere(engine):
    """The engine's state, which only rank 0 is given, on every rank."""
    box = [engine.state()]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def train_and_resume(rank, world, stage, precision):
    """Losses of 6 steps unbroken, and of 3 and a resume from the saved state; the state after 3."""
    engine = make_engine(build(), stage, world, precision)
    unbroken = losses(engine, 0, 3, rank, world)
    state = state_everywhere(engine)
    unbroken += losses(engine, 3, 6, rank, world)
    module = build()
    module.load_state_dict(state["model"])
    resumed = make_engine(module, stage, world, precision)
    resumed.load(state, 3)
    again = state_everywhere(resumed)
    same = all(torch.equal(state[part][name], again[part][name]) for part in state for name in state[part])
    return {"unbroken": unbroken, "resumed": losses(resumed, 3, 6, rank, world), "same": same,
            "elements": {part: sum(t.numel() for t in tensors.values()) for part, tensors in state.items()},
            "ema": engine.ema_distance()}


@pytest.fixture(scope="module")
def reference():
    return run(1, train_and_resume, 2, "fp32")[0]


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 2), (2, 3)])
def test_every_stage_and_world_size_trains_alike_and_resumes_exactly(reference, world, stage):
    found = run(world, train_and_resume, stage, "fp32")[0]
    assert found["unbroken"] == pytest.approx(reference["unbroken"], rel=1e-4)
    assert found["resumed"] == found["unbroken"][3:]
    assert found["same"]
    assert found["ema"] == pytest.approx(reference["ema"], rel=1e-2)


def test_state_is_whole_under_zero_3_with_nothing_persistent():
    parameters = sum(p.numel() for p in build().parameters())
    for found in run(2, train_and_resume, 3, "bf16"):
        assert found["elements"] == dict.fromkeys(("model", "ema", "exp_avg", "exp_avg_sq"), parameters)
        assert found["resumed"] == found["unbroken"][3:]


def hand_over(rank, world, stage, folder):
    state, cursor = checkpoint.load(folder, "a fingerprint")
    module = build()
    module.load_state_dict(state["model"])
    engine = make_engine(module, stage, world, "fp32")
    engine.load(state, cursor.steps)
    return losses(engine, 3, 6, rank, world)


def first_half(rank, world, stage, folder):
    engine = make_engine(build(), stage, world, "fp32")
    losses(engine, 0, 3, rank, world)
    state = engine.state()
    if rank == 0:
        checkpoint.save(folder, state, checkpoint.Cursor(3 * BATCH, 3, "a fingerprint"))


def test_a_checkpoint_goes_on_at_another_world_size_and_stage(reference, tmp_path):
    run(2, first_half, 3, tmp_path)
    assert run(1, hand_over, 2, tmp_path)[0] == pytest.approx(reference["unbroken"][3:], rel=1e-4)
    with pytest.raises(ValueError, match="other settings"):
        checkpoint.load(tmp_path, "another fingerprint")


def ema_against_reference(rank, world):
    """The engine's EMA and one computed by its definition from the weights after each step."""
    engine = make_engine(build(), 2, world, "fp32")
    expected = state_everywhere(engine)["model"]
    for step in range(4):
        losses(engine, step, step + 1, rank, world)
        beta = 0.5 ** (BATCH / min(64, (step + 1) * BATCH * 0.05))
        weights = state_everywhere(engine)["model"]
        expected = {name: beta * expected[name] + (1 - beta) * weights[name] for name in weights}
    found = state_everywhere(engine)["ema"]
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def test_ema_is_what_its_definition_says():
    assert max(run(2, ema_against_reference)) < 1e-6


def test_the_draw_of_a_step_does_not_depend_on_the_number_of_workers():
    from pipelines.generator.objective import Objective as Diffusion

    objective = Diffusion(Objective(), "cpu")
    whole = objective.draw((8, *LATENT), 3, 640)
    parts = [objective.draw((8, *LATENT), 3, 640, rank, 4) for rank in range(4)]
    for name in vars(whole):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert not torch.equal(whole.noise, objective.draw((8, *LATENT), 3, 648).noise)


def test_a_tenth_of_the_images_is_seen_without_any_condition():
    from pipelines.generator.objective import Objective as Diffusion

    draw = Diffusion(Objective(drop_all=0.1, drop_embedding=0.05, drop_labels=0.2), "cpu").draw((20_000, 1, 1, 1), 0, 0)
    assert (draw.drop_embedding & draw.drop_labels).float().mean() == pytest.approx(0.1 + 0.9 * 0.05 * 0.2, abs=0.01)
    assert draw.drop_embedding.float().mean() == pytest.approx(0.1 + 0.9 * 0.05, abs=0.01)
    assert draw.drop_labels.float().mean() == pytest.approx(0.1 + 0.9 * 0.2, abs=0.01)


def test_min_snr_leaves_the_weight_of_v_where_sampling_starts():
    from pipelines.generator.objective import Objective as Diffusion

    weight = Diffusion(Objective(min_snr=5.0), "cpu").weight(torch.tensor([0, 900, 999]))
    assert weight[0] < 0.01
    assert weight[1:].tolist() == [1, 1]


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_a_perfect_prediction_has_no_loss(prediction):
    from pipelines.generator.objective import Objective as Diffusion

    objective = Diffusion(Objective(prediction=prediction), "cpu")
    latents = torch.randn(8, *LATENT)
    draw = objective.draw((8, *LATENT), 0, 0)

    class Oracle(torch.nn.Linear):
        def forward(self, noisy, timesteps, condition):
            return {"epsilon": draw.noise, "sample": latents,
                    "v_prediction": objective.scheduler.get_velocity(latents, draw.noise, timesteps)}[prediction]

    labels = torch.zeros(8, 0)
    assert objective.loss(Oracle(1, 1), latents, torch.zeros(8, WIDTH), labels, draw).item() < 1e-9
    assert math.isfinite(objective.weight(torch.arange(1000)).sum().item())
