"""Where training runs, and the room in the cluster that it waits for."""

from __future__ import annotations

import pytest

from cluster.errors import UserError
from cluster.session import Resources
from pipelines.generator.latents.spec import LatentSpec
from pipelines.generator.training import placement
from pipelines.generator.training.settings import TrainerSettings
from pipelines.graph.plan import Plan


@pytest.fixture
def cluster(monkeypatch):
    """A cluster that has `counts[k]` when it is asked for the k-th time; returns what was requested of it."""
    requested: list[list[dict[str, float]]] = []

    def make(*counts: Resources) -> list[list[dict[str, float]]]:
        remaining = list(counts)
        monkeypatch.setattr(placement, "count_resources",
                            lambda accelerator_type: remaining.pop(0) if len(remaining) > 1 else remaining[0])
        monkeypatch.setattr(placement, "POLL_SECONDS", 0.01)
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: requested.append(bundles))
        return requested

    return make


def choose(resources: Resources, **settings) -> Resources:
    return placement.training_resources(TrainerSettings(images=100, **settings), resources)


CPUS, ONE, TWO = Resources(4, 0, 4), Resources(8, 1, 4), Resources(16, 2, 4)


@pytest.mark.parametrize(("there", "accelerator", "gpus", "said"), [
    (CPUS, "auto", 0, "on CPUs, as the cluster has no GPU"), (ONE, "auto", 1, "on GPUs"), (ONE, "gpu", 1, ""),
    (ONE, "cpu", 0, ""),
])
def test_auto_says_what_it_chose(cluster, capsys, there, accelerator, gpus, said):
    cluster(there)
    assert choose(there, accelerator=accelerator).gpus == gpus
    assert said in capsys.readouterr().err


def test_a_gpu_that_is_not_wanted_is_hidden_from_every_process(cluster):
    cluster(ONE)
    chosen = choose(ONE, accelerator="cpu")
    assert chosen.accelerator == {"num_cpus": 1, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
    cluster(CPUS)
    assert choose(CPUS).accelerator == {"num_cpus": 1}


def test_training_waits_for_gpus_that_are_asked_of_the_autoscaler(cluster):
    requested = cluster(CPUS, CPUS, ONE, TWO)
    assert choose(CPUS, accelerator="gpu", workers=2, batch=8).gpus == 2
    assert requested == [[{"GPU": 1}, {"GPU": 1}], []]


def test_elastic_training_starts_with_its_least_number_of_workers(cluster):
    requested = cluster(CPUS, ONE, TWO)
    assert choose(CPUS, accelerator="gpu", accelerator_type="H100", workers=2, min_workers=1, batch=8).gpus == 1
    assert requested == [[{"GPU": 1, "accelerator_type:H100": 0.001}] * 2, []]


def test_it_waits_no_longer_than_allowed(cluster):
    requested = cluster(CPUS)
    with pytest.raises(UserError, match=r"has 0 GPUs of type H100 after 0\.05 s .*needs 1"):
        choose(CPUS, accelerator="gpu", accelerator_type="H100", wait_seconds=0.05)
    assert requested[-1] == []


def test_a_machine_alone_is_not_waited_for(cluster):
    requested = cluster(CPUS)
    with pytest.raises(UserError, match=r"trainer\.workers=9: the cluster has 4 CPUs, training needs 9"):
        choose(Resources(4, 0, 4, fixed=True), workers=9)
    assert not requested


def test_images_are_encoded_on_the_same_type_of_gpu(tiny):
    stage = Plan(tiny("trainer.reader=stream", "trainer.accelerator_type=H100", "trainer.shuffle_shards=1")).stage(
        "train", Resources(16, 2, 16, accelerator_type="H100"))
    plan = placement.stream_plan(stage, LatentSpec((4, 8, 8), {}, [], (), False, {}, (32,)))
    assert plan is not None
    assert plan.actors == plan.ray_options["num_gpus"] == 1
    assert plan.ray_options["accelerator_type"] == "H100"


@pytest.mark.parametrize(("overrides", "gpus", "validates", "encoders"), [
    ((), 57, True, None), ((), 56, False, None), (("validate.accelerator=gpu",), 56, True, None),
    (("trainer.reader=stream",), 64, True, 7), (("trainer.reader=stream",), 57, False, 1),
    (("trainer.reader=stream", "trainer.encoder_actors=8"), 64, False, 8), (("validate.images=0",), 64, False, None),
])
def test_the_gpus_beside_the_workers_encode_and_validate(tiny, overrides, gpus, validates, encoders):
    settings = tiny("validate.images=8", "trainer.workers=56", "trainer.batch=64", *overrides)
    stage = Plan(settings).stage("train", Resources(512, gpus, 16))
    assert placement.validates_on_gpu(stage) == validates
    assert encoders is None or placement.encoder_actors(stage) == encoders
