"""What variational dropout costs a recurrent layer: forward and backward, side by side, on a CPU.

    python benchmarks/recurrent.py

Turns go round: each layer once, then each again, so that all see the same machine. One thread, and
the time is that of the processor, so that others on the machine matter little. Printed are medians
as ratios to torch's layer.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from tridrop.nn import VariationalRNN

STEPS, BATCH, TURNS = 70, 20, 9


def layers(kind: type[nn.RNNBase], size: int) -> dict[str, nn.Module]:
    def made() -> nn.RNNBase:
        torch.manual_seed(0)
        return kind(size, size, 2)

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
    for kind in (nn.LSTM, nn.GRU):
        for size in (128, 512):
            x = torch.randn(STEPS, BATCH, size, requires_grad=True)
            rows = layers(kind, size)
            times: dict[str, list[float]] = {name: [] for name in rows}
            for i in range(TURNS + 2):
                for name, layer in rows.items():
                    spent = turn(layer, x)
                    if i >= 2:
                        times[name].append(spent)
            base = statistics.median(times["torch"])
            ratios = {name: statistics.median(t) / base for name, t in times.items()}
            print(
                f"{kind.__name__} {size}:", {n: round(r, 2) for n, r in ratios.items()}, flush=True
            )


if __name__ == "__main__":
    main()
