"""`python -m tests.bench`: every benchmark in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

failed = [script.stem for script in sorted(Path(__file__).parent.glob("*.py"))
          if script.stem not in ("__main__", "report") and subprocess.run([sys.executable, script]).returncode]
sys.exit(f"benchmarks that failed: {', '.join(failed)}" if failed else 0)
