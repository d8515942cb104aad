#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0, CPU: move_exported_model_to_eval turns nn.Dropout off and leaves
# the dropout_p of scaled_dot_product_attention on; the "evaluation" is random, without a warning.
#
# Guessed before: both are off, since the module passes dropout_p only while it is training.
#
# Seen:
#   dropout in training: False
#   dropout_p: 0.5
#   two evaluations are equal: False
#
# PYTHON names the Python to use. torch is some gigabytes where no CPU build is configured.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0 torchao==0.18.0 numpy==2.3.5

cat > "$folder/evaluate.py" <<'PYTHON'
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization.pt2e import move_exported_model_to_eval


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        p = 0.5 if self.training else 0.0
        return self.drop(F.scaled_dot_product_attention(x, x, x, dropout_p=p))


x = torch.randn(2, 2, 4, 8)
module = torch.export.export(Attention().train(), (x,)).module()
move_exported_model_to_eval(module)
calls = {str(node.target): node.args for node in module.graph.nodes}
print("dropout in training:", calls["aten.dropout.default"][2])
print("dropout_p:", calls["aten.scaled_dot_product_attention.default"][4])
print("two evaluations are equal:", torch.equal(module(x), module(x)))
PYTHON

seen=$("$folder/env/bin/python" "$folder/evaluate.py" 2> /dev/null)
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
dropout in training: False
dropout_p: 0.5
two evaluations are equal: False
SEEN
echo "as recorded"
