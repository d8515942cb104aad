#!/usr/bin/env bash
# torch 2.14.1, Python 3.13, CPU: a compiled function that makes text of a DTensor's placement, for a
# message say, raises an AssertionError of the compiler's own.
#
# In eager str(Shard(0)) is "S(0)"; compiled with fullgraph=True and the "eager" backend it raises
# while it is traced. torch 2.13.0 and 2.15.0 compile it.
#
# Guessed before: the same text, or a graph break that names the call.
#
# Seen:
#   2.14.1 eager S(0)
#   2.14.1 compiled Unsupported AssertionError('cls_source must not be None for MRO walk')
#   2.15.0 eager S(0)
#   2.15.0 compiled S(0)
#
# PYTHON names the Python to use, by default python3.13.
# Installs torch twice, with its CUDA packages: some 12 GB in a temporary folder, which is removed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/place.py" <<'PYTHON'
import re
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def doubled(x):
    return x * 2, str(x.placements[0])


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
x = distribute_tensor(torch.ones(4, 8), init_device_mesh("cpu", (1,)), [Shard(0)])
compiled = torch.compile(doubled, backend="eager", fullgraph=True)
for name, call in {"eager": doubled, "compiled": compiled}.items():
    try:
        found = call(x)[1]
    except Exception as error:
        inner = re.search(r"AssertionError\('.*?'\)", str(error))
        found = f"{type(error).__name__} {inner.group() if inner else error}"
    print(torch.__version__.split("+")[0], name, found)
dist.destroy_process_group()
PYTHON

seen=""
for version in 2.14.1 2.15.0; do
    "${PYTHON:-python3.13}" -m venv "$folder/env"
    "$folder/env/bin/python" -m pip install -q "torch==$version" numpy==2.3.5
    seen+=$("$folder/env/bin/python" "$folder/place.py" "$folder/store-$version" 2> /dev/null)$'\n'
    rm -rf "$folder/env"
done
printf '%s' "$seen"
diff <(printf '%s' "$seen") - <<'SEEN'
2.14.1 eager S(0)
2.14.1 compiled Unsupported AssertionError('cls_source must not be None for MRO walk')
2.15.0 eager S(0)
2.15.0 compiled S(0)
SEEN
echo "as recorded"
