#!/usr/bin/env bash
# torch 2.11.0, Python 3.12, CPU: torch.compile gives a gradient of zeros, without a word, for a
# torch.autograd.Function whose forward ends in a `.to` that changes nothing.
#
# The function doubles its input; the result is cast to the dtype that it has already. Eager's
# gradient is 2 everywhere. Compiled, with fullgraph=True, the forward is right and the gradient is 0
# everywhere: with the "eager" backend already, so it is the graph that Dynamo makes. Without the
# `.to` it is 2. torch 2.12.1 gives 2 for both.
#
# Guessed before: 2 in all cases, as `x.to(x.dtype)` returns x; or a graph break; or an error.
#
# Seen:
#   2.11.0 cast eager 2.0 compiled 0.0
#   2.11.0 bare eager 2.0 compiled 2.0
#   2.12.1 cast eager 2.0 compiled 2.0
#   2.12.1 bare eager 2.0 compiled 2.0
#
# PYTHON names the Python to use, by default python3.12.
# Installs torch twice, with its CUDA packages: some 12 GB in a temporary folder, which is removed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/function.py" <<'PYTHON'
import torch


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cast):
        doubled = x * 2
        return doubled.to(x.dtype) if cast else doubled

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, None


def gradient(function, cast):
    x = torch.ones(4, requires_grad=True)
    function(x, cast).sum().backward()
    assert x.grad.unique().numel() == 1
    return x.grad[0].item()


compiled = torch.compile(Double.apply, backend="eager", fullgraph=True)
version = torch.__version__.split("+")[0]
for cast in (True, False):
    name = "cast" if cast else "bare"
    print(version, name, "eager", gradient(Double.apply, cast), "compiled", gradient(compiled, cast))
PYTHON

seen=""
for version in 2.11.0 2.12.1; do
    "${PYTHON:-python3.12}" -m venv "$folder/env"
    "$folder/env/bin/python" -m pip install -q "torch==$version" numpy==2.3.5
    seen+=$("$folder/env/bin/python" "$folder/function.py")$'\n'
    rm -rf "$folder/env"
done
printf '%s' "$seen"
diff <(printf '%s' "$seen") - <<'SEEN'
2.11.0 cast eager 2.0 compiled 0.0
2.11.0 bare eager 2.0 compiled 2.0
2.12.1 cast eager 2.0 compiled 2.0
2.12.1 bare eager 2.0 compiled 2.0
SEEN
echo "as recorded"
