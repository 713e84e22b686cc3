"""`python -m tests.bench`: every benchmark in a process of its own, but for `make bench-gpu` and `make rehearse`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OTHERS = ("__main__", "report", "table", "bare", "gpu", "rehearse", "whole_set", "roofline", "traffic")
scripts = [script for script in sorted(Path(__file__).parent.glob("*.py")) if script.stem not in OTHERS]
failed = [script.stem for script in scripts if subprocess.run([sys.executable, script]).returncode]
sys.exit(f"benchmarks that failed: {', '.join(failed)}" if failed else 0)
