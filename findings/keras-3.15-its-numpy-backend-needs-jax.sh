#!/usr/bin/env bash
# Keras 3.15.1, without torch: with KERAS_BACKEND=numpy keras cannot be imported where SciPy and jax are
# not installed.
#
# Its files import scipy, and keras.src.backend.numpy.math takes its Fourier transforms from the jax
# backend. Neither is a requirement of the package. SciPy is installed here, so that jax is what is
# missed.
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
"$folder/env/bin/python" -m pip install -q keras==3.15.1 numpy==2.4.6 scipy==1.17.1

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
