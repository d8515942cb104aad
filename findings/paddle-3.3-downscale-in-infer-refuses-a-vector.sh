#!/usr/bin/env bash
# PaddlePaddle 3.3.1, CPU: in evaluation, dropout with mode="downscale_in_infer" raises for a tensor
# of one dimension, and works for one of two. In training it takes both.
#
# The evaluation of this mode is x * (1 - p), which needs no shape. The message is about
# "num_col_dims", of a matrix that the kernel reads the tensor as.
#
# Guessed before: 0.75 everywhere, whatever the number of dimensions.
#
# Seen:
#   training, shape [4] ok
#   training, shape [2, 2] ok
#   evaluation, shape [4] ValueError
#   evaluation, shape [2, 2] 0.75
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q paddlepaddle==3.3.1 numpy==2.3.5

cat > "$folder/mode.py" <<'PYTHON'
import paddle
from paddle.nn import functional as F

for training in (True, False):
    for shape in ([4], [2, 2]):
        try:
            out = F.dropout(paddle.ones(shape), 0.25, training=training, mode="downscale_in_infer")
            said = "ok" if training else float(out.mean())
        except ValueError as error:
            assert "num_col_dims" in str(error)
            said = "ValueError"
        print("training," if training else "evaluation,", "shape", shape, said)
PYTHON

seen=$("$folder/env/bin/python" "$folder/mode.py" 2> /dev/null)
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
training, shape [4] ok
training, shape [2, 2] ok
evaluation, shape [4] ValueError
evaluation, shape [2, 2] 0.75
SEEN
echo "as recorded"
