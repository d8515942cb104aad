#!/usr/bin/env bash
# Keras 3.15.1 with torch 2.13.0, CPU: seed=2**31 makes a layer raise an error of torch's that names
# neither the layer nor the seed, where keras.random's functions and set_random_seed take it.
#
# The functions fold a seed into 32 bits before they make a tensor of it. SeedGenerator, which layers
# and initialisers with a sequence have, does not, and its variable is int32 on this backend.
#
# Guessed before: a layer takes the seeds that the functions take.
#
# Seen:
#   function 2147483647 (2,)
#   layer 2147483647 2147483647
#   function 2147483648 (2,)
#   layer 2147483648 RuntimeError: value cannot be converted to type int32 without overflow
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

for seed in (2**31 - 1, 2**31):
    keras.utils.set_random_seed(seed)
    print("function", seed, tuple(keras.random.uniform((2,), seed=seed).shape))
    try:
        print("layer", seed, keras.layers.Dropout(0.5, seed=seed).seed)
    except RuntimeError as error:
        print("layer", seed, "RuntimeError:", error)
PYTHON

seen=$("$folder/env/bin/python" "$folder/program.py")
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
function 2147483647 (2,)
layer 2147483647 2147483647
function 2147483648 (2,)
layer 2147483648 RuntimeError: value cannot be converted to type int32 without overflow
SEEN
echo "as recorded"
