#!/usr/bin/env bash
# Keras 3.15.1 with torch 2.13.0, CPU: call n + 1 of a Dropout with seed s has the mask of call n of
# seed s + 1, and a model that is saved and loaded begins its masks anew.
#
# The state of a SeedGenerator is the seed and the number of the call. The torch backend adds both up
# and seeds a generator with the sum, so layers with the seeds 1, 2, 3 share all but a few of their
# masks, a step apart. No file of Keras holds the state: training that goes on from one draws the masks
# of the first steps once more. So does pickle, which is a file of Keras as well.
#
# Guessed before: masks of different seeds are unrelated; a loaded model draws what the saved one
# would have drawn next.
#
# Seen:
#   calls 1, 2, 3 of seed 1 are calls 0, 1, 2 of seed 2: True
#   load_model draws the first masks again: True
#   pickle draws the first masks again: True
#
# PYTHON names the Python to use, 3.11 or newer, by default python3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export KERAS_BACKEND=torch KERAS_HOME="$folder"
"${PYTHON:-python3.11}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q keras==3.15.1 torch==2.13.0 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
import os
import pickle

import keras
import torch

PATH = os.path.join(os.environ["KERAS_HOME"], "model.keras")


def masks(layer, calls):
    return [layer(torch.ones(32), training=True).tolist() for _ in range(calls)]


first, second = (masks(keras.layers.Dropout(0.5, seed=seed), 4) for seed in (1, 2))
print("calls 1, 2, 3 of seed 1 are calls 0, 1, 2 of seed 2:", first[1:] == second[:3])

inputs = keras.Input((32,))
model = keras.Model(inputs, keras.layers.Dropout(0.5, seed=1)(inputs))
old = masks(lambda x, training: model(x[None], training=training), 3)
model.save(PATH)
for way, loaded in (
    ("load_model", keras.saving.load_model(PATH)),
    ("pickle", pickle.loads(pickle.dumps(model))),
):
    again = masks(lambda x, training: loaded(x[None], training=training), 3)
    print(way, "draws the first masks again:", again == old)
PYTHON

seen=$("$folder/env/bin/python" "$folder/program.py")
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
calls 1, 2, 3 of seed 1 are calls 0, 1, 2 of seed 2: True
load_model draws the first masks again: True
pickle draws the first masks again: True
SEEN
echo "as recorded"
