"""Time what variational dropout costs a recurrent layer on a CPU, forward and backward.

    python benchmarks/recurrent.py

The layers take turns, so that a slow moment of the machine affects all of them. They use one
thread, and processor time is measured, so that other programs matter little. It prints the medians
as ratios to torch's layer.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from tridrop.nn import VariationalRNN

STEPS, BATCH, TURNS = 70, 20, 9


def layers(layer_class: type[nn.RNNBase], size: int) -> dict[str, nn.Module]:
    def made() -> nn.RNNBase:
        torch.manual_seed(0)
        return layer_class(size, size, 2)

    return {
        "torch": made(),
        "input, layer, output": VariationalRNN(made(), 0.3, 0.3, 0.3),
        "recurrent": VariationalRNN(made(), recurrent_dropout=0.3),
        "all": VariationalRNN(made(), 0.3, 0.3, 0.3, 0.3),
    }


def turn(layer: nn.Module, x: torch.Tensor) -> float:
    start = time.process_time()
    layer(x)[0].sum().backward()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, T = {STEPS}, B = {BATCH}", flush=True)
    for layer_class in (nn.LSTM, nn.GRU):
        for size in (128, 512):
            x = torch.randn(STEPS, BATCH, size, requires_grad=True)
            rows = layers(layer_class, size)
            times: dict[str, list[float]] = {name: [] for name in rows}
            for i in range(TURNS + 2):
                for name, layer in rows.items():
                    spent = turn(layer, x)
                    if i >= 2:
                        times[name].append(spent)
            base = statistics.median(times["torch"])
            ratios = {name: statistics.median(t) / base for name, t in times.items()}
            rounded = {name: round(ratio, 2) for name, ratio in ratios.items()}
            print(f"{layer_class.__name__} {size}:", rounded, flush=True)


if __name__ == "__main__":
    main()
