#!/usr/bin/env bash
# Triton 3.6.0, compiled for Hopper without a GPU: a specialised loop (tl.range(..., warp_specialize=True))
# divides a tile of 128 rows among two groups of warps. Where the tile is loaded by a descriptor that
# the host made, the descriptor stays as it was: each copy of 128 x 64 numbers goes to memory for
# 64 x 64, and the barrier expects 8,192 bytes where the descriptor's box has 16,384. Nothing is said.
#
# Triton 3.7.1 finds it itself and refuses to compile (triton-lang/triton issue 11587). With a descriptor
# that is made in the kernel, both divide it.
#
# Guessed before: the two ways to make a descriptor give the same code, or an error.
#
# Seen:
#   3.6.0 made by the host: 128x64 into 64x64, 64x128 into 64x128, 128x64 into 64x64; the host's box [128, 64]
#   3.6.0 made in the kernel: 64x64 into 64x64, 64x128 into 64x128, 64x64 into 64x64
#   3.7.1 made by the host: RuntimeError
#   3.7.1 made in the kernel: 64x64 into 64x64, 64x128 into 64x128, 64x64 into 64x64
#
# PYTHON names the Python to use, by default python3 (3.10 to 3.14). Needs no torch and no GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/tiles.py" <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TILE = {"ROWS": 128, "COLUMNS": 128, "STEP": 64}


@triton.jit
def sums(left, right, out, first, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, depth, STEP, warp_specialize=True):
        total = tl.dot(left.load([first, k]), right.load([k, 0]), total)
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + first * COLUMNS + at, total)


@triton.jit
def by_host(left, right, out, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    sums(left, right, out, tl.program_id(0) * ROWS, depth, ROWS, COLUMNS, STEP)


@triton.jit
def in_kernel(a, b, out, height, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    left = tl.make_tensor_descriptor(a, [height, depth], [depth, 1], [ROWS, STEP])
    right = tl.make_tensor_descriptor(b, [depth, COLUMNS], [COLUMNS, 1], [STEP, COLUMNS])
    sums(left, right, out, tl.program_id(0) * ROWS, depth, ROWS, COLUMNS, STEP)


def seen(kernel, types):
    signature = types | dict.fromkeys(TILE, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if "desc" not in t}
    source = ASTSource(kernel, signature, constexprs=TILE, attrs=aligned)
    options = {"num_warps": 4, "num_stages": 2}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:
        return type(error).__name__
    copies = re.findall(r"async_tma_copy_global_to_local [^\n]*", made.asm["ttgir"])
    sizes = [re.search(r"tensordesc<(?:tensor<)?(\d+x\d+)x.*?memdesc<(\d+x\d+)x", c) for c in copies]
    text = ", ".join(f"{s[1]} into {s[2]}" for s in sizes)
    boxes = [box["block_size"] for box in made.metadata.tensordesc_meta or ()]
    return text + (f"; the host's box {boxes[0]}" if boxes else "")


host = {"left": "tensordesc<bf16[128,64]>", "right": "tensordesc<bf16[64,128]>"}
print(triton.__version__, "made by the host:", seen(by_host, host | {"out": "*fp32", "depth": "i32"}))
plain = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "height": "i32", "depth": "i32"}
print(triton.__version__, "made in the kernel:", seen(in_kernel, plain))
PYTHON

seen=""
for version in 3.6.0 3.7.1; do
    "${PYTHON:-python3}" -m venv "$folder/env"
    "$folder/env/bin/python" -m pip install -q "triton==$version"
    seen+=$(TRITON_CACHE_DIR="$folder/cache-$version" "$folder/env/bin/python" "$folder/tiles.py" 2> /dev/null)$'\n'
    rm -rf "$folder/env"
done
printf '%s' "$seen"
diff <(printf '%s' "$seen") - <<'SEEN'
3.6.0 made by the host: 128x64 into 64x64, 64x128 into 64x128, 128x64 into 64x64; the host's box [128, 64]
3.6.0 made in the kernel: 64x64 into 64x64, 64x128 into 64x128, 64x64 into 64x64
3.7.1 made by the host: RuntimeError
3.7.1 made in the kernel: 64x64 into 64x64, 64x128 into 64x128, 64x64 into 64x64
SEEN
echo "as recorded"
