#!/usr/bin/env bash
# Keras 3.15.1 with torch 2.13.0, CPU: GaussianDropout and AlphaDropout check that their rate is in
# [0, 1], accept 1, and raise ZeroDivisionError when they are called in training.
#
# Dropout gives zeros at 1. The noise of GaussianDropout, of the standard deviation
# sqrt(rate / (1 - rate)), has no limit there; of AlphaDropout a and b have none.
#
# Guessed before: a ValueError when the layer is made, as at 1.1, or zeros.
#
# Seen:
#   Dropout [0.0, 0.0]
#   GaussianDropout ZeroDivisionError
#   AlphaDropout ZeroDivisionError
#
# PYTHON names the Python to use, 3.11 or newer, by default python3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export KERAS_BACKEND=torch KERAS_HOME="$folder"
"${PYTHON:-python3.11}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q keras==3.15.1 torch==2.13.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import keras
import torch

for name in ("Dropout", "GaussianDropout", "AlphaDropout"):
    layer = getattr(keras.layers, name)(1.0)
    try:
        print(name, layer(torch.ones(2), training=True).tolist())
    except ZeroDivisionError:
        print(name, "ZeroDivisionError")
PYTHON

seen=$("$folder/env/bin/python" "$folder/program.py")
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
Dropout [0.0, 0.0]
GaussianDropout ZeroDivisionError
AlphaDropout ZeroDivisionError
SEEN
echo "as recorded"
