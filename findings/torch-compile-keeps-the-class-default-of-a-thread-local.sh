#!/usr/bin/env bash
# torch 2.13.0 (also 2.11.0 and 2.15.0), CPU: a compiled function goes on reading the class's default
# of a threading.local after the thread has set the attribute, and gives a wrong result, silently.
#
# A subclass of threading.local has `factor = None`, which is a usual way to say what a thread sees
# before it sets anything. The function multiplies by the factor if there is one. Compiled and
# called once with the default, it ignores the factor that is set afterwards: no recompilation, no
# error. The same class without threading.local as its base is guarded and recompiled, and so is a
# threading.local whose attribute was set in __init__, or is read by getattr with a default.
#
# Guessed before: a guard in all cases, since an instance's attribute hides its class's; or a
# graph break at the threading.local.
#
# Seen:
#   2.13.0 object compiled 1.0 5.0 eager 1.0 5.0
#   2.13.0 _local compiled 1.0 1.0 eager 1.0 5.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0 numpy==2.3.5

cat > "$folder/default.py" <<'PYTHON'
import threading

import torch

x = torch.ones(1)
version = torch.__version__.split("+")[0]
for base in (object, threading.local):

    class State(base):
        factor = None

    def scaled(x, state):
        return x if state.factor is None else x * state.factor

    seen = {}
    for name in ("compiled", "eager"):
        function = scaled
        if name == "compiled":
            function = torch.compile(scaled, backend="eager", fullgraph=True)
        state = State()
        before = function(x, state).item()
        state.factor = 5.0
        seen[name] = f"{name} {before} {function(x, state).item()}"
    print(version, base.__name__, *seen.values())
PYTHON

seen=$("$folder/env/bin/python" "$folder/default.py")
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
2.13.0 object compiled 1.0 5.0 eager 1.0 5.0
2.13.0 _local compiled 1.0 1.0 eager 1.0 5.0
SEEN
echo "as recorded"
