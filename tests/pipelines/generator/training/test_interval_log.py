"""What is logged of an interval is what happened in it."""

import json

import pytest
import torch

from cluster.storage import Folder
from pipelines.generator.training import interval_log as log
from pipelines.generator.training.interval_log import IntervalLogger, finite_everywhere
from pipelines.monitor.journal import Journal, read_journal

NORMS = {"grad_norm": 1.0, "weight_norm": 2.0, "ema_distance": 0.1}


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path))


def test_losses_are_told_by_noise_level_and_bad_ones_left_out(folder):
    found = IntervalLogger(Journal(folder), 1, flops=10**9, total=1_000, device="cpu")
    found.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.1, 0.2, 0.9]), 3)
    found.add(torch.tensor([float("nan"), 7.0]), torch.tensor([0.3, 0.99]), 2)
    found.write(5, waited=0.0, norms=NORMS, lr=0.5)
    [entry] = read_journal(folder)
    assert entry["images"] == 5
    assert entry["loss"] == pytest.approx(4.0)
    assert entry["loss_noise_1"] == pytest.approx(2.0)
    assert entry["loss_noise_4"] == pytest.approx(6.0)
    assert "loss_noise_2" not in entry
    assert entry["lr"] == 0.5
    rate = entry["tflops"] * 1e12 / 10**9
    assert entry["seconds_left"] == pytest.approx(995 / rate, rel=1e-3)


def test_an_interval_starts_anew(folder):
    found = IntervalLogger(Journal(folder), 1, 1, 100, "cpu")
    found.add(torch.tensor([1.0]), torch.tensor([0.5]), 1)
    found.write(1, waited=0.0, norms=NORMS)
    found.checkpoint_stall_seconds = 0.25
    found.add(torch.tensor([3.0]), torch.tensor([0.5]), 1)
    found.write(2, waited=0.0, norms=NORMS | {"ema_distance": 0.2})
    first, second = read_journal(folder)
    assert (first["loss"], second["loss"]) == (1.0, 3.0)
    assert (first["checkpoint_stall_seconds"], second["checkpoint_stall_seconds"]) == (0.0, 0.25)


def test_an_average_that_does_not_move_is_told(folder):
    found = IntervalLogger(Journal(folder), 1, 1, 100, "cpu")
    for seen, distance in enumerate((0.0, 0.2, 0.2, 0.3), 1):
        found.add(torch.tensor([1.0]), torch.tensor([0.5]), 1)
        found.write(seen, waited=0.0, norms=NORMS | {"ema_distance": distance})
    assert ["warning" in entry for entry in read_journal(folder)] == [False, False, True, False]


def test_what_is_no_number_is_left_out_so_that_every_line_is_json(folder):
    found = IntervalLogger(Journal(folder), 1, 1, 100, "cpu")
    found.add(torch.tensor([1.0]), torch.tensor([0.5]), 1)
    found.write(1, waited=0.0, norms=NORMS | {"grad_norm": float("inf")})
    [line] = folder.read("metrics.jsonl").decode().splitlines()
    assert "grad_norm" not in json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_one_bad_loss_makes_a_batch_bad():
    assert finite_everywhere(torch.ones(3), 1)
    assert not finite_everywhere(torch.tensor([1.0, float("inf")]), 1)


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("Tesla T4", 65), ("An unknown one", 0),
])
def test_a_device_is_known_by_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert log.peak_flops() == tflops * 1e12
