"""A call is a function of a seed and its number: its target, its arguments, and what is odd."""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import tridrop

from . import values
from .outcomes import Outcome, flat, of_error
from .right import Plan, right
from .targets import Parameter, Target


def odd_tensor(t: Tensor, chooser: random.Random) -> tuple[str, Any]:
    """(what is odd, the value) in the place of a right tensor."""
    share = chooser.random()
    if share < 0.35 and t.is_floating_point():
        table: Any = values.NUMBERS
    elif share < 0.55:
        table = values.LAYOUTS
    elif share < 0.9:
        table = values.WRONG
    else:
        return odd_value(chooser)
    name = chooser.choice(list(table))
    try:
        return name, table[name](t)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # not of every dtype
        return f"not {name}", t


def odd_value(chooser: random.Random) -> tuple[str, Any]:
    value = chooser.choice(values.SCALARS)()
    return f"{value!r}"[:60].replace("\n", " "), value


def odd(value: Any, chooser: random.Random) -> tuple[str, Any]:
    if isinstance(value, Tensor):
        return odd_tensor(value, chooser)
    if isinstance(value, (list, tuple)) and value and chooser.random() < 0.6:
        number = chooser.randrange(len(value))
        what, part = odd(value[number], chooser)
        return f"[{number}] {what}", type(value)([*value[:number], part, *value[number + 1 :]])
    if value is None and chooser.random() < 0.3:
        return odd_tensor(torch.randn(chooser.choice([(16,), (2, 16), (2, 5, 8)])), chooser)
    return odd_value(chooser)


