#!/usr/bin/env bash
# pytest 9.2.0 with torch 2.13.0, CPU: monkeypatch.setattr on a setting of one of torch's config modules
# deletes the setting when the test ends, and torch.compile fails in the tests that follow.
#
# torch's config modules keep their settings outside of the module's __dict__ and answer for them by
# __getattr__. monkeypatch puts a value back only where the target's own __dict__ had it, and else
# deletes the attribute; torch hides a setting that is deleted. The setting cannot be read any more
# in that process. torch's own `config.patch(...)` puts it back.
#
# Guessed before: the value that was there is put back, as after any monkeypatch.setattr.
#
# Seen:
#   before 1.0
#   patched 0.5
#   after AttributeError: torch._functorch.config.activation_memory_budget does not exist
#   patch, after 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0 pytest==9.2.0 numpy==2.3.5

cat > "$folder/settings.py" <<'PYTHON'
import sys

import pytest
from torch._functorch import config


def said():
    try:
        return config.activation_memory_budget
    except AttributeError as error:
        return f"AttributeError: {error}"


if sys.argv[1] == "monkeypatch":
    print("before", said())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(config, "activation_memory_budget", 0.5)
        print("patched", said())
    print("after", said())
else:
    with config.patch(activation_memory_budget=0.5):
        pass
    print("patch, after", said())
PYTHON

seen=$(for way in monkeypatch patch; do "$folder/env/bin/python" "$folder/settings.py" "$way"; done)
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
before 1.0
patched 0.5
after AttributeError: torch._functorch.config.activation_memory_budget does not exist
patch, after 1.0
SEEN
echo "as recorded"
