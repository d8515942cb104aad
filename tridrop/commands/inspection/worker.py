"""A process that compiles: it reads one task per line and writes its records on one, in JSON."""

from __future__ import annotations

import json
import signal
import sys
import traceback


def main() -> None:
    """Answer tasks ``[row, arch, dtype, method]`` until the input ends."""
    # the parent process handles Ctrl-C, and stops this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr  # output of a compiler must not mix with answers
    from .records import compile_row

    for line in sys.stdin:
        try:
            answer: object = compile_row(*json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
