"""Calls whose tensors lose their memory, or are exchanged, on the way into an op or its backward.

A process of its own, since what these calls ask for ends one that believes the shapes:

    python tests/memory_probes.py [a part of the probes' names] [each which of them]

It says each probe before it runs it, and after it what became of it where that is wrong: an outcome
is right if it is a ValueError or a TypeError, or what the op gives without the change.
"""

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import tridrop
from tridrop.functional import known

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Any]
ROWS, COLUMNS = 24, 64


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def elementwise(**options: Any) -> tuple[Callable[[], Tensors], Call]:
    gated = options.get("activation") in ("swiglu", "geglu")

    def make() -> Tensors:
        width = 2 * COLUMNS if gated else COLUMNS
        return {
            "x": numbers(ROWS, width),
            "residual": numbers(ROWS, COLUMNS),
            "bias": numbers(width, dtype=torch.bfloat16),
            "layer_scale": numbers(COLUMNS),
        }

    return make, lambda t: tridrop.dropout_add(**t, **options)


def norm(op: Callable[..., Any], **options: Any) -> tuple[Callable[[], Tensors], Call]:
    names = [] if op in (tridrop.layer_norm_dropout, tridrop.rms_norm_dropout) else ["bias"]
    names += ["layer_scale"] if names else []
    names += [] if op is tridrop.rms_norm_dropout else ["norm_bias"]

    def make() -> Tensors:
        matrices: Tensors = {"x": numbers(ROWS, COLUMNS), "residual": numbers(ROWS, COLUMNS)}
        vectors: Tensors = {name: numbers(COLUMNS) for name in ("weight", *names)}
        return {**matrices, **vectors}

    return make, lambda t: op(**t, **options)


def of_x(op: Callable[..., Any], *shape: int, **options: Any) -> tuple[Callable[[], Tensors], Call]:
    return lambda: {"x": numbers(*shape)}, lambda t: op(t["x"], seed=t["seed"], **options)


def scores(**options: Any) -> tuple[Callable[[], Tensors], Call]:
    def make() -> Tensors:
        return {"scores": numbers(2, 4, 16, 32), "mask": numbers(1, 1, 16, 32)}

    return make, lambda t: tridrop.softmax_dropout(
        t["scores"], mask=t["mask"], seed=t["seed"], **options
    )


def attention(**options: Any) -> tuple[Callable[[], Tensors], Call]:
    def make() -> Tensors:
        names = ("query", "key", "value")
        return {name: numbers(2, 4, 16, 8) for name in names} | {"attn_mask": numbers(2, 1, 16, 16)}

    return make, lambda t: tridrop.scaled_dot_product_attention(**t, **options)


def lora() -> tuple[Callable[[], Tensors], Call]:
    def make() -> Tensors:
        return {"x": numbers(ROWS, COLUMNS), "A": numbers(4, COLUMNS), "B": numbers(16, 4)}

    return make, lambda t: tridrop.lora_delta(**t, p=0.25)


def dropconnect() -> tuple[Callable[[], Tensors], Call]:
    x = torch.ones(ROWS, COLUMNS)  # torch's own product takes it
    return lambda: {"weight": numbers(16, COLUMNS)}, lambda t: tridrop.dropconnect_linear(
        x, **t, p=0.25
    )


# Weights that torch's own products take and save: what hooks give these back is torch's business.
TORCHS: list[Tensor] = []


def weight_of(rows: int) -> Tensor:
    TORCHS.append(numbers(rows, COLUMNS))
    return TORCHS[-1]


def remade_linear(activation: str) -> tuple[Callable[[], Tensors], Call]:
    weight = weight_of(16)

    def make() -> Tensors:
        width = 2 * COLUMNS if activation == "swiglu" else COLUMNS
        return {"x": numbers(ROWS, width), "bias": numbers(width)}

    return make, lambda t: tridrop.activation_dropout_linear(
        t["x"], weight, p=0.25, activation=activation, bias=t["bias"], seed=t["seed"]
    )


