"""Time a Llama-like layer with LoRA on all seven projections: PEFT, compiled and swapped.

    python benchmarks/lora.py                      on a GPU if there is one, else a small layer on a
    CPU python benchmarks/lora.py --device cpu --out DIR python benchmarks/lora.py --ranks 16
    --rates 0,0.05 --providers peft,tridrop python benchmarks/lora.py --adapters fp32      adapters
    in fp32 over a bf16 layer

It times one decoder layer, forward and backward, for each rank and rate. All providers and rates
take turns in each round, so that a slow moment of the machine affects all of them; compare the
ratios, which are medians of the ratios within each round. The base is frozen, and x requires a
gradient, as it does in the middle of a model. Saved memory is what the layer keeps for backward,
without parameters; for a compiled layer it is not counted, since the compiler chooses what to keep.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tridrop
from tridrop.base.files import write_csv
from tridrop.commands.bench.machine import Machine
from tridrop.commands.bench.timing import quantiles
from tridrop.commands.saved import kept_by, storage_bytes

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS, RATES = (8, 16, 64), (0.0, 0.05)
PROVIDERS = ("peft", "peft+compile", "tridrop", "tridrop+compile")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Size:
    """The widths of the layer and the tokens of a step."""

    width: int
    inner: int
    heads: int
    key_heads: int
    batch: int
    length: int


SIZES = {
    "cuda": Size(4096, 14336, 32, 8, 2, 4096),  # Llama 3 8B
    "cpu": Size(512, 1408, 8, 4, 2, 256),
    "tiny": Size(32, 48, 2, 1, 1, 8),  # to test that it runs
}


class Layer(nn.Module):
    """A decoder layer as a function of the hidden states alone."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=1,
            num_attention_heads=size.heads, num_key_value_heads=size.key_heads, vocab_size=8,
            use_cache=False,
        )  # fmt: skip
        self.model = LlamaModel(config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(inputs_embeds=x).last_hidden_state
        return out


class Subject:
    """A provider at one rate, with its own layer."""

    def __init__(
        self, provider: str, p: float, rank: int, size: Size, device: str, dtype: torch.dtype,
        adapters: torch.dtype,
    ) -> None:  # fmt: skip
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=p, target_modules=PROJECTIONS)
        with torch.device(device):
            layer = Layer(size).to(dtype)
            model = get_peft_model(layer, config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapters)
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.02)
        self.model = model.train()
        if provider.startswith("tridrop"):
            tridrop.swap(model)
        self.provider, self.p = provider, p
        self.call: Callable[[Tensor], Tensor] = self.model
        if provider.endswith("compile"):
            self.call = torch.compile(self.model)
        self.trained = [w for w in self.model.parameters() if w.requires_grad]

    def step(self, x: Tensor, grad: Tensor) -> Any:
        """Forward and backward."""
        return torch.autograd.grad(self.call(x), [x, *self.trained], grad)

    def saved(self, x: Tensor) -> int | None:
        """Bytes kept for backward, without parameters; None for a compiled layer."""
        if self.provider.endswith("compile"):
            return None
        _, kept = kept_by(lambda: self.model(x))
        return storage_bytes(kept, without=self.model.parameters())


def rows(machine: Machine, rank: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per provider and rate."""
    size = SIZES[options.size]
    dtype = DTYPES[options.dtype]
    adapters = DTYPES[options.adapters] if options.adapters else dtype
    shape = (size.batch, size.length, size.width)
    x = torch.randn(shape, device=machine.device, dtype=dtype).requires_grad_()
    grad = torch.randn(shape, device=machine.device, dtype=dtype)
    torch._dynamo.reset()
    subjects = [
        Subject(provider, p, rank, size, machine.device, dtype, adapters)
        for provider in options.providers
        for p in options.rates
    ]
    for subject in subjects:
        for _ in range(2):
            subject.step(x, grad)
    times: dict[tuple[str, float], list[float]] = {(s.provider, s.p): [] for s in subjects}
    for i in range(options.rounds):
        turn = i % len(subjects)
        for s in (*subjects[turn:], *subjects[:turn]):
            calls = [partial(s.step, x, grad)] * options.calls
            times[s.provider, s.p].append(machine.wall_seconds(calls))
    found = []
    for s in subjects:
        mine = times[s.provider, s.p]
        median, low, high = quantiles(mine)
        saved = s.saved(x)
        found.append(
            {
                "rank": rank,
                "p": s.p,
                "provider": s.provider,
                "dtype": options.dtype,
                "adapters": options.adapters or options.dtype,
                "median_ms": round(median * 1e3, 3),
                "q20_ms": round(low * 1e3, 3),
                "q80_ms": round(high * 1e3, 3),
                "speedup_over_peft": ratio(times.get(("peft", s.p)), mine),
                "price_of_dropout": ratio(mine, times.get((s.provider, 0.0))),
                "saved_bytes": saved,
                "saved_copies_of_x": None if saved is None else round(saved / nbytes(x), 3),
                "peak_bytes": machine.peak_bytes(partial(s.step, x, grad)),
            }
        )
    return found


def nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def ratio(first: Sequence[float] | None, second: Sequence[float] | None) -> float | None:
    """The median of the ratio of two providers within each round."""
    if not first or not second:
        return None
    return round(statistics.median(a / b for a, b in zip(first, second, strict=True)), 4)


def circumstances(machine: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """The machine, versions and settings that the figures belong to."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    about = machine.about()
    about["versions"]["peft"] = metadata.version("peft")
    size = vars(SIZES[options.size])
    return {**about, "commit": commit, "size": size, "rounds": options.rounds}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def several(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [convert(part) for part in text.split(",")]

    def provider(text: str) -> str:
        if text not in PROVIDERS:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PROVIDERS)}")
        return text

    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--size", choices=tuple(SIZES), help="(default: that for the device)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="(bf16 on cuda, fp32 on cpu)")
    parser.add_argument("--adapters", choices=tuple(DTYPES), help="(default: --dtype)")
    parser.add_argument("--ranks", type=several(int), default=list(RANKS), metavar="R,R")
    parser.add_argument("--rates", type=several(float), default=list(RATES), metavar="P,P")
    parser.add_argument("--providers", type=several(provider), default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--calls", type=int, help="steps per round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write lora.csv and lora.json")
    options = parser.parse_args(given)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = options.device == "cuda"
    options.size = options.size or options.device
    options.dtype = options.dtype or ("bf16" if cuda else "fp32")
    options.rounds = options.rounds or (30 if cuda else 15)
    options.calls = options.calls or (5 if cuda else 1)
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Print the table, and write it to --out if given."""
    options = arguments(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = Machine(options.device)
    about = circumstances(machine, options)
    table: list[dict[str, Any]] = []
    for rank in options.ranks:
        found = rows(machine, rank, options)
        if not table:
            print(*found[0], sep="\t")
        for row in found:
            print(*row.values(), sep="\t", flush=True)
        table += found
        if options.out is not None:
            write(options.out, about, table)


def write(out: Path, about: dict[str, Any], table: list[dict[str, Any]]) -> None:
    """Write the rows so far, so that an interrupted run keeps the ranks that are done."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"circumstances": about, "rows": table}, indent=1)
    (out / "lora.json").write_text(text + "\n")
    write_csv(out / "lora.csv", table)


if __name__ == "__main__":
    main()
