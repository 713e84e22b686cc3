"""Functions in processes of their own."""

import os
import subprocess
import sys
import time

import pytest
import ray

from cluster.errors import UserError
from cluster.session import Resources, cores
from cluster.tasks import run_each_on_accelerator, run_in_subprocess, run_on_accelerator
from pipelines.graph.fields import require


def test_a_function_runs_apart_and_its_mistakes_come_back():
    assert run_in_subprocess(os.path.join, "a", "b") == "a/b"
    assert run_in_subprocess(os.getpid) != os.getpid()
    with pytest.raises(UserError, match=r"data\.size=3: must be even"):
        run_in_subprocess(require, False, "data.size", 3, "must be even")


def test_a_process_that_is_killed_is_told():
    with pytest.raises(RuntimeError, match="was killed"):
        run_in_subprocess(os._exit, 9)


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os\nfrom cluster.tasks import run_in_subprocess\n"
                      "print('once', run_in_subprocess(os.path.join, 'a', 'b'))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout == "once a/b\n"


def process_and_threads():
    """The id of this process and the number of torch's threads."""
    import torch

    return os.getpid(), torch.get_num_threads()


@pytest.mark.ray
def test_without_gpus_the_next_task_takes_over_the_process_but_not_its_threads(ray_cluster):
    """A process that has to import torch and diffusers costs a laptop ten seconds."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    first, second = (run_on_accelerator(Resources(cpus=4, gpus=0, node_cpus=2), process_and_threads) for _ in range(2))
    assert first == second == (first[0], cores())
    assert ray.get(ray.remote(num_cpus=1)(process_and_threads).remote()) == (first[0], 1)


def divide(number):
    """The quotient of 12 and a number; the process dies of 3."""
    return os._exit(9) if number == 3 else 12 // number


@pytest.mark.ray
def test_each_item_has_a_task_and_one_that_fails_costs_itself(ray_cluster):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    found = dict(run_each_on_accelerator(Resources(cpus=4, gpus=0, node_cpus=2), divide, [0, 1, 2, 3], max_seconds=60))
    assert (found[1], found[2]) == (12, 6)
    assert isinstance(found[0], ZeroDivisionError)
    assert isinstance(found[3], Exception)


@pytest.mark.ray
def test_tasks_that_hang_are_ended(ray_cluster):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    resources = Resources(cpus=4, gpus=0, node_cpus=2)
    found = dict(run_each_on_accelerator(resources, time.sleep, [0, 3600, 3601], max_seconds=20))
    assert found.pop(0) is None
    assert all(isinstance(error, TimeoutError) for error in found.values())
    assert len(found) == 2
    assert dict(run_each_on_accelerator(resources, divide, [4], max_seconds=60)) == {4: 3}, "its CPUs are not free"
