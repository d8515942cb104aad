"""A process that compiles: one task per line in, its records on one line out, both JSON."""

from __future__ import annotations

import json
import signal
import sys
import traceback


def main() -> None:
    """Answer tasks ``[row, arch, dtype, method]`` until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this, and ends it
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a compiler prints is no answer
    from .records import compile_row

    for line in sys.stdin:
        try:
            answer: object = compile_row(*json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
