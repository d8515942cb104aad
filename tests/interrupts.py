"""Interrupts at random moments of ops that several threads share, with canaries in freed memory.

A process of its own, since threads that write to freed memory end it:

    python tests/interrupts.py [how many] [seed] [own]

With "own" the loops run in tridrop's own threads, and not in those of torch.

After each interrupt, tensors of the sizes that the op had in use are made where its memory was, and
must keep what is written into them.
"""

import _thread
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tridrop
from tridrop.backends.cpu import threads

PATTERN = 0x5A
LONGEST = 2  # bursts: interrupts that follow the first while it is seen to
torch.set_num_threads(3)
seed = torch.tensor([3, 1 << 40])


def both(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    """Forward and backward of an op of tensors of these shapes."""
    torch.manual_seed(1)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def run() -> list[Tensor]:
        out = op(*tensors)
        first = out[0] if isinstance(out, tuple) else out
        return [first.detach(), *torch.autograd.grad(first, tensors, torch.ones_like(first))]

    return run


def norm(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, residual, weight, bias: op(
        x, residual=residual, weight=weight, norm_bias=bias, p=0.1, seed=seed
    )


SHAPE, ROW, WIDE = (512, 1024), (1024,), (512, 2048)
SCORES, HEADS = (2, 4, 256, 256), (1, 8, 256, 32)
OPS: dict[str, Callable[[], list[Tensor]]] = {
    "dropout": both(lambda x: tridrop.dropout(x, 0.1, seed=seed), SHAPE),
    "dropout_add": both(
        lambda x, r: tridrop.dropout_add(x, r, 0.1, drop_path=0.1, seed=seed), SHAPE, SHAPE
    ),
    "layer_scale": both(
        lambda x, r, b, g: tridrop.dropout_add(
            x, r, 0.1, bias=b, layer_scale=g, activation="silu", seed=seed
        ),
        SHAPE, SHAPE, ROW, ROW,
    ),
    "gelu": both(
        lambda x, b: tridrop.activation_dropout(x, 0.1, activation="gelu", bias=b, seed=seed),
        SHAPE, ROW,
    ),
    "swiglu": both(
        lambda x: tridrop.activation_dropout(x, 0.1, activation="swiglu", seed=seed), WIDE
    ),
    "layer norm": both(norm(tridrop.dropout_add_layer_norm), SHAPE, SHAPE, ROW, ROW),
    "rms norm": both(norm(tridrop.dropout_add_rms_norm), SHAPE, SHAPE, ROW, ROW),
    "norm first": both(norm(tridrop.layer_norm_dropout), SHAPE, SHAPE, ROW, ROW),
    "softmax": both(lambda s: tridrop.softmax_dropout(s, 0.1, is_causal=True, seed=seed), SCORES),
    "attention": both(
        lambda q, k, v: tridrop.scaled_dot_product_attention(q, k, v, dropout_p=0.1, seed=seed),
        HEADS, HEADS, HEADS,
    ),
    "lora": both(
        lambda x, a, b: tridrop.lora_delta(x, a, b, 0.1, seed=seed), SHAPE, (4, 1024), (64, 4)
    ),
    "alpha": both(lambda x: tridrop.alpha_dropout(x, 0.1, True, seed=seed), SHAPE),
    "heads": both(lambda x: tridrop.head_dropout(x, 0.5, rescale="kept", seed=seed), SCORES),
    "keep mask": lambda: [tridrop.keep_mask(seed, SHAPE, 0.1)],
    "attention's mask": lambda: [tridrop.attention_keep_mask(seed, SCORES, 0.1)],
    "noise": lambda: [tridrop.normal_noise(seed, (64, 1024))],
}  # fmt: skip


class Alarm(BaseException):
    """What the signal's handler raises."""


left = 0  # how many interrupts may still come


def on_alarm(*_: Any) -> None:
    global left
    if left > 0:
        left -= 1
        raise Alarm


def canaries(sizes: list[int]) -> list[Tensor]:
    return [torch.full((n,), PATTERN, dtype=torch.uint8) for n in sizes for _ in range(2)]


def by_signal(run: Callable[[], Any], delay: float, burst: int) -> bool:
    """Whether the op came to its end. Further interrupts come every 30 us."""
    global left
    try:
        left = burst
        signal.setitimer(signal.ITIMER_REAL, delay, 3e-5 if burst > 1 else 0)
        run()
        return True
    finally:
        left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)


def by_thread(run: Callable[[], Any], delay: float) -> bool:
    """The same by KeyboardInterrupt."""
    done = False

    def interrupt() -> None:
        time.sleep(delay)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        run()
        done = True
    finally:
        while thread.is_alive():
            thread.join()
    return done


def main(count: int, number: int) -> None:
    rng = random.Random(number)
    signal.signal(signal.SIGALRM, on_alarm)
    expected, took = {}, {}
    for name, run in OPS.items():
        expected[name] = run()
        begin = time.perf_counter()
        run()
        took[name] = time.perf_counter() - begin
    interrupted = 0
    for i in range(count):
        name = list(OPS)[i % len(OPS)]
        run, ended, sizes = OPS[name], False, [t.nbytes for t in expected[name]]
        delay = max(1e-6, rng.uniform(0, took[name]))
        try:
            if i % 5 == 4:
                ended = by_thread(run, delay)
            else:
                ended = by_signal(run, delay, rng.choice((1, 1, LONGEST, 2 * LONGEST)))
        except (Alarm, KeyboardInterrupt):
            pass
        guards = canaries(sizes)
        interrupted += not ended
        if not ended:
            time.sleep(rng.choice((0, 2e-4, 2e-3)))
        if any(bool((guard != PATTERN).any()) for guard in guards):
            sys.exit(f"{name}, interrupt {i}: a canary was overwritten")
        if i % 50 < len(OPS) and i % len(OPS) == i % 50:
            for found, wanted in zip(run(), expected[name], strict=True):
                if not torch.equal(found, wanted):
                    sys.exit(f"{name}, after interrupt {i}: another result")
    print("interrupted", interrupted, "of", count)


if __name__ == "__main__":
    if sys.argv[3:] == ["own"]:
        threads._parallel = 0
    main(int(sys.argv[1]) if sys.argv[1:] else 20000, int(sys.argv[2]) if sys.argv[2:] else 1)
