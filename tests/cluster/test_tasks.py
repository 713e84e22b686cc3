"""Functions in processes of their own."""

import os
import subprocess
import sys
import time

import pytest
import ray

from cluster.errors import UserError
from cluster.session import Resources
from cluster.tasks import run_each_on_accelerator, run_in_subprocess
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
    found = dict(run_each_on_accelerator(resources, time.sleep, [0, 3600, 3601], max_seconds=10))
    assert found.pop(0) is None
    assert all(isinstance(error, TimeoutError) for error in found.values())
    assert len(found) == 2
    assert dict(run_each_on_accelerator(resources, divide, [4], max_seconds=60)) == {4: 3}, "its CPUs are not free"
