"""Dropout of MLX."""

import facts
import mlx.core as mx
import numpy as np
from mlx import nn

mx.random.seed(0)


def dropped_ones(n, p, dtype):
    return np.array(nn.Dropout(p)(mx.ones((n,), getattr(mx, dtype))).astype(mx.float32))


def compiled_repeats():
    layer = nn.Dropout(0.5)
    call = mx.compile(lambda x: layer(x))
    x = mx.ones((256,))
    return bool((np.array(call(x)) == np.array(call(x))).all())


facts.report(
    "mlx",
    ["mlx"],
    {
        "drawn": facts.drawn(dropped_ones),
        "p = 1": facts.said(lambda: np.array(nn.Dropout(1.0)(mx.ones((2,)))).tolist()),
        "NaN": facts.of_nan(np.array(nn.Dropout(0.5)(mx.full((64,), float("nan"))))),
        "Dropout2d of [N, H, W, C] varies along": facts.varies(
            np.array(nn.Dropout2d(0.5)(mx.ones((4, 8, 8, 16)))) != 0
        ),
        "compiled, two calls have one mask": facts.said(compiled_repeats),
    },
)
