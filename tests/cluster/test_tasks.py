"""Functions in processes of their own."""

import os
import subprocess
import sys

import pytest

from cluster.errors import UserError
from cluster.tasks import run_in_subprocess
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
