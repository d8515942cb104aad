"""Time 2^24 decisions with each file of tridrop.masks.

    python benchmarks/masks_elsewhere.py [--write]

It runs the frameworks that are installed one after the other, each in its own process, and the C
header compiled by `cc`. Without a CUDA device everything runs on the CPU. A time is the fastest of
seven calls, after two that compile and warm up; --write puts the times into
benchmarks/results/masks_elsewhere.json.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tridrop" / "masks"
SHAPE, ATTENTION, P = (4096, 4096), (1, 16, 1024, 1024), 0.1
KINDS = {
    "tridrop, the compiled loops": ("tridrop", {}),
    "tridrop, plain torch": ("tridrop", {"TRIDROP_CPU": "torch"}),
    "numpy_mask.py": ("numpy", {}),
    "jax_mask.py, jit": ("jax", {}),
    "tensorflow_mask.py, eager": ("tensorflow", {}),
    "tensorflow_mask.py, XLA": ("tensorflow", {"COMPILED": "1"}),
    "keras_mask.py on torch": ("keras", {"KERAS_BACKEND": "torch"}),
    "keras_mask.py on JAX, jit": ("keras", {"KERAS_BACKEND": "jax", "COMPILED": "1"}),
    "keras_mask.py on TensorFlow, XLA": ("keras", {"KERAS_BACKEND": "tensorflow", "COMPILED": "1"}),
}
C = """
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include "tridrop_mask.h"
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
int main(void) {
  int64_t shape[2] = {4096, 4096}, four[4] = {1, 16, 1024, 1024};
  unsigned char *keep = malloc(1 << 24);
  double best[2] = {1e9, 1e9};
  int i;
  for (i = 0; i < 7; ++i) {
    double start = now(), middle, end;
    tridrop_keep_mask(i, 0, 2, shape, 0.1, NULL, NULL, NULL, TRIDROP_ELEMENTS, keep);
    middle = now();
    tridrop_attention_keep_mask(i, 0, four, 0.1, NULL, keep);
    end = now();
    if (middle - start < best[0]) best[0] = middle - start;
    if (end - middle < best[1]) best[1] = end - middle;
  }
  printf("[%f, %f]", best[0], best[1]);
  return 0;
}
"""


def fastest(call, wait) -> float:
    times = []
    for i in range(9):
        start = time.perf_counter()
        wait(call(i))
        times.append(time.perf_counter() - start)
    return min(times[2:])


def measure(name: str) -> list[float]:
    """The seconds of an elementwise mask, and of an attention mask."""
    if name == "tridrop":
        import tridrop

        calls = (
            lambda seed: tridrop.keep_mask(seed, SHAPE, P),
            lambda seed: tridrop.attention_keep_mask(seed, ATTENTION, P),
        )
        return [fastest(call, lambda mask: None) for call in calls]
    spec = importlib.util.spec_from_file_location("mask", FOLDER / f"{name}_mask.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = [
        lambda seed: module.keep_mask(seed, SHAPE, P),
        lambda seed: module.attention_keep_mask(seed, ATTENTION, P),
    ]
    backend = os.environ.get("KERAS_BACKEND", name)
    if backend == "jax":
        import jax
        import jax.numpy as jnp

        compiled = [jax.jit(lambda step, c=c: c(module.fold_in(1, step))) for c in calls]
        calls = [lambda i, c=c: c(jnp.int32(i)) for c in compiled]
    elif backend == "tensorflow" and "COMPILED" in os.environ:
        import tensorflow as tf

        compiled = [
            tf.function(
                lambda step, c=c: c(module.fold_in(1, step)), jit_compile=True, autograph=False
            )
            for c in calls
        ]
        calls = [lambda i, c=c: c(tf.constant(i)) for c in compiled]
    waits = {"jax": lambda mask: mask.block_until_ready(), "tensorflow": lambda mask: mask.numpy()}
    return [fastest(call, waits.get(backend, lambda mask: None)) for call in calls]


def header() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "time.c"
        source.write_text(C)
        command = ["cc", "-O3", "-march=native", f"-I{FOLDER}", "-o", f"{folder}/time", str(source)]
        subprocess.run(command, check=True)
        return json.loads(subprocess.check_output([f"{folder}/time"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    found = {"tridrop_mask.h, cc -O3": header()}
    for kind, (name, environment) in KINDS.items():
        needed = {name, environment.get("KERAS_BACKEND", name)}
        missing = [n for n in needed if importlib.util.find_spec(n) is None]
        if missing:
            print(f"{kind}: left out, {missing[0]} is not installed")
            continue
        command = [sys.executable, str(Path(__file__)), "--one", name]
        given = os.environ | environment | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
        found[kind] = json.loads(subprocess.check_output(command, env=given, text=True))
    print("| | elements, ms | attention, ms |\n|---|---|---|")
    for kind, (elements, attention) in found.items():
        print(f"| {kind} | {elements * 1e3:.0f} | {attention * 1e3:.0f} |")
    if options.write:
        names = ("torch", "numpy", "jax", "tensorflow_cpu", "keras")
        versions = {n: version(n) for n in names if importlib.util.find_spec(n.split("_")[0])}
        result = {"decisions": 1 << 24, "cores": os.cpu_count(), "versions": versions}
        path = ROOT / "benchmarks" / "results" / "masks_elsewhere.json"
        path.write_text(json.dumps({**result, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
