"""DeepSpeed on gloo: all ZeRO stages and worker counts train alike, and state passes between them whole."""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from unittest import mock

import pytest
import torch
from distributed import run

from cluster.storage import Folder
from pipelines.generator.settings import ConditionSettings, DenoiserSettings, ObjectiveSettings
from pipelines.generator.training import checkpoint
from pipelines.generator.training.ema import STORED, average_name, exponent
from pipelines.generator.training.settings import TrainerSettings

pytestmark = pytest.mark.ray

BATCH, LATENT, WIDTH, LABELS, RATE = 16, (4, 8, 8), 8, ["a", "b"], 1e-3


def make_denoiser():
    from pipelines.generator.denoiser.network import build_denoiser

    torch.manual_seed(0)
    settings = DenoiserSettings(channels=[16, 32], attention=[False, True], norm_groups=8, head_dim=8,
                                cross_attention_dim=16)
    return build_denoiser(settings, ConditionSettings(), LATENT, {"embedding": (WIDTH,)}, LABELS)


def make_engine(module, stage, world, **options):
    from pipelines.generator.training import deepspeed

    settings = TrainerSettings(images=1, batch=BATCH, workers=world, zero_stage=stage, zero3_persistence=0,
                               **{"precision": "fp32", **options})
    with mock.patch.object(deepspeed, "bf16_is_fast", return_value=True):  # so that every CPU tests it
        return deepspeed.DeepSpeedTrainer(module, settings, world)


def losses(engine, start, stop, rank, world, passes=1, poison=None, taken=None):
    """Global losses of the steps [start, stop) on a fixed data set, in so many forward passes each.

    Args:
        poison: "loss" makes a loss, "gradient" the gradient alone, no finite number, both on the last worker.
        taken: a list that is told of each step whether it was taken.
    """
    from pipelines.generator.denoiser.objective import Objective
    from pipelines.generator.training.interval_log import finite_everywhere

    data = torch.Generator().manual_seed(1)
    latents, embedding = torch.randn(BATCH, *LATENT, generator=data), torch.randn(BATCH, WIDTH, generator=data)
    if poison == "loss":
        latents[-1] = math.nan
    conditions = {"embedding": embedding, "labels": torch.zeros(BATCH, len(LABELS))}
    share = range(rank * BATCH // world, (rank + 1) * BATCH // world)
    objective, found = Objective(ObjectiveSettings(), ConditionSettings(), "cpu"), []
    for step in range(start, stop):
        draw, total = objective.draw_randomness((BATCH, *LATENT), 0, step * BATCH, rank, world), torch.zeros(())
        for k in range(passes):
            part = slice(k * len(share) // passes, (k + 1) * len(share) // passes)
            rows = list(share[part])
            values = objective.losses(engine.model, latents[rows], {n: v[rows] for n, v in conditions.items()},
                                      draw.rows(part))
            loss = values.sum() * world / BATCH
            if poison == "gradient" and rank == world - 1:
                loss = loss + (0 * loss).sqrt()  # 0, and its slope is not
            engine.backward(loss, last=k == passes - 1)
            total += values.detach().sum()
        done = engine.step(RATE, BATCH, (step + 1) * BATCH, finite_everywhere(total, world))
        if taken is not None:
            taken.append(bool(done))
        torch.distributed.all_reduce(total)
        found.append(total.item() / BATCH)
    return found


def write(engine, folder, rank, cursor):
    """Write a checkpoint as all workers together."""
    layout = engine.layout()
    if layout.fragments[rank]:
        checkpoint.write_vectors(folder, layout, rank, engine.snapshot())
    if rank == 0:
        checkpoint.write_state(folder, layout, cursor)
    torch.distributed.barrier()
    return layout.parts


def state_everywhere(engine, rank):
    """The engine's whole state, by part, on every rank: through a checkpoint."""
    box = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    folder = Folder(box[0])
    parts = write(engine, folder, rank, checkpoint.Cursor(0, 0, ""))
    state = {part: checkpoint.read_part(folder, part) for part in parts}
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder.path)
    return state


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[part][name], other[part][name]) for part in one for name in one[part])


def average(weights, length):
    """A power-function average by its definition, of the weights after each step: step k has the share of the profile
    from k - 1 to k."""
    steps, power = len(weights), exponent(length) + 1
    shares = [(step / steps) ** power - ((step - 1) / steps) ** power for step in range(1, steps + 1)]
    return {name: sum(share * now[name] for share, now in zip(shares, weights, strict=True)) for name in weights[0]}


