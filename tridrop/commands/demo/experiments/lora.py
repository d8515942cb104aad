"""LoRA with dropout on real text: PEFT, compared with PEFT after tridrop.swap.

A small Llama with random weights is adapted: all linear layers by LoRA, and the head in full. It is
trained three times, from the same weights and on the same batches: with PEFT, with PEFT and other
masks, and swapped. The difference between the first two is the effect of masks alone.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import tridrop

from ....swapping.measure import cost_of
from .. import text
from ..options import DemoError
from .measures import judge, paired, spread
from .progress import Bar
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {"peft": "PEFT", "peft_again": "PEFT, other masks", "tridrop": "tridrop"}
COLOURS = {"peft": "#0072B2", "peft_again": "#56B4E9", "tridrop": "#000000"}
WIDTH, INNER, LAYERS, HEADS, CONTEXT, BATCH = 128, 352, 2, 4, 64, 8
RANK, ALPHA, RATE = 8, 16, 3e-3
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_BYTES = 256


def ticks(settings: Settings) -> int:
    """One per step of all arms."""
    return settings.repeats * settings.steps


def measure(settings: Settings, device: torch.device, progress: Bar) -> dict[str, Any]:
    """Train the triples of arms. Each seed has its own initial weights and batches."""
    make = _maker(settings.p, device)
    name, source = text.load(None)
    parts = [part.to(device) for part in text.split(source, settings.train, settings.valid)]
    if min(map(len, parts)) <= CONTEXT:
        raise DemoError(f"a part of the text has only {CONTEXT} bytes or fewer")

    def triple(seed: int) -> dict[str, Any]:
        progress.begin(f"seed {seed}")
        arms = _train(make, seed, settings, parts, progress.tick)
        ends = ", ".join(f"{ARMS[arm]} {one['valid'][-1]:.4f}" for arm, one in arms.items())
        progress.say(f"seed {seed}, validation loss: {ends}")
        return {"seed": seed, "arms": arms}

    triples = progress.each(range(settings.seed, settings.seed + settings.repeats), triple)
    model = make(settings.seed)
    return {
        "text": name,
        "bytes": {"train": settings.train, "valid": settings.valid},
        "model": {
            "width": WIDTH, "inner": INNER, "layers": LAYERS, "heads": HEADS, "context": CONTEXT,
            "batch": BATCH, "rank": RANK, "alpha": ALPHA, "learning_rate": RATE,
            "parameters": sum(w.numel() for w in model.parameters()),
            "trained": sum(w.numel() for w in model.parameters() if w.requires_grad),
        },
        "memory": _memory(settings, device),
        "triples": triples,
        "summary": _summary(triples),
    }  # fmt: skip


def _maker(p: float, device: torch.device) -> Callable[[int], Any]:
    """A function that makes the adapted model of a seed; raises DemoError without the libraries."""
    try:
        peft = importlib.import_module("peft")
        llama = importlib.import_module("transformers.models.llama")
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DemoError(
            f"the experiment adapts a Llama of transformers with PEFT, which cannot be imported "
            f"({reason}): pip install 'tridrop[hf,peft]'"
        ) from error

    def make(seed: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            base = llama.LlamaForCausalLM(
                llama.LlamaConfig(
                    vocab_size=_BYTES, hidden_size=WIDTH, intermediate_size=INNER,
                    num_hidden_layers=LAYERS, num_attention_heads=HEADS, use_cache=False,
                    max_position_embeddings=CONTEXT, initializer_range=0.05,
                )
            )  # fmt: skip
            config = peft.LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=p, target_modules=PROJECTIONS,
                modules_to_save=["lm_head"], task_type="CAUSAL_LM",
            )  # fmt: skip
            return peft.get_peft_model(base, config).to(device).train()

    return make


def _train(
    make: Callable[[int], Any],
    seed: int,
    settings: Settings,
    parts: list[Tensor],
    tick: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Train the arms step by step in turns, each with its own masks."""
    models = {arm: make(seed) for arm in ARMS}
    tridrop.swap(models["tridrop"])
    optimizers = {
        arm: torch.optim.AdamW([w for w in m.parameters() if w.requires_grad], RATE)
        for arm, m in models.items()
    }
    order = torch.Generator().manual_seed(seed)
    valid = _windows(parts[1], torch.arange(0, len(parts[1]) - CONTEXT, CONTEXT))
    # On a CPU take the process time, which other programs affect less than the clock.
    clock = time.process_time if valid.device.type == "cpu" else time.perf_counter
    found: dict[str, dict[str, Any]] = {
        arm: {"steps": [], "train": [], "valid": [], "seconds": []} for arm in ARMS
    }
    for i in range(settings.steps + 1):
        if i % settings.every == 0 or i == settings.steps:
            for arm, model in models.items():
                found[arm]["steps"].append(i)
                found[arm]["valid"].append(round(_loss(model, valid), 5))
        if i == settings.steps:
            break
        starts = torch.randint(len(parts[0]) - CONTEXT, (BATCH,), generator=order)
        batch = _windows(parts[0], starts)
        turn = i % len(ARMS)
        for arm in (*list(ARMS)[turn:], *list(ARMS)[:turn]):
            with torch.random.fork_rng(devices=[d for d in (batch.device,) if d.type != "cpu"]):
                # The masks depend only on the arm and the step, not on other arms or evaluations.
                torch.manual_seed((seed * len(ARMS) + list(ARMS).index(arm)) * 100_000 + i)
                start = clock()
                loss = _step(models[arm], optimizers[arm], batch)
                found[arm]["seconds"].append(round(clock() - start, 6))
            found[arm]["train"].append(round(loss, 5))
        tick()
    return found


