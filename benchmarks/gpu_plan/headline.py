"""The rows that are timed first on a GPU, and the times expected before any run.

The expectations are computed from what `tridrop inspect` counts in the machine code for an H100
(benchmarks/results/inspect-2026-11-27.json; for dK/dV at D = 64, which changed later,
inspect-2026-11-29.json), with factors that nobody has measured. They stay as they are after a
measurement: a prediction that is corrected afterwards is no prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Lengths of attention: the first is part of the headline, the second runs if time is left.
LENGTHS, WIDTHS = (4096, 16384), (64, 128)
TOKENS, FEATURES = 16384, 2048  # as in tridrop bench on cuda
MEMORY_OPS = ("dropout_add", "dropout_add_layer_norm", "dropout_add_rms_norm")
MEMORY_SIZE = "8192x4096"
PROVIDERS: Mapping[str, Sequence[str]] = {
    "attention": ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "tridrop"),
    "memory": ("eager", "tridrop"),
    "steps": ("eager", "tridrop"),
}
P = 0.1
FORWARD, BACKWARD = "forward", "backward"

# Picoseconds per score on an H100 at its boost clock: the time of the tensor cores, and that of the
# instructions around them (the larger of issue slots and special functions) without dropout and
# with it. From the inspect record, bf16, sm_90.
_SCORE = {
    ("forward", 64): (0.259, 0.247, 0.431),
    ("forward", 128): (0.517, 0.247, 0.471),
    ("dquery", 64): (0.388, 0.239, 0.447),
    ("dquery", 128): (0.776, 0.266, 0.488),
    ("dkey", 64): (0.517, 0.359, 0.620),
    ("dkey", 128): (1.030, 0.426, 0.704),
}
# The products and the rest follow each other within a warp group and overlap little between two, so
# their sum is taken. The factor adds loads that two stages do not hide (about 1.25), and a clock
# below the boost clock under load (about 1.16).
_LOSS = 1.45
# The last programs of causal attention run alone.
_TAIL = 1.1
# Blocks on the diagonal are computed whole.
_BLOCK = 128
COPY_TB_S = 3.0  # a device copy's speed, 0.9 of an H100's 3.35 TB/s

# Bytes per element (as the bench counts them), and the share of a copy's speed at p = 0.1 and at 0.
# Forward of dropout_add issues for 0.44 ps per element and moves memory for 1.8 ps, which hides it.
# Backward with sums over rows has few programs and partial sums; a norm's also keeps a row in
# registers.
_MEMORY: dict[tuple[str, str], tuple[float, float, float | None]] = {
    ("dropout_add: plain", FORWARD): (6.0, 0.95, 0.96),
    ("dropout_add: plain", BACKWARD): (4.0, 0.95, None),
    ("dropout_add: bias", FORWARD): (6.03, 0.95, 0.96),
    ("dropout_add: bias", BACKWARD): (4.03, 0.90, 0.91),
    ("dropout_add: bias, layer_scale, drop_path", FORWARD): (6.06, 0.92, 0.94),
    ("dropout_add: bias, layer_scale, drop_path", BACKWARD): (6.13, 0.82, 0.85),
    ("dropout_add_layer_norm: weight, norm_bias, bias", FORWARD): (8.1, 0.92, 0.94),
    ("dropout_add_layer_norm: weight, norm_bias, bias", BACKWARD): (8.13, 0.80, 0.82),
    ("dropout_add_layer_norm: weight, norm_bias, prenorm, float32 stream", FORWARD): (
        12.06, 0.93, 0.94),
    ("dropout_add_layer_norm: weight, norm_bias, prenorm, float32 stream", BACKWARD): (
        16.1, 0.84, 0.86),
    ("dropout_add_rms_norm: weight, bias", FORWARD): (8.06, 0.93, 0.95),
    ("dropout_add_rms_norm: weight, bias", BACKWARD): (8.1, 0.81, 0.83),
    ("dropout_add_rms_norm: weight, prenorm, float32 stream", FORWARD): (12.03, 0.94, 0.95),
    ("dropout_add_rms_norm: weight, prenorm, float32 stream", BACKWARD): (16.06, 0.85, 0.87),
}  # fmt: skip
# Milliseconds of a step of GPT-2 small, 8 x 1024 tokens, bf16 by autocast, at p = 0.1 and at 0:
# 6.6 TFLOP of products at 330 TFLOP/s are 20; some 55 passes per layer over 8192 x 768 in bf16 and
# fp32, forward and backward, 13; logits in fp32, six passes over 1.65 GB, 4; AdamW and casts 4.
# Eager dropout adds 37 masks, each written once and read twice, and attention's own.
_STEPS = {"eager": (47.0, 42.0), "tridrop": (44.0, 42.0)}


@dataclass(frozen=True)
class Expectation:
    """The time expected of a row; ``rate`` is in TFLOP/s, or a share of a copy's speed."""

    case: str
    shape: str
    mode: str
    provider: str
    ms: float
    rate: float | None
    price: float | None
    """the cost of dropout: the time at p divided by the time at 0, minus 1"""

    @property
    def key(self) -> tuple[str, ...]:
        return (self.case, self.shape, self.mode, self.provider)


