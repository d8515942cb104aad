"""Dropout of PaddlePaddle."""

import facts
import paddle
from paddle.nn import functional as F

paddle.seed(0)
ones = paddle.ones


def dropped_ones(n, p, dtype):
    return F.dropout(ones([n], dtype), p, training=True).astype("float32").numpy()


def infer(mode, training):
    paddle.seed(1)
    out = F.dropout(ones([8, 8]), 0.25, training=training, mode=mode).numpy()
    return sorted({round(float(value), 6) for value in out.ravel()})


x = paddle.rand([1 << 20]).astype("bfloat16")
facts.report(
    "paddle",
    ["paddlepaddle"],
    {
        "drawn": facts.drawn(dropped_ones),
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            x.astype("float32").numpy(), F.dropout(x, 0.01).astype("float32").numpy(), 0.01
        ),
        "p = 1": facts.said(lambda: F.dropout(ones([2]), 1.0).numpy().tolist()),
        "NaN": facts.of_nan(F.dropout(paddle.full([64], float("nan")), 0.5).numpy()),
        "axis=[0] of three varies along": facts.varies(
            F.dropout(ones([4, 8, 16]), 0.5, axis=[0]).numpy() != 0
        ),
        "downscale_in_infer, p = 0.25, values of ones in training": infer(
            "downscale_in_infer", True
        ),
        "downscale_in_infer, p = 0.25, values of ones in evaluation": infer(
            "downscale_in_infer", False
        ),
        "downscale_in_infer in evaluation, of one dimension": facts.said(
            lambda: F.dropout(ones([4]), 0.25, training=False, mode="downscale_in_infer").tolist()
        ),
        "upscale_in_train, p = 0.25, values of ones in training": infer("upscale_in_train", True),
        "upscale_in_train, p = 0.25, values of ones in evaluation": infer(
            "upscale_in_train", False
        ),
    },
)
