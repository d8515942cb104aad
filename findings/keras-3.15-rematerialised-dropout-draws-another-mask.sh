#!/usr/bin/env bash
# Keras 3.15.1 with torch 2.13.0, CPU: a dropout layer with a seed, or a SpatialDropout with or without
# one, gives wrong gradients in a RematScope, without a word.
#
# Keras' rematerialisation is torch.utils.checkpoint on this backend. That puts torch's generators back
# for the recomputation, but not the state of the layer's SeedGenerator, which counts on: backward goes
# through the mask of the next call, and each training step moves the layer on by two. Without a seed
# Dropout takes torch's own function, whose mask is drawn again rightly.
#
# Guessed before: the gradient is that of the mask of the forward, as without the scope.
#
# Seen:
#   Dropout {}: gradient fits forward True, in a RematScope True; 3 steps are 0 calls
#   Dropout {'seed': 1}: gradient fits forward True, in a RematScope False; 3 steps are 6 calls
#   SpatialDropout1D {}: gradient fits forward True, in a RematScope False; 3 steps are 6 calls
#   SpatialDropout1D {'seed': 1}: gradient fits forward True, in a RematScope False; 3 steps are 6 calls
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


def agrees(layer):
    x = torch.ones(1, 4, 64, requires_grad=True)
    out = layer(x, training=True)
    out.sum().backward()
    return bool(((out != 0) == (x.grad != 0)).all())


for name, options in (
    ("Dropout", {}), ("Dropout", {"seed": 1}), ("SpatialDropout1D", {}),
    ("SpatialDropout1D", {"seed": 1}),
):
    kind = getattr(keras.layers, name)
    plain = kind(0.5, **options)
    with keras.RematScope(mode="full"):
        recomputed = kind(0.5, **options)
    found = [all([agrees(layer) for _ in range(3)]) for layer in (plain, recomputed)]
    calls = int(recomputed.seed_generator.state.value[1])
    print(f"{name} {options}: gradient fits forward {found[0]}, in a RematScope {found[1]};",
          f"3 steps are {calls} calls")
PYTHON

seen=$("$folder/env/bin/python" "$folder/program.py")
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
Dropout {}: gradient fits forward True, in a RematScope True; 3 steps are 0 calls
Dropout {'seed': 1}: gradient fits forward True, in a RematScope False; 3 steps are 6 calls
SpatialDropout1D {}: gradient fits forward True, in a RematScope False; 3 steps are 6 calls
SpatialDropout1D {'seed': 1}: gradient fits forward True, in a RematScope False; 3 steps are 6 calls
SEEN
echo "as recorded"