def _windows(tokens: Tensor, starts: Tensor) -> Tensor:
    return torch.stack([tokens[i : i + CONTEXT] for i in starts.tolist()])


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    """Do a training step and return its loss."""
    optimizer.zero_grad()
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _loss(model: Any, windows: Tensor) -> float:
    """The mean loss over windows, with dropout off."""
    model.eval()
    losses = [model(input_ids=part, labels=part).loss * len(part) for part in windows.split(32)]
    model.train()
    return float(torch.stack(losses).sum()) / len(windows)


def _memory(settings: Settings, device: torch.device) -> dict[str, int]:
    """The bytes that a training forward keeps for backward, without parameters."""
    batch = torch.zeros(BATCH, CONTEXT, dtype=torch.int64, device=device)
    found = {}
    for name, p, swapped in (
        ("peft_without", 0.0, False), ("peft", settings.p, False),
        ("tridrop_without", 0.0, True), ("tridrop", settings.p, True),
    ):  # fmt: skip
        model = _maker(p, device)(settings.seed)
        if swapped:
            tridrop.swap(model)
        found[name] = cost_of(model, (), {"input_ids": batch, "labels": batch}).saved_bytes
    return found


def _summary(triples: list[dict[str, Any]]) -> dict[str, Any]:
    """The last validation losses and their differences; the ratios of times per step."""
    last = {arm: [t["arms"][arm]["valid"][-1] for t in triples] for arm in ARMS}
    found: dict[str, Any] = {
        "valid": {arm: spread(values) for arm, values in last.items()},
        "masks": paired(last["peft"], last["peft_again"]),
        "swap": paired(last["peft"], last["tridrop"]),
        "distance": {
            arm: spread([_distance(t["arms"]["peft"], t["arms"][arm]) for t in triples])
            for arm in ("peft_again", "tridrop")
        },
    }
    times = {arm: [s for t in triples for s in _warm(t["arms"][arm]["seconds"])] for arm in ARMS}
    for arm in ("peft_again", "tridrop"):
        ratios = [b / a for a, b in zip(times["peft"], times[arm], strict=True)]
        found[f"time_{arm}"] = statistics.median(ratios)
    found["step_ms"] = {arm: 1e3 * statistics.median(values) for arm, values in times.items()}
    return found


