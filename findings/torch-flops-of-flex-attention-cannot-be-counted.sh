#!/usr/bin/env bash
# torch 2.13.0, CPU: FlopCounterMode around flex_attention raises, compiled or not, with a message of
# neither. torch has a formula for this operator in the counter's own table.
#
# Around scaled_dot_product_attention the counter gives a number (0 on a CPU before 2.15.0, 32768
# with it). 2.11.0, 2.12.1 and 2.14.1 raise the same TypeError; 2.15.0 a RuntimeError, "torch.compile
# with fullgraph=True found no compiled frames", as a dispatch mode is no place to compile in.
#
# Guessed before: a number, as the table has flex_attention and the mode says that it takes operators
# that take functions (supports_higher_order_operators).
#
# Seen:
#   in the table True
#   sdpa 0
#   flex_attention TypeError no implementation found for 'torch.ops.higher_order.flex_attention'
#   compiled TypeError no implementation found for 'torch.ops.higher_order.flex_attention'
#
# PYTHON names the Python to use, by default python3.11. torch is some gigabytes where no CPU build is
# configured.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -q torch==2.13.0 numpy==2.3.5

cat > "$folder/count.py" <<'PYTHON'
import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry

warnings.simplefilter("ignore")
print("in the table", torch.ops.higher_order.flex_attention in flop_registry)
q = torch.randn(1, 2, 16, 16)
calls = {
    "sdpa": F.scaled_dot_product_attention,
    "flex_attention": flex_attention,
    "compiled": torch.compile(flex_attention),
}
for name, call in calls.items():
    call(q, q, q)  # by itself each runs
    torch.compiler.reset()
    try:
        with FlopCounterMode(display=False) as counter:
            call(q, q, q)
        print(name, counter.get_total_flops())
    except Exception as error:
        print(name, type(error).__name__, str(error).split(" on types")[0])
PYTHON

seen=$("$folder/env/bin/python" "$folder/count.py" 2> /dev/null)
echo "$seen"
diff <(echo "$seen") - <<'SEEN'
in the table True
sdpa 0
flex_attention TypeError no implementation found for 'torch.ops.higher_order.flex_attention'
compiled TypeError no implementation found for 'torch.ops.higher_order.flex_attention'
SEEN
echo "as recorded"
