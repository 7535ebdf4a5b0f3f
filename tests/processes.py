"""Processes that tests start."""

import os
import subprocess
import sys
from pathlib import Path


def started(*words, start_new_session=False, **environment):
    """A Python process with one thread that finds the package and the tests."""
    here = Path(__file__).parent
    paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | paths | environment,
        start_new_session=start_new_session,
    )
