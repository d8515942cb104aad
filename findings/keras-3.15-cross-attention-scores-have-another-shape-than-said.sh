#!/usr/bin/env bash
# Keras 3.15.1 with torch 2.13.0, CPU: in a functional model the scores of MultiHeadAttention are said
# to have as many keys as there are queries.
#
# MultiHeadAttention.compute_output_spec takes the length of the queries for both. Where keys and
# queries differ in number, as in cross attention, a layer on the scores is built for the wrong size,
# and the model raises at its first call on the very inputs that it was made for.
#
# Guessed before: (None, 2, 5, 7), which is what the call gives, and a model that runs.
#
# Seen:
#   said (None, 2, 5, 5)
#   found (1, 2, 5, 7)
#   with a layer: ValueError True
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

query, value = keras.Input((5, 8)), keras.Input((7, 8))
_, scores = keras.layers.MultiHeadAttention(2, 4)(query, value, return_attention_scores=True)
print("said", scores.shape)
arrays = [torch.zeros(1, 5, 8), torch.zeros(1, 7, 8)]
print("found", tuple(keras.Model([query, value], scores)(arrays).shape))
model = keras.Model([query, value], keras.layers.Dense(3)(scores))
try:
    print("with a layer", tuple(model(arrays).shape))
except ValueError as error:
    print("with a layer: ValueError", "expected axis -1 of input shape to have value 5" in str(error))
PYTHON

seen=$("$folder/env/bin/python" "$folder/program.py")
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
said (None, 2, 5, 5)
found (1, 2, 5, 7)
with a layer: ValueError True
SEEN
echo "as recorded"
