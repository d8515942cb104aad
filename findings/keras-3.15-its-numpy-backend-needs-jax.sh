#!/usr/bin/env bash
# Keras 3.15.1, without torch: KERAS_BACKEND=numpy cannot be imported where jax is not installed.
#
# keras.src.backend.numpy.math takes its Fourier transforms from the jax backend. jax is no requirement
# of the package.
#
# Guessed before: the backend named numpy needs numpy alone, which Keras requires.
#
# Seen:
#   No module named 'jax'
#
# PYTHON names the Python to use, 3.11 or newer, by default python3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export KERAS_BACKEND=numpy KERAS_HOME="$folder"
"${PYTHON:-python3.11}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q keras==3.15.1 numpy==2.4.6

cat > "$folder/program.py" <<'PYTHON'
try:
    import keras

    print(keras.config.backend())
except ModuleNotFoundError as error:
    print(error)
PYTHON

seen=$("$folder/env/bin/python" "$folder/program.py")
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
No module named 'jax'
SEEN
echo "as recorded"
