"""Models with adapters of PEFT, and steps of theirs beside PEFT's own forward."""

import copy

import pytest
import torch
from swap_helpers import classes_of
from torch import Tensor, nn

import tridrop

peft = pytest.importorskip("peft")
from peft.tuners.lora import layer as peft_layer  # noqa: E402, F401  (for the tests)

SEED = 7
WIDTH, TOKENS = 24, (3, 5)
RATES = [0.0, 0.05, 0.5, 0.9]


class Attention(nn.Module):
    """Three projections of one x."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (16, 8, 8))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.head(torch.cat((torch.tanh(q[..., :8] * k) * v, q[..., 8:]), -1))


def trained(model: nn.Module) -> nn.Module:
    """With adapters whose B, biases and magnitudes are those of no fresh model."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            with torch.no_grad():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def config(p: float = 0.1, **options) -> "peft.LoraConfig":
    given = {"r": 4, "lora_alpha": 10, "lora_dropout": p, "target_modules": ["q", "k", "v"]}
    return peft.LoraConfig(**(given | options))


def adapted(p: float = 0.1, **options) -> nn.Module:
    torch.manual_seed(0)
    return trained(peft.get_peft_model(Attention(), config(p, **options)))


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


class Exported(nn.Module):
    """In the place of an adapter's dropout: the mask that tridrop exports for it."""

    def __init__(self, p: float, seed: Tensor) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        cut = round(self.p * 2**32)
        gain = 2**32 / (2**32 - cut) if cut < 2**32 else 0.0
        return torch.where(tridrop.keep_mask(self.seed, x.shape, self.p), x * gain, 0.0)


def twin_of(model: nn.Module, report, seed: int = SEED) -> nn.Module:
    """A copy that PEFT computes, whose dropouts have the masks of the swapped model."""
    twin = copy.deepcopy(model)
    tridrop.unswap(twin)
    assert not any("tridrop" in kind.__module__ for kind in classes_of(twin))
    streams = {s.module: s.stream for s in report.sites}
    for layer_name, layer in twin.named_modules():
        for name, drop in getattr(layer, "lora_dropout", {}).items():
            if isinstance(drop, nn.Dropout):
                stream = streams[f"{layer_name}.lora_dropout.{name}"]
                layer.lora_dropout[name] = Exported(drop.p, tridrop.fold_in(seed, stream))
    return twin


def step(model: nn.Module, x: Tensor, **arguments) -> dict[str, Tensor]:
    """The result of a step, and the gradients of x and of all that is trained."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = model(x, **arguments)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device)
    (out.float() * weights).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


def assert_equal_steps(found, expected, tolerance=2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        largest = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance * max(largest, 1e-3),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def assert_as_peft(model: nn.Module, x: Tensor, tolerance=2e-5, **arguments) -> None:
    """A swapped model does what PEFT does with its masks."""
    report = tridrop.swap(model)
    with tridrop.rng(SEED):
        found = step(model, x, **arguments)
    assert_equal_steps(found, step(twin_of(model, report), x, **arguments), tolerance)


def two(p=(0.2, 0.2), ranks=(4, 2)) -> nn.Module:
    model = adapted(p[0], r=ranks[0])
    model.add_adapter("other", config(p[1], r=ranks[1], lora_alpha=3))
    model.base_model.set_adapter(["default", "other"])
    return trained(model)
