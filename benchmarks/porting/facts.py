"""What the scripts of this folder share: facts of one framework, printed, kept, and held.

python benchmarks/porting/FRAMEWORK_facts.py            holds the facts against those kept
python benchmarks/porting/FRAMEWORK_facts.py --write    keeps the facts, in results/FRAMEWORK.json

Where facts are others than those kept, each is named, and the exit status is CHANGED. The last line
of a script whose facts hold says so: what ends the process after it is the framework's own end.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent / "results"
RATES = (0.001, 0.01, 0.1)
DTYPES = ("float32", "float16", "bfloat16")
CHANGED = 3  # the exit status; Python's own errors have 1


def drawn(dropped_ones: Callable[[int, float, str], Any], dtypes=DTYPES) -> dict:
    """Rates and kept ones of ``dropped_ones(n, p, dtype)``, which gives a float array.

    A rate is within four standard deviations of p ("p"), or it is the share that was seen.
    """
    found, n = {}, 1 << 20
    for dtype in dtypes:
        for p in RATES:
            out = np.asarray(dropped_ones(n, p, dtype), np.float32).ravel()
            rate = float((out == 0).mean())
            right = abs(rate - p) < 4 * (p * (1 - p) / n) ** 0.5
            kept = sorted({float(value) for value in out[out != 0]})
            found[f"{dtype}, p = {p}"] = {
                "rate": "p" if right else float(f"{rate:.3g}"),
                "a kept 1": round(kept[0], 6) if len(kept) == 1 else [round(k, 6) for k in kept],
            }
    return found


def gained(x: Any, out: Any, p: float) -> float:
    """How much larger than ``x / (1 - p)`` the kept values are in sum, to four digits."""
    given, found = (np.asarray(value, np.float64) for value in (x, out))
    kept = found != 0
    return round(found[kept].sum() / given[kept].sum() * (1 - p) - 1, 4)


def said(call: Callable[[], Any]) -> Any:
    """What a call gives, or the name of what it raises."""
    try:
        return call()
    except Exception as error:
        return f"raises {type(error).__name__}"


def of_nan(out: Any) -> str:
    """What dropout made of NaN: kept ones are NaN everywhere."""
    dropped = [value for value in np.asarray(out, np.float32).ravel() if not np.isnan(value)]
    return "0 where dropped" if dropped else "NaN everywhere"


def varies(mask: Any) -> list[bool]:
    """Along which dimensions a mask differs."""
    mask = np.asarray(mask)
    return [bool((mask != mask.take([0], axis)).any()) for axis in range(mask.ndim)]


def same(draw: Callable[[], Any]) -> str:
    """Whether two calls have one mask."""
    first, second = (np.asarray(draw()) for _ in range(2))
    return "one mask in all calls" if np.array_equal(first, second) else "a mask a call"


def resumed(draw: Callable[[], Any], save: Callable[[], Any], load: Callable[[Any], None]) -> str:
    """What follows on masks of a run that was saved after the second, by what ``load`` gets."""
    first, _ = np.asarray(draw()), draw()
    saved = save()
    third = np.asarray(draw())
    assert not np.array_equal(first, third)
    load(saved)
    found = np.asarray(draw())
    if np.array_equal(found, third):
        return "goes on"
    return "begins again" if np.array_equal(found, first) else "neither"


def flat(facts: Any, name: str = "") -> dict[str, Any]:
    """Each fact under its whole name."""
    if not isinstance(facts, dict):
        return {name: facts}
    return {
        path: value
        for key, inner in facts.items()
        for path, value in flat(inner, f"{name}: {key}" if name else key).items()
    }


def report(name: str, packages: list[str], facts: dict) -> None:
    versions = {package: importlib.metadata.version(package) for package in packages}
    found = json.loads(json.dumps({"versions": versions, **facts}))
    print(json.dumps(found, indent=1))
    path = FOLDER / f"{name}.json"
    if "--write" in sys.argv:
        path.write_text(json.dumps(found, indent=1) + "\n")
        return
    now, kept = flat(found), flat(json.loads(path.read_text()))
    changed = [fact for fact in {**kept, **now} if now.get(fact, "-") != kept.get(fact, "-")]
    for fact in changed:
        print(f"{name}: {fact}: now {now.get(fact, '-')}, kept {kept.get(fact, '-')}", flush=True)
    if changed:
        sys.exit(CHANGED)
    print(f"{name}: the {len(now)} facts are those of {path.name}", flush=True)
