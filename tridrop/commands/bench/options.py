"""The options of ``tridrop bench``: what is timed, and the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..inspection import DTYPES, choose
from .providers import PROVIDERS
from .rows import ATTENTION, OPS, Attention, Row, parse_size, table
from .timing import MODES


@dataclass(frozen=True)
class Defaults:
    """The defaults of a device: sizes by importance, the largest well beyond its caches."""

    dtypes: tuple[str, ...]
    sizes: tuple[str, ...]
    tokens: int
    width: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    rounds: int
    seconds: float


# (device, quick)
DEFAULTS = {
    ("cuda", False): Defaults(
        ("bf16",), ("8192x4096", "16384x4096", "1024x1024", "4096x4096", "64x64"),
        16384, 2048, (4096, 1024, 16384, 512, 2048, 8192), (64, 128), 30, 5.0,
    ),
    ("cuda", True): Defaults(
        ("bf16",), ("8192x4096", "1024x1024"), 16384, 2048, (4096, 512), (64,), 10, 3.0
    ),
    ("cpu", False): Defaults(
        ("fp32", "bf16"), ("8192x1024", "1024x1024", "64x64"), 1024, 256, (256, 1024), (64,), 15,
        30.0,
    ),
    ("cpu", True): Defaults(("fp32",), ("1024x1024",), 512, 128, (256,), (64,), 5, 5.0),
}  # fmt: skip


# The ops that --quick times if none is named: those of a transformer block.
QUICK_OPS = (
    "activation_dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "scaled_dot_product_attention",
)


@dataclass(frozen=True)
class Options:
    """What is timed. :meth:`of` checks the given options and adds the defaults."""

    device: str
    dtypes: Sequence[str]
    modes: Sequence[str]
    providers: Sequence[str]
    rows: Sequence[Row]
    p: float
    rounds: int
    seconds: float
    packed: Sequence[tuple[int, int, int]]
    """(longest, heads, head dimension) of packed sequences, which are compared with padded ones"""

    @staticmethod
    def of(
        device: str,
        *,
        ops: Sequence[str] | None = None,
        dtypes: Sequence[str] | None = None,
        sizes: Sequence[str] | None = None,
        lengths: Sequence[int] | None = None,
        head_dims: Sequence[int] | None = None,
        modes: Sequence[str] | None = None,
        providers: Sequence[str] | None = None,
        p: float = 0.1,
        rounds: int | None = None,
        quick: bool = False,
        all_rows: bool = False,
    ) -> Options:
        """The options of a device; None stands for its defaults.

        Args:
            device: "cuda" or "cpu".
            ops: names of public functions. ["all"] means all; so does None, unless ``quick``.
            dtypes: some of bf16, fp16 and fp32.
            sizes: ROWSxCOLS, for all ops except attention.
            lengths: sequence lengths of attention; the number of tokens stays the same.
            head_dims: head dimensions of attention; the number of features stays the same.
            modes: some of forward, backward and both.
            providers: None for all.
            p: the probability of dropping; 0 is timed as well, for comparison.
            rounds: the number of rounds.
            quick: fewer ops and sizes, and one row per op.
            all_rows: time every row of the table of cases that can have other sizes.

        Raises:
            ValueError: a name is unknown, or a value is not allowed.
        """
        if device not in ("cuda", "cpu"):
            raise ValueError(f"device {device!r} is not known; known: cuda, cpu")
        default = DEFAULTS[device, quick]
        if not 0 < p < 1:
            raise ValueError(f"p = {p}: give one between 0 and 1; p = 0 is timed as well")
        rounds = default.rounds if rounds is None else rounds
        if rounds < 1:
            raise ValueError(f"rounds = {rounds}: give 1 or more")
        if ops is None and quick:
            ops = QUICK_OPS
        wanted = choose("op", None if list(ops or ()) == ["all"] else ops, OPS)
        named = choose("provider", providers, PROVIDERS)
        attention = Attention(
            default.tokens, default.width, lengths or default.lengths,
            head_dims or default.head_dims,
        )  # fmt: skip
        return Options(
            device=device,
            dtypes=choose("dtype", dtypes or default.dtypes, tuple(DTYPES)),
            modes=choose("mode", modes, MODES),
            providers=named,
            rows=table(
                wanted,
                [parse_size(text) for text in sizes or default.sizes],
                attention,
                every=all_rows,
                first=quick and not all_rows,
            ),
            p=p,
            rounds=rounds,
            seconds=default.seconds,
            packed=_packed(attention) if ATTENTION in wanted and not quick else [],
        )


def _packed(attention: Attention) -> list[tuple[int, int, int]]:
    """Packed sequences of up to a quarter of the tokens, for every head dimension."""
    longest = max(1, attention.tokens // 4)
    return [(longest, attention.width // dim, dim) for dim in attention.head_dims]