def whole_life(rank, world, stage, options):
    """Losses of 6 steps unbroken, of 3 and a resume, and in several passes; averages; what a bad batch changes."""
    engine = make_engine(make_denoiser(), stage, world, **options)
    weights, unbroken = [], []
    for step in range(3):
        unbroken += losses(engine, step, step + 1, rank, world)
        weights.append(state_everywhere(engine, rank)["model"])
    state, scaler = state_everywhere(engine, rank), engine.scaler()
    box = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    write(engine, Folder(box[0]), rank, checkpoint.Cursor(3 * BATCH, 3, ""))
    gaps = [(state[average_name(length)][name] - value).abs().max().item() for length in STORED
            for name, value in average(weights, length).items()]
    unbroken += losses(engine, 3, 6, rank, world)
    norms, before, steps = engine.norms(), state_everywhere(engine, rank), engine.steps()
    taken = []
    for kind in ("loss", "gradient"):
        losses(engine, 6, 7, rank, world, poison=kind, taken=taken)
    kept = {part: tensors for part, tensors in before.items() if not part.startswith("ema")}  # averages go on
    untouched = same(kept, {part: tensors for part, tensors in state_everywhere(engine, rank).items() if part in kept})
    module = make_denoiser()
    module.load_state_dict(state["model"])
    resumed = make_engine(module, stage, world, **options)
    written = Folder(box[0])
    layout = checkpoint.read_layout(written)
    resumed.load(functools.partial(checkpoint.read_vector, written, layout), layout.parts, 3, scaler)
    return {
        "unbroken": unbroken,
        "restored": same(state, state_everywhere(resumed, rank)),
        "resumed": losses(resumed, 3, 6, rank, world),
        "in_passes": losses(make_engine(make_denoiser(), stage, world, **options, micro_batch=3), 0, 3, rank, world,
                            passes=3),
        "average_gap": max(gaps),
        "skipped": taken == [False, False] and untouched and engine.steps() == steps,
        "elements": {part: sum(t.numel() for t in tensors.values()) for part, tensors in state.items()},
        "norms": norms,
    }


TOLERANCE = {False: 1e-4, True: 2e-2}  # of losses, by whether they are in bf16


def check(found, reference, tolerance):
    assert found["unbroken"] == pytest.approx(reference["unbroken"], rel=tolerance)
    assert found["norms"] == pytest.approx(reference["norms"], rel=max(tolerance, 2e-2))
    assert found["restored"]
    assert found["resumed"] == found["unbroken"][3:]
    assert found["skipped"]
    assert found["in_passes"] == pytest.approx(found["unbroken"][:3], rel=tolerance)
    assert found["average_gap"] < 1e-6
    parameters = sum(p.numel() for p in make_denoiser().parameters())
    parts = ("model", *map(average_name, STORED), "exp_avg", "exp_avg_sq")
    assert found["elements"] == dict.fromkeys(parts, parameters)


ALONE = {"zero-1": (1, {}), "zero-2-offload": (2, {"offload": True}), "zero-3": (3, {}),
         "zero-2-offload-bf16": (2, {"offload": True, "precision": "bf16"})}
IN_PAIRS = {"zero-0": (0, {}), "zero-1": (1, {}), "zero-2": (2, {}), "zero-3": (3, {}),
            "zero-0-bf16": (0, {"precision": "bf16"}), "zero-2-bf16": (2, {"precision": "bf16"}),
            "zero-3-bf16": (3, {"precision": "bf16"})}


def whole_lives(rank, world, cases):
    return {name: whole_life(rank, world, stage, options) for name, (stage, options) in cases.items()}


@pytest.fixture(scope="module")
def alone():
    return run(1, whole_lives, ALONE)[0]


@pytest.fixture(scope="module")
def reference(alone):
    return alone["zero-1"]


@pytest.fixture(scope="module")
def in_pairs():
    return run(2, whole_lives, IN_PAIRS)[0]


@pytest.mark.parametrize("case", ALONE)
def test_every_stage_trains_alike_and_resumes_exactly(reference, alone, case):
    check(alone[case], reference, TOLERANCE["bf16" in case])


@pytest.mark.parametrize("case", IN_PAIRS)
def test_every_stage_of_two_workers_trains_alike_and_resumes_exactly(reference, in_pairs, case):
    """Under ZeRO-3 nothing is persistent, so that nothing hides on a worker."""
    check(in_pairs[case], reference, TOLERANCE["bf16" in case])


def part_of_it(rank, world, stage, folder, start, stop):
    """Losses of the steps [start, stop), from the checkpoint at `start` to one at `stop`."""
    module, earlier = make_denoiser(), Folder(str(folder / str(start)))
    if start:
        cursor = checkpoint.check_fingerprint(earlier, "a fingerprint")
        module.load_state_dict(checkpoint.read_part(earlier, checkpoint.MODEL))
    engine = make_engine(module, stage, world)
    if start:
        read = functools.partial(checkpoint.read_vector, earlier, checkpoint.read_layout(earlier))
        engine.load(read, checkpoint.read_layout(earlier).parts, cursor.steps, cursor.scaler)
    found = losses(engine, start, stop, rank, world)
    write(engine, Folder(str(folder / str(stop))), rank, checkpoint.Cursor(stop * BATCH, stop, "a fingerprint"))
    return found


def test_a_checkpoint_goes_on_at_other_world_sizes_and_stages(reference, tmp_path):
    found = []
    for world, stage, start, stop in ((2, 2, 0, 2), (1, 3, 2, 4), (2, 2, 4, 6)):
        found += run(world, part_of_it, stage, tmp_path, start, stop)[0]
    assert found == pytest.approx(reference["unbroken"], rel=1e-4)
