"""Dropout of tinygrad, which draws where TRAINING is set; clang, or what CC names, compiles it."""

import inspect
import os
import subprocess
import sys
import tempfile

import facts
import numpy as np

os.environ.setdefault("DEV", "CPU")  # before it is imported
import tinygrad
from tinygrad import Context, Tensor, TinyJit, dtypes, nn

if default := os.environ.get("DEFAULT_FLOAT"):  # asked by the program below
    Tensor.manual_seed(0)
    with Context(TRAINING=1):
        ones = Tensor.ones(1 << 20, dtype=dtypes.float32)
        print([float((ones.dropout(p).numpy() == 0).mean()) for p in facts.RATES])
    sys.exit()
Tensor.manual_seed(0)


def dropped(x, p=0.5):
    with Context(TRAINING=1):
        return x.dropout(p).realize()


def dropped_ones(n, p, dtype):
    return dropped(Tensor.ones(n, dtype=getattr(dtypes, dtype)), p).cast(dtypes.float32).numpy()


def kept(call=dropped):
    return call(Tensor.ones(4096).contiguous().realize()).numpy() != 0


def under_a_default_of_16_bits(default):
    """Shares dropped of float32 ones, where DEFAULT_FLOAT is a type of 16 bits."""
    environment = os.environ | {"DEFAULT_FLOAT": default}
    seen = subprocess.check_output([sys.executable, __file__], env=environment, text=True)
    return [float(f"{float(rate):.3g}") for rate in seen.strip("[]\n").split(",")]


def gradient_at_1():
    x = Tensor.ones(2).contiguous()
    with Context(TRAINING=1):
        return x.dropout(1.0).sum().gradient(x)[0].numpy().tolist()


def attention_masks():
    """Along which dimensions of [batch, heads, queries, keys] the mask of attention varies."""
    q = Tensor.zeros(2, 8, 4, 4)
    v = Tensor.eye(4).expand(2, 8, 4, 4)
    with Context(TRAINING=1):
        return facts.varies(q.scaled_dot_product_attention(q, v, dropout_p=0.5).numpy() != 0)


def saved_by_state_dict():
    """Saved and loaded by a program that seeds as it begins."""
    model = nn.Linear(4, 4)

    def save():
        path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        nn.state.safe_save(nn.state.get_state_dict(model), path)
        return path

    def load(path):
        Tensor.manual_seed(0)
        nn.state.load_state_dict(model, nn.state.safe_load(path), verbose=False)

    Tensor.manual_seed(0)
    return facts.resumed(kept, save, load)


def saved_by_counter():
    """tinygrad's generator is a seed and a counter a device, in attributes of Tensor."""
    device = Tensor.ones(1).device

    def load(saved):
        Tensor._device_rng_counters[device].assign(Tensor(saved, dtype=dtypes.uint32)).realize()

    return facts.resumed(kept, lambda: Tensor._device_rng_counters[device].numpy(), load)


def jitted():
    """The calls after the two that TinyJit runs and captures."""
    call = TinyJit(dropped)
    masks = [kept(call) for _ in range(5)]
    return "one mask in all calls" if np.array_equal(*masks[3:]) else "a mask a call"


def jitted_as_eager():
    masks = []
    for call in (dropped, TinyJit(dropped)):
        Tensor.manual_seed(1)
        masks.append([kept(call) for _ in range(4)])
    return bool(np.array_equal(*masks))


x = Tensor.rand(1 << 20).cast(dtypes.bfloat16).realize()
facts.report(
    "tinygrad",
    ["tinygrad"],
    {
        "drawn": facts.drawn(dropped_ones),
        "of float32, DEFAULT_FLOAT of 16 bits": {
            default: under_a_default_of_16_bits(default) for default in ("HALF", "BFLOAT16")
        },
        "bfloat16, p = 0.01, uniform values gain": facts.gained(
            x.cast(dtypes.float32).numpy(), dropped(x, 0.01).cast(dtypes.float32).numpy(), 0.01
        ),
        "p = 1": facts.said(lambda: dropped(Tensor.ones(2), 1.0).numpy().tolist()),
        "gradient at p = 1": facts.said(gradient_at_1),
        "NaN": facts.of_nan(dropped(Tensor.full((64,), float("nan"))).numpy()),
        "arguments of dropout": list(inspect.signature(Tensor.dropout).parameters),
        "scaled_dot_product_attention's mask varies along": attention_masks(),
        "saved by safe_save and loaded": saved_by_state_dict(),
        "saved by the generator's counter and loaded": facts.said(saved_by_counter),
        "TinyJit": jitted(),
        "TinyJit, the masks of eager from the same seed": jitted_as_eager(),
        "names of tinygrad with export in them": [n for n in dir(tinygrad) if "export" in n],
    },
)
