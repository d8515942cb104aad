"""Runs one implementation of tridrop.masks on the cases of test_conformance.py, by itself.

    python tests/masks/conform.py numpy|jax|tensorflow|keras < CASES > MASKS

The file is loaded by its path, as a copy in another project would be: neither tridrop nor, unless
Keras runs on it, torch may be imported by it. Its examples are run as well. CASES is a JSON list;
MASKS is a JSON list of digits, a string of 0 and 1 for each case and way to call it.
"""

import doctest
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[2] / "tridrop" / "masks"


def words_of(case):
    """(seed high, seed low, stream high, stream low), unsigned."""
    halves = [(n >> 32 & 0xFFFFFFFF, n & 0xFFFFFFFF) for n in (case["seed"], case["stream"])]
    return np.array(halves, np.uint32).ravel()


def drawer(module, case):
    """The call of a case, as a function of the seed alone."""
    shape, shard = tuple(case["shape"]), case["shard"]
    if case["kind"] == "attention":
        return lambda seed: module.attention_keep_mask(seed, shape, case["p"], shard=shard)
    where = {"noise_shape": case["noise_shape"], "shard": shard, "domain": case["domain"]}
    return lambda seed: module.keep_mask(seed, shape, case["p"], **where)


def calls_numpy(module, case, some):
    yield drawer(module, case)((case["seed"], case["stream"]))


COMPILED: dict = {}


def calls_jax(module, case, some):
    """Compiled with the seed as an array; some also op by op, with the seed as ints."""
    import jax
    import jax.numpy as jnp

    draw = drawer(module, case)
    # Cases that differ in their seed alone share what was compiled.
    static = json.dumps({k: v for k, v in case.items() if k not in ("seed", "stream", "folds")})
    compiled = COMPILED.setdefault(static, jax.jit(draw))
    words = words_of(case)
    yield compiled(jnp.asarray(words if module.__name__ == "jax_mask" else words.view(np.int32)))
    if some:
        yield draw((case["seed"], case["stream"]))


def calls_tensorflow(module, case, some):
    """Eagerly; some also traced and by XLA, with the seed as a tensor."""
    import tensorflow as tf

    draw = drawer(module, case)
    yield draw((case["seed"], case["stream"]))
    if some:
        if module.__name__ == "keras_mask":
            seed = tf.constant(words_of(case).view(np.int32))
        else:
            seed = tf.constant([case["seed"], case["stream"]], tf.int64)
        yield tf.function(draw, autograph=False)(seed)
        yield tf.function(draw, autograph=False, jit_compile=True)(seed)


def calls_torch(module, case, some):
    import torch

    draw = drawer(module, case)
    yield draw((case["seed"], case["stream"]))
    if some:
        yield draw(torch.from_numpy(words_of(case).view(np.int32)))


def folded(module, case, array):
    """fold_in nested as the case says, the streams as arrays where an int32 holds them."""
    seed = case["seed"]
    for stream in case["folds"]:
        small = array is not None and -(1 << 31) <= stream < 1 << 31
        seed = module.fold_in(seed, array(stream) if small else stream)
    return drawer(module, case)(seed)


def main(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"{name}_mask", FOLDER / f"{name}_mask.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    backend, array = name, None
    if name == "keras":
        import keras

        backend = keras.backend.backend()
        array = keras.ops.convert_to_tensor
    elif name == "jax":
        import jax.numpy as jnp

        array = jnp.int32
    elif name == "tensorflow":
        import tensorflow as tf

        array = tf.constant
    calls = globals()[f"calls_{backend}"]
    masks = []
    for i, case in enumerate(json.load(sys.stdin)):
        found = list(calls(module, case, some=i % 10 == 0))
        if case["folds"]:
            found.append(folded(module, case, array))
        for mask in found:
            if backend == "torch":
                mask = mask.numpy()
            mask = np.asarray(mask)
            assert mask.dtype == bool, mask.dtype
            assert mask.shape == tuple(case["shape"]), (mask.shape, case)
            masks.append((i, "".join("01"[int(k)] for k in mask.ravel())))
    assert doctest.testmod(module).failed == 0
    assert "tridrop" not in sys.modules
    assert backend == "torch" or "torch" not in sys.modules
    json.dump(masks, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
