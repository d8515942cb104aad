#!/usr/bin/env bash
# NumPy 2.4.6, CPython 3.11 or newer: sys.setprofile, which reports calls of C functions, reports none
# of the calls of numpy.random, new interface or old.
#
# random.random() and numpy.zeros() raise a "c_call" event each. Generator.random, Generator.integers
# and the module's numpy.random.rand raise none: the methods are made by Cython, which by default
# calls them past the interpreter's profiling. A tool that watches a process for random draws this
# way counts Python's draws and misses all of NumPy's.
#
# Guessed before: events for all, as all are functions of C to whoever calls them; or for
# none of NumPy's functions.
#
# Seen:
#   Random.random zeros ndarray.sum
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q numpy==2.4.6

cat > "$folder/events.py" <<'PYTHON'
import random
import sys

import numpy

generator = numpy.random.default_rng(0)
seen = []


def note(frame, event, function):
    if event == "c_call":
        seen.append(function.__qualname__)


sys.setprofile(note)
random.random()
generator.random()
generator.integers(3)
numpy.random.rand()
ones = numpy.zeros(2)
ones.sum()
sys.setprofile(None)
print(*[name for name in seen if name not in ("setprofile", "ufunc.reduce")])
PYTHON

seen=$("$folder/env/bin/python" "$folder/events.py")
echo "$seen"
test "$seen" = "Random.random zeros ndarray.sum"
echo "as recorded"