def remade_norm() -> tuple[Callable[[], Tensors], Call]:
    """With an RMSNorm: the LayerNorm of such a call is torch's own operator."""
    weights = weight_of(16), weight_of(8)
    return lambda: {
        "x": numbers(ROWS, COLUMNS),
        "weight": numbers(COLUMNS),
    }, lambda t: tridrop.norm_linear(t["x"], weights, norm="rms_norm", weight=t["weight"])


def mask_of(op: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Tensors], Call]:
    return dict, lambda t: op(t["seed"], *arguments)


# name -> (what makes the tensors but the seed, the call). Torch's own operators save tensors, too,
# in those of _MIXED: what hooks give these back is torch's business.
CALLS: dict[str, tuple[Callable[[], Tensors], Call]] = {
    "dropout": of_x(tridrop.dropout, ROWS, COLUMNS, p=0.25),
    "dropout, of rows": of_x(tridrop.dropout, ROWS, COLUMNS, p=0.25, noise_shape=(ROWS, 1)),
    "gelu": of_x(tridrop.activation_dropout, ROWS, COLUMNS, p=0.25, activation="gelu"),
    "swiglu": of_x(tridrop.activation_dropout, ROWS, COLUMNS, p=0.25, activation="swiglu"),
    "gelu alone": of_x(tridrop.activation_dropout, ROWS, COLUMNS, p=0.0, activation="gelu"),
    "silu, add": elementwise(activation="silu", p=0.25),
    "geglu, add": elementwise(activation="geglu", p=0.25, drop_path=0.25),
    "add alone": elementwise(p=0.0),
    "gaussian": of_x(tridrop.gaussian_dropout, ROWS, COLUMNS, p=0.25),
    "alpha": of_x(tridrop.alpha_dropout, ROWS, COLUMNS, p=0.25, training=True),
    "layer norm": norm(tridrop.dropout_add_layer_norm, p=0.25, prenorm=True),
    "rms norm": norm(tridrop.dropout_add_rms_norm, p=0.25, residual_in_fp32=True),
    "layer norm alone": norm(tridrop.dropout_add_layer_norm, p=0.0),
    "layer norm first": norm(tridrop.layer_norm_dropout, p=0.25),
    "rms norm first": norm(tridrop.rms_norm_dropout, p=0.25),
    "softmax": scores(p=0.25, return_softmax=True),
    "softmax, causal": of_x(tridrop.softmax_dropout, 2, 4, 16, 16, p=0.25, is_causal=True),
    "attention": attention(dropout_p=0.25, return_lse=True),
    "attention alone": attention(is_causal=False),
    "lora": lora(),
    "dropconnect": dropconnect(),
    "gelu, linear": remade_linear("gelu"),
    "swiglu, linear": remade_linear("swiglu"),
    "rms norm, linear": remade_norm(),
    "locked": of_x(tridrop.locked_dropout, 7, ROWS, COLUMNS, p=0.25),
    "drop block": of_x(tridrop.drop_block2d, 2, 3, 16, 16, p=0.25, block_size=3),
    "heads": of_x(tridrop.head_dropout, 2, 4, 16, 8, p=0.25, rescale="kept"),
    "keep mask": mask_of(tridrop.keep_mask, (ROWS, COLUMNS), 0.25),
    "attention's mask": mask_of(tridrop.attention_keep_mask, (1, 2, 16, 32), 0.25),
    "normal noise": mask_of(tridrop.normal_noise, (ROWS, COLUMNS)),
    "kept indices": mask_of(tridrop.kept_indices, (2, 16), 3),
}
_MIXED = ("lora", "dropconnect")


def tensors_of(name: str) -> Tensors:
    torch.manual_seed(1)
    found = CALLS[name][0]()
    return {**found, "seed": torch.tensor([3, 1 << 40])}