def _attention_ms(mode: str, length: int, width: int, causal: bool, drops: bool) -> float:
    def score(kernel: str) -> float:
        tensor, free, dropping = _SCORE[kernel, width]
        return tensor + (dropping if drops else free)

    ps = score("forward") if mode == FORWARD else score("dquery") + score("dkey")
    scores = TOKENS * (FEATURES // width) * length
    if causal:
        scores, ps = scores / 2 * (1 + _BLOCK / length), ps * _TAIL
    return scores * ps * _LOSS * 1e-9


def _attention() -> Iterator[Expectation]:
    for length in LENGTHS:
        for width in WIDTHS:
            for causal in (False, True):
                for mode, work in ((FORWARD, 1.0), (BACKWARD, 2.5)):
                    ms, free = (
                        _attention_ms(mode, length, width, causal, drops) for drops in (True, False)
                    )
                    flops = work * 4 * TOKENS * FEATURES * length / (2 if causal else 1)
                    shape = (TOKENS // length, FEATURES // width, length, width)
                    yield Expectation(
                        f"scaled_dot_product_attention: {'causal' if causal else 'plain'}",
                        "x".join(map(str, shape)), mode, "tridrop", ms, flops / ms / 1e9,
                        ms / free - 1,
                    )  # fmt: skip


def _memory() -> Iterator[Expectation]:
    rows, columns = map(int, MEMORY_SIZE.split("x"))
    for (case, mode), (width, share, free) in _MEMORY.items():
        ms = rows * columns * width / (COPY_TB_S * 1e12 * share) * 1e3
        shape = f"8x{rows // 8}x{columns}"
        price = None if free is None else free / share - 1
        yield Expectation(case, shape, mode, "tridrop", ms, share, price)


def _steps() -> Iterator[Expectation]:
    for provider, (ms, free) in _STEPS.items():
        yield Expectation("step of GPT-2 small", "8x1024", "step", provider, ms, None,
                          ms / free - 1)  # fmt: skip


def expectations() -> list[Expectation]:
    """Every headline row at p = 0.1, in bf16, on an H100."""
    return [*_attention(), *_memory(), *_steps()]


# What was measured, beside the expectations.

HEADINGS = (
    "row, bf16, p = 0.1", "shape", "mode", "expected ms", "TFLOP/s, or of a copy",
    "cost of dropout", "measured ms", "TFLOP/s, or of a copy", "cost of dropout",
)  # fmt: skip
Records = Sequence[Mapping[str, Any]]


def measured(records: Records) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """The records that belong to an expectation, by its key; a later one replaces an earlier.

    Records without a time are left out.
    """
    found: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for r in records:
        if r["p"] != P or r["dtype"] != "bf16" or not r.get("median_ms"):
            continue
        if "model" in r:
            if r["model"] == "gpt2":
                shape = f"{r['batch']}x{r['length']}"
                found["step of GPT-2 small", shape, "step", r["provider"]] = r
        else:
            found[r["case"], r["shape"], r["mode"], r["provider"]] = r
    return found


def table(records: Records) -> list[str]:
    """The expectations and the measurements, as lines of a Markdown table."""
    found = measured(records)
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for e in expectations():
        r = found.get(e.key, {})
        case = e.case if e.provider == "tridrop" else f"{e.case}, {e.provider}"
        attention = "attention" in e.case
        cells = [case, e.shape, e.mode, f"{e.ms:.3g}", _rate(e.rate, attention), _price(e.price)]
        if r.get("check", "") not in ("", "passed"):
            cells += ["its check failed", "", ""]
        else:
            ms, rate = r.get("median_ms"), r.get("tflops" if attention else "copy_fraction")
            cells += [f"{ms:.3g}" if ms else "", _rate(rate, attention)]
            cells.append(_price(r.get("dropout_cost")))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rate(value: float | None, attention: bool) -> str:
    return "" if value is None else f"{value:.0f}" if attention else f"{value:.2f}"


def _price(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def between(text: str, name: str, lines: Sequence[str]) -> str:
    """``text`` with ``lines`` between the two comments that mark the place ``name``.

    Raises ValueError if the text has no such place.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"there is no place between {begin} and {end}")
    return f"{head}{begin}\n" + "".join(f"{line}\n" for line in lines) + f"{end}{tail}"
