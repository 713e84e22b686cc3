"""Every process, target, distance and choice of noise levels learns a distribution that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cluster.errors import UserError
from pipelines.generator.denoiser.objective import Objective, process
from pipelines.generator.settings import ConditionSettings, ObjectiveSettings
from pipelines.generator.training.settings import ValidateSettings
from pipelines.graph.fields import check_choices

LATENT = (2, 1, 1)
CENTRES = torch.tensor([[-1.3, 0.4], [0.9, 1.0], [0.6, -1.3]])
SHARES, SPREAD = torch.tensor([0.5, 0.3, 0.2]), 0.15


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slowed by a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixture(n: int, generator: torch.Generator) -> torch.Tensor:
    """Points (n, 2) of three Gaussians."""
    centres = CENTRES[torch.multinomial(SHARES, n, replacement=True, generator=generator)]
    return centres + SPREAD * torch.randn(n, 2, generator=generator)


def sliced_wasserstein(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean distance between the sorted projections of two sets of as many points (Bonneel et al. 2015)."""
    angles = torch.linspace(0, torch.pi, 32)
    lines = torch.stack([angles.cos(), angles.sin()])
    return ((first @ lines).sort(0).values - (second @ lines).sort(0).values).abs().mean().item()


class Network(nn.Module):
    """A perceptron of a point and its timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.logspace(-3, 1, 24))
        self.layers = nn.Sequential(nn.Linear(2 + 48, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                                    nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, noisy, timesteps, conditions, dropped):
        angles = timesteps.float()[:, None] * self.frequencies
        inputs = torch.cat([noisy.flatten(1), angles.sin(), angles.cos()], 1)
        return self.layers(inputs).view(-1, *LATENT)


def learn(settings: ObjectiveSettings, steps: int = 2_500, batch: int = 256) -> Network:
    torch.manual_seed(0)
    network, objective = Network(), Objective(settings, ConditionSettings(), "cpu")
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        draw = objective.draw_randomness((batch, *LATENT), 0, step * batch)
        points = mixture(batch, generator).view(-1, *LATENT)
        loss = objective.losses(network, points, {}, draw).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def sample(network: Network, settings: ObjectiveSettings, n: int, steps: int = 50) -> torch.Tensor:
    """Points (n, 2), by the scheduler that an export is given."""
    scheduler = process(settings, "cpu").scheduler()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    points = torch.randn(n, *LATENT, generator=torch.Generator().manual_seed(2)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(points, timestep)
        points = scheduler.step(network(scaled, timestep.expand(n), {}, {}), timestep, points, return_dict=False)[0]
    return points.flatten(1)


CASES = {
    "v": (ObjectiveSettings(), 0.05),
    "epsilon": (ObjectiveSettings(prediction="epsilon", min_snr=None), 0.08),
    "sample": (ObjectiveSettings(prediction="sample"), 0.1),
    "v-logit-huber": (ObjectiveSettings(noise_levels="logit_normal", loss="huber"), 0.08),
    "edm": (ObjectiveSettings(process="edm"), 0.06),
    "flow": (ObjectiveSettings(process="flow"), 0.05),
    "flow-uniform-l1": (ObjectiveSettings(process="flow", noise_levels="uniform", loss="l1"), 0.1),  # not means
}


@pytest.mark.parametrize(("settings", "allowed"), CASES.values(), ids=CASES)
def test_a_known_distribution_is_recovered(settings, allowed):
    settings.check()
    truth, again = (mixture(4_000, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    found = sample(learn(settings), settings, 4_000)
    assert sliced_wasserstein(truth, found) - sliced_wasserstein(truth, again) < allowed
    assert sliced_wasserstein(truth, torch.randn(4_000, 2)) > 0.3, "the measure tells noise apart"


def exact(settings: ObjectiveSettings, noisy: torch.Tensor, timestep: torch.Tensor, spread: float) -> torch.Tensor:
    """The best prediction there is for latents of N(0, spread^2), as the network of this process would give it."""
    if settings.process == "edm":
        sigma = (4 * timestep).exp()
        preconditioned = (sigma**2 + 1).sqrt()
        signal, noise, noisy = torch.ones(()), sigma, noisy * preconditioned
    elif settings.process == "flow":
        noise = timestep / settings.timesteps
        signal = 1 - noise
    else:
        cumulative = process(settings, "cpu").training.alphas_cumprod[timestep.long()]
        signal, noise = cumulative.sqrt(), (1 - cumulative).sqrt()
    clean = noisy * signal * spread**2 / ((signal * spread) ** 2 + noise**2)
    if settings.process == "edm":
        return (clean - noisy / preconditioned**2) * preconditioned / sigma
    epsilon = (noisy - signal * clean) / noise
    kind = "flow" if settings.process == "flow" else settings.prediction
    return {"flow": epsilon - clean, "epsilon": epsilon, "sample": clean,
            "v_prediction": signal * epsilon - noise * clean}[kind]


@pytest.mark.parametrize("settings", [
    *(ObjectiveSettings(prediction=prediction, schedule=schedule, min_snr=None)
      for prediction in ("v_prediction", "epsilon", "sample")
      for schedule in ("scaled_linear", "linear", "squaredcos_cap_v2")),
    ObjectiveSettings(process="edm"), ObjectiveSettings(process="flow"),
], ids=lambda settings: f"{settings.process}-{settings.prediction}-{settings.schedule}")
@pytest.mark.parametrize("spread", [1.0, 0.3, 0.2, 0.1])
def test_sampling_keeps_fine_detail(settings, spread):
    """With an exact denoiser and the default number of steps, samples spread as much as the data."""
    scheduler, n = process(settings, "cpu").scheduler(), 4_000
    scheduler.set_timesteps(ValidateSettings().steps)
    scheduler.set_begin_index(0)
    points = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(2)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        predicted = exact(settings, scheduler.scale_model_input(points, timestep), timestep, spread)
        points = scheduler.step(predicted, timestep, points, return_dict=False)[0]
    assert points.std().item() / spread == pytest.approx(1, abs=0.08)


def test_the_draw_of_a_step_does_not_depend_on_the_number_of_workers():
    objective = Objective(ObjectiveSettings(), ConditionSettings(), "cpu")
    whole = objective.draw_randomness((8, 4, 8, 8), 3, 640, findings=5)
    parts = [objective.draw_randomness((8, 4, 8, 8), 3, 640, rank, 4, findings=5) for rank in range(4)]
    for name in ("posterior", "noise", "level", "hidden"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    for name in whole.dropped:
        assert torch.equal(whole.dropped[name], torch.cat([part.dropped[name] for part in parts]))
    assert not torch.equal(whole.noise, objective.draw_randomness((8, 4, 8, 8), 3, 648).noise)


def test_a_tenth_of_the_images_is_seen_without_any_condition():
    condition = ConditionSettings(drop_all=0.1, drop_embedding=0.05, drop_labels=0.2)
    dropped = Objective(ObjectiveSettings(), condition, "cpu").draw_randomness((20_000, 1, 1, 1), 0, 0).dropped
    both = (dropped["embedding"] & dropped["labels"]).float().mean()
    assert both == pytest.approx(0.1 + 0.9 * 0.05 * 0.2, abs=0.01)
    assert dropped["embedding"].float().mean() == pytest.approx(0.1 + 0.9 * 0.05, abs=0.01)
    assert dropped["labels"].float().mean() == pytest.approx(0.1 + 0.9 * 0.2, abs=0.01)


def test_of_some_images_any_number_of_findings_is_hidden():
    condition = ConditionSettings(hide_findings=0.5)
    objective = Objective(ObjectiveSettings(), condition, "cpu")
    hidden = objective.draw_randomness((20_000, 1, 1, 1), 0, 0, findings=4).hidden
    counts = torch.bincount(hidden.sum(1), minlength=5) / len(hidden)
    assert counts.tolist() == pytest.approx([0.5 + 0.1, 0.1, 0.1, 0.1, 0.1], abs=0.01)
    never = Objective(ObjectiveSettings(), ConditionSettings(hide_findings=0), "cpu")
    assert never.draw_randomness((4, 1, 1, 1), 0, 0, findings=4).hidden is None


def test_a_hidden_finding_is_unknown_to_the_network():
    seen = {}

    class Network(torch.nn.Linear):
        def forward(self, noisy, timesteps, conditions, dropped):
            seen.update(conditions)
            return noisy

    objective = Objective(ObjectiveSettings(), ConditionSettings(), "cpu")
    hidden = torch.tensor([[True, False], [False, False]])
    draw = replace(objective.draw_randomness((2, 1, 4, 4), 0, 0), hidden=hidden)
    objective.losses(Network(1, 1), torch.randn(2, 1, 4, 4), {"labels": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, draw)
    assert seen["labels"].tolist() == [[-1, 0], [1, 1]]


def test_min_snr_leaves_the_weight_of_v_where_sampling_starts():
    weight = process(ObjectiveSettings(min_snr=5.0), "cpu").weight(torch.tensor([0, 900, 999]))
    assert weight[0] < 0.01
    assert weight[1:].tolist() == [1, 1]


@pytest.mark.parametrize("settings", [settings for settings, _ in CASES.values()], ids=CASES)
def test_a_perfect_prediction_has_no_loss(settings):
    objective, latents = Objective(settings, ConditionSettings(), "cpu"), torch.randn(8, 4, 8, 8)
    draw = objective.draw_randomness((8, 4, 8, 8), 0, 0)
    batch = objective.process.noise_latents(latents, draw.noise, draw.level)

    class Oracle(nn.Linear):
        def forward(self, noisy, timesteps, conditions, dropped):
            return batch.target

    losses = objective.losses(Oracle(1, 1), latents, {}, draw)
    assert losses.shape == (8,)
    assert losses.abs().max() < 1e-9
    assert torch.isfinite(batch.weight).all()


def test_edm_gives_and_asks_for_unit_variance_at_every_level():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(64, 4, 16, 16, generator=generator) for _ in range(2))
    levels = torch.linspace(0.001, 0.999, 64)
    noisy_batch = process(ObjectiveSettings(process="edm"), "cpu").noise_latents(latents, noise, levels)
    for values in (noisy_batch.noisy, noisy_batch.target):
        assert values.var((1, 2, 3)).sub(1).abs().max() < 0.2


@pytest.mark.parametrize(("settings", "key"), [
    (ObjectiveSettings(process="ddim"), "objective.process"), (ObjectiveSettings(loss="l3"), "objective.loss"),
    (ObjectiveSettings(process="edm", noise_levels="uniform"), "objective.noise_levels"),
    (ObjectiveSettings(sigma_max=1e-4), "objective.sigma_max"),
])
def test_what_does_not_go_together_is_named(settings, key):
    def check() -> None:
        check_choices("objective", settings)
        settings.check()

    with pytest.raises(UserError, match=key):
        check()