class Call:
    """The call of a number. Each :meth:`run` makes the arguments anew, the same ones."""

    def __init__(self, target: Target, seed: int, number: int, oddities: int | None = None) -> None:
        self.target, self.key = target, f"{seed}:{number}:{target.name}"
        self.oddities, self.what = oddities, ""
        self.narrow = False  # whether bfloat16 is among the arguments
        self.right: list[dict[str, Any]] = []
        self.odd: list[tuple[int, str, Any]] = []

    @property
    def is_attention(self) -> bool:
        """Whether torch has a function of its own for such calls: see :func:`torchs_attention`."""
        return self.target.name == "scaled_dot_product_attention"

    def run(self, way: str) -> Outcome:
        """The outcome with CPU tensors served by a backend: results, then gradients.

        The way "torch" is torch's own attention.
        """
        chooser = random.Random(self.key)
        torch.manual_seed(chooser.randrange(1 << 30))
        with _served_by(way), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function = torchs_attention if way == "torch" else self.target.function
                return Outcome("ok", results=self._run(chooser, function))
            except Exception as error:
                found, kind = of_error(error), type(error)
        if found.kind == "another error of ours" and self._torch_raises(kind):
            found.kind = "as torch's module"
        return found

    def _arguments(self, chooser: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the function, or of the constructor and the forward."""
        target = self.target
        plan = Plan.of(target.name, chooser, target.forward is not None)
        given: list[dict[str, Any]] = []
        # Both modules of a comparison get the same values, whatever else they draw.
        for wanted, of in ((target.parameters, ""), (target.forward or (), ".forward")):
            given.append(
                {
                    p.name: right(plan, p.name, p.annotation, of)
                    for p in wanted
                    if _is_given(p, chooser)
                }
            )
        places = [(group, name) for group in given for name in group]
        count = chooser.choices((0, 1, 2, 3), (1, 6, 2, 1))[0]
        count = count if self.oddities is None else self.oddities
        notes = []
        self.right, self.odd = [dict(group) for group in given], []
        # Data are more often odd than options: there is more that may be odd.
        weights = [3 if isinstance(group[name], Tensor) else 1 for group, name in places]
        for group, name in chooser.choices(places, weights, k=count) if places else ():
            what, group[name] = odd(group[name], chooser)
            self.odd.append((0 if group is given[0] else 1, name, group[name]))
            notes.append(f"{name}: {what}")
        self.narrow = any(
            isinstance(t, Tensor) and t.dtype == torch.bfloat16
            for group in given
            for t in flat(list(group.values()))
        )
        self.what = f"{target.name}({'; '.join(notes) or 'nothing odd'})"
        return given[0], given[1]

    def _run(self, chooser: random.Random, function: Callable[..., Any]) -> list[Any]:
        own, further = self._arguments(chooser)
        grads, go = chooser.random() < 0.7, random.Random(chooser.random())
        leaves = _leaves([own, further]) if grads else []
        torch.manual_seed(11)
        if self.target.forward is not None:
            module = function(**own)
            if isinstance(module, nn.Module):
                module.train(chooser.random() < 0.8)
                leaves += [p for p in module.parameters() if grads and p.requires_grad]
            function, own = module, further
        given = list(own.values())
        with contextlib.ExitStack() as stack:
            if not grads:
                stack.enter_context(torch.no_grad())
            made = function(**own)
            if isinstance(made, AbstractContextManager) and not isinstance(
                made, (Tensor, nn.Module)
            ):
                made = stack.enter_context(made)
            results = list(flat(made))
        del given
        return [*results, *_gradients(results, leaves, go)]

    def _torch_raises(self, kind: type[Exception]) -> bool:
        """Whether torch's own module raises this class of error for the same arguments, or for one
        of those that are odd."""
        chooser = random.Random(self.key)
        torch.manual_seed(chooser.randrange(1 << 30))
        own, further = self._arguments(chooser)
        wrapped = own.get("rnn", own.get("cell"))
        tried = [(own, further)]
        for group, name, value in self.odd:
            alone = [dict(arguments) for arguments in self.right]
            alone[group][name] = value
            tried.append((alone[0], alone[1]))
        # torch's checks of shapes assert here, and there a transpose or a product fails.
        alike = (AssertionError, RuntimeError, IndexError)
        kinds = alike if kind in alike else (kind,)
        for first, second in tried:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    if self.target.twin is not None:
                        self.target.twin(**_taken(self.target.twin, first))(**second)
                    elif isinstance(wrapped, nn.Module):
                        wrapped(**second)
                except kinds:
                    return True
                except Exception:
                    continue
        return False


def torchs_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_mask: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """The same by torch's own function; NotImplementedError for what that does not have."""
    unused = {name for name, value in others.items() if value is not None and value is not False}
    if dropout_p or unused - {"seed"}:
        raise NotImplementedError(f"torch's attention has no {unused}, and draws another mask")
    allowed = attn_mask
    if key_mask is not None:
        keys = key_mask[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    if is_causal:
        size = query.shape[-2], key.shape[-2]
        order = torch.ones(size, dtype=torch.bool).tril()
        allowed = order if allowed is None else allowed & order
    attend = nn.functional.scaled_dot_product_attention
    return attend(query, key, value, allowed, scale=scale, enable_gqa=enable_gqa)


def _is_given(p: Parameter, chooser: random.Random) -> bool:
    # The shapes of others go by the activation.
    return not p.optional or p.name == "activation" or chooser.random() < 0.7


def _leaves(groups: list[dict[str, Any]]) -> list[Tensor]:
    """The floating-point tensors among the arguments, which now require gradients."""
    found = []
    for group in groups:
        for t in flat(list(group.values())):
            if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() == 0:
                continue
            with contextlib.suppress(
                RuntimeError
            ):  # of a view, say, or where nothing has gradients
                found.append(t if t.requires_grad else t.requires_grad_())
    return found


def _gradients(results: list[Any], leaves: list[Tensor], chooser: random.Random) -> list[Any]:
    outputs = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
    if not outputs or not leaves:
        return []
    incoming = []
    for t in outputs:
        grad = torch.randn(t.shape, dtype=torch.float64, device=t.device).to(t.dtype)
        share = chooser.random()
        if share < 0.5 and t.layout == torch.strided and not t.is_meta:
            table = values.NUMBERS if share < 0.3 else values.LAYOUTS
            with contextlib.suppress(RuntimeError):
                grad = table[chooser.choice(list(table))](grad).detach()
        incoming.append(grad)
    return list(torch.autograd.grad(outputs, leaves, incoming, allow_unused=True))


def _taken(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that torch's module has too."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _served_by(way: str) -> AbstractContextManager[None]:
    # Unless the device decides, the cpu backend refuses tensors on meta, and only this way raises.
    return contextlib.nullcontext() if way in ("cpu", "torch") else tridrop.backend(way)
