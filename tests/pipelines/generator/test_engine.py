"""DeepSpeed on gloo: all ZeRO stages and worker counts train alike, and state passes between them whole."""

from __future__ import annotations

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
        loss = objective.losses(engine.module, latents[share], embedding[share], labels[share], draw).mean()
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