def results_of(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


def gradients_of(outs: list[Tensor], tensors: Tensors, grads: list[Tensor] | None = None) -> Any:
    outs = [t for t in outs if t.requires_grad]
    wanted = [t for t in tensors.values() if t.requires_grad]
    if not outs:
        return []
    given = [torch.ones_like(t) for t in outs] if grads is None else grads
    return list(torch.autograd.grad(outs, wanted, given, allow_unused=True))


# ----------------------------------------------------------------------------------- changes


def freed(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


def short(t: Tensor) -> None:
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)


def behind(t: Tensor) -> None:
    """Freed, where its address is not 0."""
    room = torch.empty(t.numel() + 16, dtype=t.dtype)
    t.data = room[16:].view(t.shape)
    freed(t)


def replaced(with_: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def change(t: Tensor) -> None:
        t.data = with_(t.detach())

    return change


def spread(t: Tensor) -> Tensor:
    """The same numbers, with others in between."""
    room = t.new_empty((*t.shape, 3))
    room[..., 1] = t
    return room[..., 1]


def without_memory(t: Tensor) -> Tensor:
    made = t.clone()
    freed(made)
    return made


def spread_without_memory(t: Tensor) -> Tensor:
    made = spread(t)
    short(made)
    return made


LOST = {"freed": freed, "short": short, "freed view": behind}
EXCHANGED = {
    "fewer": lambda t: t[: max(1, len(t) // 2)].clone() if t.dim() else t.clone(),
    "flat": lambda t: t.flatten()[None, :].clone(),
    "wider": lambda t: t.double() if t.is_floating_point() else t.to(torch.int32),
    "half": lambda t: t.to(torch.bfloat16 if t.is_floating_point() else torch.int16),
    "longer": lambda t: torch.cat((t, t)) if t.dim() else t.clone(),
}
# What hooks on saved tensors can give besides.
GIVEN = {
    **EXCHANGED,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "freed": without_memory,
    "freed, spread": spread_without_memory,
}
SAME = {
    "spread": spread,
    "negated": lambda t: (-t)._neg_view(),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}

# ------------------------------------------------------------------------------------ probes


class Wrong(Exception):
    """An outcome that is none of the right ones."""


def near(found: Tensor, expected: Tensor) -> bool:
    """Whether only roundings differ, which in a sum are relative to what is added."""
    largest = max(1.0, float(expected.detach().double().abs().max()))
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * largest)


def same(found: Any, expected: Any, exact: bool = True) -> None:
    for f, e in zip(found, expected, strict=True):
        if (f is None) != (e is None):
            raise Wrong("a gradient more, or less")
        if e is None:
            continue
        if f.shape != e.shape or f.dtype != e.dtype or f.isnan().any():
            raise Wrong("another kind of result, and no exception")
        if not (torch.equal(f, e) if exact else near(f, e)):
            raise Wrong("another result, and no exception")


def learned(name: str, again: bool) -> None:
    """The calls that are known: none, or this one."""
    known._known.clear()
    if again:
        CALLS[name][1](tensors_of(name))


@cache
def plain(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and the gradients, of the call as it should be."""
    tensors = tensors_of(name)
    out = results_of(CALLS[name][1](tensors))
    return out, gradients_of(out, tensors)


def forward(name: str, key: str, change: Callable[[Tensor], None], exact: bool = True) -> None:
    tensors = tensors_of(name)
    expected = plain(name)[0]
    change(tensors[key])
    same(results_of(CALLS[name][1](tensors)), expected, exact)  # where it is not looked at


def zeros(name: str, key: str) -> None:
    """A tensor of zeros that has no memory."""
    tensors, expected = tensors_of(name), tensors_of(name)
    shape, dtype = tensors[key].shape, tensors[key].dtype
    tensors[key] = torch._efficientzerotensor(shape, dtype=dtype)
    expected[key] = torch.zeros(shape, dtype=dtype)
    out, wanted = (results_of(CALLS[name][1](t)) for t in (tensors, expected))
    same(out, wanted)
    same(gradients_of(out, tensors), gradients_of(wanted, expected))


def between(name: str, key: str, change: Callable[[Tensor], None]) -> None:
    """A tensor that is changed between forward and backward."""
    expected = plain(name)[1]
    tensors = tensors_of(name)
    out = results_of(CALLS[name][1](tensors))
    before = tensors[key].dtype
    change(tensors[key])
    found = gradients_of(out, tensors)
    if tensors[key].dtype != before and key != "seed":
        # torch takes it for another leaf then, of which the graph knows nothing.
        at = [n for n, t in tensors.items() if t.requires_grad].index(key)
        found[at] = expected[at]
    same(found, expected)


def is_torchs(t: Tensor) -> bool:
    return any(t.data_ptr() == weight.data_ptr() for weight in TORCHS)


def hooked(name: str, number: int, give: Callable[[Tensor], Tensor]) -> None:
    expected = plain(name)[1]
    tensors, count = tensors_of(name), iter(range(100))

    def pack(t: Tensor) -> tuple[int, Tensor]:
        return -1 if is_torchs(t) else next(count), t

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        at, t = packed
        return give(t.detach()) if at == number else t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = results_of(CALLS[name][1](tensors))
    # Steps that torch takes in other loops for other strides, or for a seed of another class.
    same(gradients_of(out, tensors), expected, exact=give not in SAME.values())


def saved_by(name: str) -> int:
    count = []
    tensors = tensors_of(name)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: count.append(t) or t, lambda t: t):
        CALLS[name][1](tensors)
    return sum(not is_torchs(t) for t in count)


def incoming(name: str, change: str) -> None:
    """A gradient from outside; torch itself sees to its shape, dtype and device."""
    tensors = tensors_of(name)
    out = [t for t in results_of(CALLS[name][1](tensors)) if t.requires_grad]
    if change == "zeros":
        grads = [torch._efficientzerotensor(t.shape, dtype=t.dtype) for t in out]
        expected = gradients_of(out, tensors, [torch.zeros_like(t) for t in out])
        out = [t for t in results_of(CALLS[name][1](tensors)) if t.requires_grad]
        same(gradients_of(out, tensors, grads), expected)
        return
    grads = [torch.ones_like(t) for t in out]
    LOST[change](grads[0])
    gradients_of(out, tensors, grads)
    raise Wrong("no exception")


def probes() -> Iterator[tuple[str, Callable[[], None]]]:
    for name in CALLS:
        keys = tensors_of(name)
        for again in (False, True):
            road = f"{name}, {'again' if again else 'first'}"

            def probe(
                function: Callable[..., None], *rest: Any, name: str = name, again: bool = again
            ) -> Callable[[], None]:
                def run() -> None:
                    learned(name, again)
                    function(name, *rest)

                return run

            for key in keys:
                for kind, change in LOST.items():
                    yield f"{road}: {key} {kind} before", probe(forward, key, change)
                    yield f"{road}: {key} {kind} between", probe(between, key, change)
                # Torch takes other steps, with other last bits, for other strides.
                yield f"{road}: {key} spread before", probe(forward, key, replaced(spread), False)
                if key != "seed":
                    yield f"{road}: {key} zeros", probe(zeros, key)
                for kind, give in EXCHANGED.items():
                    yield f"{road}: {key} {kind} between", probe(between, key, replaced(give))
            if not results_of(CALLS[name][1](tensors_of(name)))[0].requires_grad:
                continue
            for change in (*LOST, "zeros") if not name.endswith("linear") else ():
                yield f"{road}: gradient {change}", probe(incoming, change)
            for number in range(saved_by(name)):
                if name in _MIXED:
                    break
                for kind, give in {**GIVEN, **SAME}.items():
                    yield f"{road}: saved {number} {kind}", probe(hooked, number, give)


def report(name: str, error: BaseException, part: str) -> None:
    print("WRONG", name, type(error).__name__, str(error).split("\n")[0][:200], flush=True)
    if part:
        traceback.print_exc()


def main(part: str = "", every: str = "1") -> None:
    warnings.simplefilter("ignore")
    count = wrong = 0
    chosen = (probe for probe in probes() if part in probe[0])
    for name, run in islice(chosen, 0, None, int(every)):
        print("probe", name, flush=True)
        count += 1
        try:
            run()
        except (ValueError, TypeError):
            pass
        except RuntimeError as error:
            if not name.startswith(_MIXED) or (
                "storage" not in str(error) and "mat1" not in str(error)
            ):
                wrong += 1
                report(name, error, part)
        except BaseException as error:
            wrong += 1
            report(name, error, part)
    gc.collect()
    print("done", count, wrong, flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        import quick_interpreter  # noqa: F401
    main(*sys.argv[1:])
