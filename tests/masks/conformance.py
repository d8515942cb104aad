"""What an implementation of tridrop.masks is held to: all golden vectors, and random places.

The expected masks of the random cases are those of tridrop's own contract in torch.
"""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

import tridrop
from tridrop.masks.numpy_mask import LIMITS

HERE = Path(__file__).resolve().parent
DATA = json.loads((HERE.parent / "data" / "mask_vectors.json").read_text())


def golden() -> list[dict]:
    cases = []
    for v in DATA["vectors"]:
        domain = ("elements", "drop_path")[v["domain"]]
        shard = [v["global_shape"], v["origin"]]
        cases.append({**v, "kind": "elements", "domain": domain, "shard": shard})
    for v in DATA["attention"]:
        shard = [LIMITS, v["origin"]]
        cases.append({**v, "kind": "attention", "folds": [], "shard": shard})
    names = ("kind", "seed", "stream", "folds", "shape", "p", "shard", "keep")
    more = ("domain", "noise_shape")
    return [{k: c[k] for k in names + more if k in c} for c in cases]


def digits(mask: torch.Tensor) -> str:
    return "".join("01"[int(k)] for k in mask.flatten())


def drawn(count: int) -> list[dict]:
    """Random places, anywhere in a whole that may be as large as the contract allows."""
    draw, cases = random.Random(26), []
    for i in range(count):
        seed, stream = (draw.randrange(-(1 << 63), 1 << 63) for _ in range(2))
        p = draw.choice([draw.random(), draw.random(), 0.0, 2.0**-33, 0.1, 1 - 2.0**-33, 1.0])
        pair, common = torch.tensor([seed, stream]), {"seed": seed, "stream": stream, "folds": []}
        if i % 3 == 2:
            shape = [draw.choice([1, 2, 3]), draw.choice([0, 1, 2]), draw.choice([1, 3])]
            shape.append(draw.choice([1, 9, 33, 70]))
            origin = [draw.choice([0, draw.randrange(n - 70)]) for n in LIMITS]
            shard = [list(LIMITS), origin]
            keep = tridrop.attention_keep_mask(pair, shape, p, shard=shard)
            common |= {"kind": "attention", "shape": shape, "p": p, "shard": shard}
        else:
            shape = [draw.choice([0, 1, 1, 2, 3, 5, 8, 17]) for _ in range(draw.randrange(4))]
            noise = [draw.choice([None, None, 1, n]) for n in shape]
            whole, origin = [], []
            room = (1 << 62) // math.prod(max(1, n) for n in shape)
            for n in shape:
                factor = min(room, draw.choice([1, draw.randrange(1, 5), draw.randrange(room) + 1]))
                room //= factor
                whole.append(max(1, n) * factor)
                origin.append(draw.randrange(whole[-1] - n + 1))
            domain = "drop_path" if len(shape) > 1 and draw.random() < 0.2 else "elements"
            where = {"noise_shape": noise if domain == "elements" else None, "domain": domain}
            shard = draw.choice([None, [whole, origin]])
            keep = tridrop.keep_mask(pair, shape, p, shard=shard, **where)
            common |= {"kind": "elements", "shape": shape, "p": p, "shard": shard, **where}
        cases.append({**common, "keep": digits(keep)})
    return cases


def hold(name: str, places: int = 60, **environment: str) -> None:
    """Run a file of tridrop.masks in a process of its own, and compare every bit."""
    cases = golden() + drawn(places)
    given = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    asked = json.dumps([{k: v for k, v in case.items() if k != "keep"} for case in cases])
    command = [sys.executable, str(HERE / "conform.py"), name]
    run = subprocess.run(command, env=given, input=asked, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    masks = json.loads(run.stdout)
    assert {i for i, _ in masks} == set(range(len(cases)))
    assert len(masks) > len(cases) or name == "numpy"  # calls of other kinds as well
    for i, mask in masks:
        assert mask == cases[i]["keep"], cases[i]
