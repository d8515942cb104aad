"""Programs that are run in a process of their own, in which Triton compiles."""

import os
import subprocess
import sys


def printed(*arguments: object, **environment: str) -> str:
    """What ``python ARGUMENTS`` prints. In the process of the tests Triton may be interpreting."""
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, env=given, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout
