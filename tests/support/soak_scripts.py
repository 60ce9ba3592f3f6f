"""The scripts of scripts/soak as tests, with a small server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from small import SMALL, as_flags

SCRIPTS = Path(__file__).parents[2] / "scripts" / "soak"
FLAGS = as_flags({**SMALL, "num_pages": 512, "max_num_seqs": 16})


def script(name: str, *arguments: str) -> dict[str, Any]:
    """Return the JSON at the end of a script that must succeed."""
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
