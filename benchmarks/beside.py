"""Time the calls of two states of the project beside each other: did a change cost anything?

    python benchmarks/beside.py COMMIT                  that commit, and the working tree
    python benchmarks/beside.py COMMIT OTHER            two commits, or folders with a checkout
    python benchmarks/beside.py COMMIT --table host     calls of [64, 64] alone (minutes)
    python benchmarks/beside.py COMMIT --only 64x64     calls with this text in their names
    python benchmarks/beside.py COMMIT --out FILE       write a CSV file there

A machine that others use changes its speed from second to second, so that two runs one after the
other cannot show a difference of a few percent. Here each state lives in a process of its own, and
the processes take turns every few hundredths of a second, in an order that changes from round to
round. The figure is the median over the rounds of the ratio of times in the same round, with the
quartiles of these ratios; below 1, the second state is faster. Both states run in this Python, with
its packages.

- *host*: the ops of host.py, of [64, 64]: what the host does is all the time.
- *cpu*: those of cpu.py, of [8192, 1024] too, forward and backward.
- *models*: forward and backward of swapped models of transformers, of two layers at p = 0.1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TURN = 0.03  # seconds that a state calls an op for, before it is another's turn
Call = Callable[[], Any]


def host_calls() -> Iterator[tuple[str, Call]]:
    """The calls of host.py on CPU tensors."""
    import torch

    x, r, grad = (torch.randn(64, 64) for _ in range(3))
    w, b = torch.ones(64), torch.zeros(64)
    leaves = [t.clone().requires_grad_() for t in (x, r, w, b)]

    def both(op: Any) -> Any:
        return torch.autograd.grad(op(*leaves), leaves, grad, allow_unused=True)

    for name, (_, op) in importlib.import_module("host").OPS.items():
        yield f"host {name} forward", partial(op, x, r, w, b)
        yield f"host {name} both", partial(both, op)


def cpu_calls() -> Iterator[tuple[str, Call]]:
    """The calls of cpu.py, at its sizes and dtypes."""
    import torch

    cpu = importlib.import_module("cpu")
    for shape in cpu.SIZES:
        for kind, dtype in cpu.DTYPES.items():
            x, r, grad = (torch.randn(shape, dtype=dtype) for _ in range(3))
            w, b = torch.ones(shape[1], dtype=dtype), torch.zeros(shape[1], dtype=dtype)
            leaves = [t.requires_grad_() for t in (x, r, w, b)]
            for training in (True, False):
                mode = "training" if training else "evaluation"
                for name, (_, op) in cpu.OPS.items():
                    label = f"cpu {name} {'x'.join(map(str, shape))} {kind} {mode}"
                    yield label, partial(cpu.both_ways, op, leaves, grad, training)


def model_calls() -> Iterator[tuple[str, Call]]:
    """A step of a swapped BERT and GPT-2, without an optimiser, of two sizes."""
    import torch

    # The tests' torchvision has no operators and cannot be imported by itself; no model here asks.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    import transformers

    import tridrop

    for width, tokens in ((64, 16), (256, 128)):
        size = {"vocab_size": 512}
        bert = transformers.BertConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=4 * width, **size,
        )  # fmt: skip
        gpt = transformers.GPT2Config(n_embd=width, n_layer=2, n_head=4, **size)
        kinds = {"BERT": (transformers.BertForMaskedLM, bert)}
        kinds["GPT-2"] = (transformers.GPT2LMHeadModel, gpt)
        for name, (kind, config) in kinds.items():
            torch.manual_seed(0)
            model = kind(config).train()
            tridrop.swap(model)
            ids = torch.randint(512, (2, tokens))

            def step(model: Any = model, ids: Any = ids) -> None:
                model.zero_grad()
                model(ids, labels=ids).loss.backward()

            yield f"models {name} width {width}, {tokens} tokens", step


TABLES = {"host": host_calls, "cpu": cpu_calls, "models": model_calls}


def work(folder: Path) -> None:
    """Answer requests: "names TABLE", "first NAME" (seconds of a call, warm), "time NAME N"."""
    sys.path[:1] = [str(folder), str(folder / "benchmarks")]
    import tridrop

    assert Path(tridrop.__file__).is_relative_to(folder), tridrop.__file__
    calls: dict[str, Call] = {}
    for line in sys.stdin:
        verb, *rest = json.loads(line)
        if verb == "names":
            calls = dict(TABLES[rest[0]]())
            answer: Any = list(calls)
        else:
            call, count = calls[rest[0]], rest[1]
            start = time.perf_counter()
            for _ in range(count):
                call()
            answer = (time.perf_counter() - start) / count
        print(json.dumps(answer), file=sys.__stdout__, flush=True)


class State:
    """A state of the project, in a process of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(folder)]
        self.process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self.process.terminate)

    def ask(self, *request: Any) -> Any:
        """The answer of the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a state ended with status {self.process.wait()}")
        return json.loads(line)


def folder_of(state: str, stack: ExitStack) -> Path:
    """A folder with that state: itself, or a commit's files in a temporary one."""
    if Path(state).is_dir():
        return Path(state).resolve()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
    files = subprocess.run(
        ["git", "archive", state, "tridrop", "benchmarks"], cwd=ROOT, stdout=subprocess.PIPE
    )
    if files.returncode:
        raise SystemExit(f"{state} is neither a folder nor a commit of {ROOT}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=files.stdout, check=True)
    return folder


def compare(
    states: list[State], table: str, rounds: int, only: str = ""
) -> Iterator[dict[str, Any]]:
    """A row for each call that all states have, and whose name contains ``only``."""
    shared = [state.ask("names", table) for state in states]
    turns = list(range(len(states)))
    for name in [n for n in shared[0] if only in n and all(n in names for names in shared)]:
        counts = []
        for state in states:
            state.ask("time", name, 3)  # compiles, and learns the call
            counts.append(max(1, round(TURN / state.ask("time", name, 3))))
        times: list[list[float]] = []
        for _ in range(rounds):
            random.shuffle(turns)
            found = {i: states[i].ask("time", name, counts[i]) for i in turns}
            times.append([found[i] for i in range(len(states))])
        ratios = sorted(after / before for before, after in times)
        low, middle, high = statistics.quantiles(ratios, n=4)
        before, after = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
        yield {
            "call": name,
            "before_us": round(before, 1),
            "after_us": round(after, 1),
            "after_over_before": round(middle, 3),
            "quartiles": f"{low:.3f} to {high:.3f}",
        }


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a commit, or a folder with a checkout")
    parser.add_argument("after", nargs="?", default=str(ROOT), help="the working tree by default")
    parser.add_argument("--table", choices=TABLES, action="append", help="all by default")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls with TEXT in their names")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = []
    with ExitStack() as stack:
        folders = [folder_of(state, stack) for state in (options.before, options.after)]
        states = [State(folder, stack) for folder in folders]
        for table in options.table or TABLES:
            for row in compare(states, table, options.rounds, options.only):
                print(*row.values(), sep="\t", flush=True)
                found.append(row)
    if not found:
        raise SystemExit(f"no call that both states have contains {options.only!r} in its name")
    mean = statistics.geometric_mean(row["after_over_before"] for row in found)
    print(f"geometric mean of {len(found)} ratios: {mean:.3f}")
    if options.out is not None:
        from tridrop.base.files import write_csv  # other states' processes run this file, too

        write_csv(options.out, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]))
    else:
        main()