def _warm(seconds: list[float]) -> list[float]:
    """The times without the first steps, which compile and allocate."""
    return seconds[min(5, len(seconds) - 1) :]


def _distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The root mean square difference of two validation curves."""
    pairs = zip(first["valid"], second["valid"], strict=True)
    return statistics.fmean((a - b) ** 2 for a, b in pairs) ** 0.5


# --------------------------------------------------------------------------------------- sentences


def findings(result: dict[str, Any]) -> list[str]:
    """The findings, in sentences whose numbers and words follow from the results."""
    found, asked, memory = result["summary"], result["options"], result["memory"]
    valid, distance, ms = found["valid"], found["distance"], found["step_ms"]
    return [
        f"LoRA of rank {result['model']['rank']} with dropout p = {asked['p']}, "
        f"{asked['steps']} steps, {len(result['triples'])} seeds; losses in nats per byte, in "
        "evaluation mode, mean ± standard deviation over the seeds.",
        judge("Other masks {} PEFT's validation loss", (
            valid["peft"], valid["peft_again"], found["masks"]), 1, ""),
        judge("tridrop {} PEFT's validation loss", (
            valid["peft"], valid["tridrop"], found["swap"]), 1, ""),
        f"Root mean square distance of the validation curve to PEFT's: with other masks "
        f"{distance['peft_again']['mean']:.4f}, with tridrop {distance['tridrop']['mean']:.4f}.",
        f"Saved for backward by a training forward: PEFT {_mib(memory['peft_without'])} at p = 0 "
        f"and {_mib(memory['peft'])} at p = {asked['p']}; tridrop "
        f"{_mib(memory['tridrop_without'])} and {_mib(memory['tridrop'])}.",
        f"A step took {ms['peft']:.1f} ms with PEFT and {ms['tridrop']:.1f} ms with tridrop "
        f"(medians); the median of the ratio per step was {found['time_tridrop']:.3f}, and for "
        f"PEFT with other masks {found['time_peft_again']:.3f}.",
    ]  # fmt: skip


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


# ----------------------------------------------------------------------------------------- figures


def draw(result: dict[str, Any]) -> Figure:
    """The validation curves, the memory and the time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    curves, memory, times = figure.subplots(1, 3, width_ratios=(5, 2.4, 2.2))
    for arm, style in (("peft", "-"), ("peft_again", "-"), ("tridrop", (0, (4, 3)))):
        runs = [t["arms"][arm] for t in result["triples"]]
        values = list(zip(*(run["valid"] for run in runs), strict=True))
        steps = runs[0]["steps"]
        low, high = [min(v) for v in values], [max(v) for v in values]
        curves.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)
        mean = [statistics.fmean(v) for v in values]
        curves.plot(steps, mean, linestyle=style, color=COLOURS[arm], label=ARMS[arm])
    curves.set_title("validation loss, nats per byte")
    curves.set_xlabel("training step")
    curves.legend(frameon=False)
    names = {"peft_without": "PEFT\np = 0", "peft": "PEFT", "tridrop": "tridrop"}
    sizes = [result["memory"][name] / 2**20 for name in names]
    memory.bar(range(3), sizes, color=["#BBBBBB", COLOURS["peft"], COLOURS["tridrop"]])
    memory.set_xticks(range(3), list(names.values()))
    memory.set_title("saved for backward, MiB")
    seconds = [[1e3 * s for t in result["triples"] for s in _warm(t["arms"][a]["seconds"])]
               for a in ("peft", "tridrop")]  # fmt: skip
    boxes: Any = times.boxplot(seconds, showfliers=False, widths=0.5)
    for line, arm in zip(boxes["medians"], ("peft", "tridrop"), strict=True):
        line.set_color(COLOURS[arm])
    times.set_xticks([1, 2], ["PEFT", "tridrop"])
    times.set_ylim(0)
    times.set_title("ms per step")
    for axes in (curves, memory, times):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
