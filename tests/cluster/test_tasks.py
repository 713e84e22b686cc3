"""Functions in processes of their own."""

import os
import subprocess
import sys

import pytest

from cluster.errors import UserError
from cluster.tasks import apart
from pipelines.graph.fields import require


def test_a_function_runs_apart_and_its_mistakes_come_back():
    assert apart(os.path.join, "a", "b") == "a/b"
    assert apart(os.getpid) != os.getpid()
    with pytest.raises(UserError, match=r"data\.size=3: must be even"):
        apart(require, False, "data.size", 3, "must be even")


def test_a_process_that_is_killed_is_told():
    with pytest.raises(RuntimeError, match="was killed"):
        apart(os._exit, 9)


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os\nfrom cluster.tasks import apart\nprint('once', apart(os.path.join, 'a', 'b'))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout == "once a/b\n"
