"""docs/porting.md says what the scripts of benchmarks/porting have seen, and leaves nothing out."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PORTING = ROOT / "benchmarks" / "porting"
PAGE = (ROOT / "docs" / "porting.md").read_text()
SEEN = {path.stem: json.loads(path.read_text()) for path in (PORTING / "results").glob("*.json")}


def tables():
    """By heading: the rows of a table, each as its cells; all tables of a heading together."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        rows = [line.strip("|\n ") for line in part.splitlines() if line.startswith("|")]
        rows = [row for row in rows if not set(row) <= set("-| ")]
        if rows:
            found[part.splitlines()[0]] = [[c.strip() for c in row.split(" | ")] for row in rows]
    return found


TABLES = tables()


def row(heading, name):
    (found,) = (r[1:] for r in TABLES[heading] if r[0].strip("*") == name)
    return found


def facts(name):
    """The results of a framework, and the name that its facts have where it shares a file."""
    if name in ("Flax", "Haiku", "Equinox"):
        shared = SEEN["jax"]
        return {
            key: value[name] if isinstance(value, dict) and name in value else value
            for key, value in shared.items()
        }
    return SEEN[name.lower().replace(" on ", "_")]


FRAMEWORKS = [
    "torch", "Keras on torch", "Keras on TensorFlow", "Keras on JAX", "TensorFlow", "Flax", "Haiku",
    "Equinox", "Paddle", "MLX", "tinygrad", "tridrop",
]  # fmt: skip
RATES = ("0.001", "0.01", "0.1")


def test_no_cell_is_empty():
    assert len(TABLES) == 8
    for heading, rows in TABLES.items():
        width = len(rows[0])
        for cells in rows[1:]:
            assert len(cells) in (width, width + 1), (heading, cells)
            assert all(cells), (heading, cells)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_shares_that_are_dropped(name):
    heading, special = "What is dropped", {"TensorFlow", "Keras on TensorFlow"}
    for dtype in ("float32", "float16", "bfloat16"):
        seen = [str(facts(name)["drawn"][f"{dtype}, p = {p}"]["rate"]) for p in RATES]
        if name in special and dtype != "float32":
            assert row(heading, f"{dtype}, {name}") == seen
        else:
            assert seen == ["p"] * 3
    by_xla = SEEN["tensorflow"]["drawn, by XLA"].values()
    assert {drawn["rate"] for drawn in by_xla} == {"p"}


def test_shares_under_other_settings():
    heading = "What is dropped"
    for default, seen in SEEN["tinygrad"]["of float32, DEFAULT_FLOAT of 16 bits"].items():
        name = f"any dtype, tinygrad with DEFAULT_FLOAT={default}"
        assert row(heading, name) == [f"{share:g}" for share in seen]
    seen = SEEN["jax"]["shares dropped, the rate a bfloat16"]
    assert seen["Haiku"] == seen["Equinox"]
    for name, whose in (("Flax", "Flax"), ("Haiku and Equinox", "Haiku")):
        cells = row(heading, f"float32, {name} where the rate itself is a bfloat16")
        assert cells == [f"{share:g}" for share in seen[whose]]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_what_a_kept_1_becomes(name):
    rows = [r for r in TABLES["What a kept 1 becomes"] if name in r[0].strip("*").split(", ")]
    ((_, *cells, gained),) = rows
    drawn = facts(name)["drawn"]
    wanted = ["float32, p = 0.01", "float16, p = 0.01", *(f"bfloat16, p = {p}" for p in RATES)]
    assert [float(cell) for cell in cells] == [drawn[each]["a kept 1"] for each in wanted]
    gain = facts(name)["bfloat16, p = 0.01, uniform values gain"]
    assert gained == f"{100 * gain:.2f} %"


WORDS = {
    "[0.0, 0.0]": "zeros", "[0.0, 0.0, 0.0, 0.0]": "zeros", "[nan, nan]": "NaN", "None": "None",
    "raises ValueError": "ValueError", "raises RuntimeError": "RuntimeError",
    "0 where dropped": "0", "NaN everywhere": "NaN",
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_edges(name):
    seen = facts(name)
    at_1, gradient, nan = row("At the edges", name)
    assert at_1 == WORDS[str(seen["p = 1"])]
    assert nan == WORDS[seen["NaN"]]
    if at_1 == "ValueError":
        assert gradient == "refused before"
    else:
        assert gradient.partition(":")[0] == WORDS[str(seen["gradient at p = 1"])]


VARIES = {
    "Keras, TensorFlow": ("tensorflow", "noise_shape (4, 1, 16) varies along", "None, 1, None"),
    "Keras": ("keras_torch", "SpatialDropout1D varies along", "None, 1, None"),
    "dropout1d": ("torch", "dropout1d of [N, C, L] varies along", "None, None, 1"),
    "dropout2d": ("torch", "dropout2d of [N, C, H, W] varies along", "None, None, 1, 1"),
    "Flax": ("jax", "Flax, broadcast_dims=(1,) of three varies along", "None, 1, None"),
    "Haiku": ("jax", "Haiku, broadcast_dims=(1,) of three varies along", "None, 1, None"),
    "Paddle": ("paddle", "axis=[0] of three varies along", "None, 1, 1"),
    "MLX": ("mlx", "Dropout2d of [N, H, W, C] varies along", "None, 1, 1, None"),
    "Flax's attention": ("jax", "Flax, attention's mask varies along", "1, 1, None, None"),
}


@pytest.mark.parametrize("name", VARIES)
def test_noise_shapes_that_reproduce_where_a_mask_varies(name):
    framework, fact, noise_shape = VARIES[name]
    seen = SEEN["tridrop"][f"noise_shape ({noise_shape}) varies along"]
    assert SEEN[framework][fact] == seen
    assert f"({noise_shape})" in PAGE


def test_attention():
    torch, paddle, jax = SEEN["torch"], SEEN["paddle"], SEEN["jax"]
    assert torch["attention returns weights"] == "after dropout"
    assert SEEN["tridrop"]["attention returns weights"] == "after dropout"
    assert paddle["attention with need_weights returns weights"] == "after dropout"
    assert paddle["attention returns"] == "Tensor"
    for backend in ("torch", "jax", "tensorflow"):
        assert SEEN[f"keras_{backend}"]["attention returns scores"] == "before dropout"
    assert jax["Flax, attention's weights that are sown"] == "before dropout"
    assert jax["Flax, attention returns"] == "ArrayImpl"
    assert jax["Flax, with broadcast_dropout=False"] == [True] * 4
    assert jax["Equinox, attention"] == {"returns": "ArrayImpl", "heads share a mask": False}
    assert jax["Haiku, attention"] == {"arguments of dropout": [], "returns": "ArrayImpl"}
    assert SEEN["mlx"]["attention"] == {"arguments of dropout": [], "returns": "array"}
    assert SEEN["tensorflow"]["functions of tf.nn with attention in their name"] == []
    for name, fact in (
        ("torch", "scaled_dot_product_attention's mask varies along"),
        ("tinygrad", "scaled_dot_product_attention's mask varies along"),
        ("tridrop", "scaled_dot_product_attention's mask varies along"),
        ("paddle", "attention's mask varies along"),
        ("keras_torch", "attention's mask varies along"),
        ("keras_jax", "attention's mask varies along"),
        ("keras_tensorflow", "attention's mask varies along"),
    ):
        assert SEEN[name][fact] == [True] * 4


AGAIN, ON = "begins again", "goes on"
RESUMED = {
    "torch": ("saved by state_dict and loaded", "saved by get_rng_state and loaded"),
    "keras_torch": ("after save and load", "saved by the SeedGenerator's state and loaded"),
    "keras_jax": ("after save and load", "saved by the SeedGenerator's state and loaded"),
    "keras_tensorflow": ("after save and load", "saved by the SeedGenerator's state and loaded"),
    "tensorflow": ("saved by a checkpoint and loaded", "saved by the step, of stateless_dropout"),
    "paddle": ("saved by state_dict and loaded", "saved by get_rng_state and loaded"),
    "mlx": ("saved by save_weights and loaded", "saved by the step, of mx.random.seed"),
    "tinygrad": ("saved by safe_save and loaded", "saved by the generator's counter and loaded"),
}


def test_what_is_saved():
    for name, (again, on) in RESUMED.items():
        assert (SEEN[name][again], SEEN[name][on]) == (AGAIN, ON), name
    assert set(SEEN["jax"]["saved without the key"].values()) == {AGAIN}
    assert set(SEEN["jax"]["saved as a step, key by fold_in"].values()) == {ON}
    assert SEEN["tridrop"]["saved by the number of the step"] == ON
    assert SEEN["mlx"]["saved by mx.random.state and loaded"] == "raises TypeError"
    rows = TABLES["Seeds and counters"][1:]
    assert all(AGAIN in cells[2] for cells in rows if cells[0] != "**tridrop**")
    assert SEEN["keras_torch"]["call 2 of seed 1 is call 1 of seed 2"] is True
    assert SEEN["jax"]["the mask is the same with jax_enable_x64"] is False


COMPILED = {
    "torch": ("torch", "compiled", "compiled, the mask of eager from the same seed"),
    "TensorFlow": (
        "tensorflow",
        "tf.function",
        "tf.function, the mask of eager from the same seed",
    ),
    "Paddle": ("paddle", "to_static", "to_static, the mask of eager from the same seed"),
    "MLX": ("mlx", "compiled", "compiled, the mask of eager from the same seed"),
    "tinygrad": ("tinygrad", "TinyJit", "TinyJit, the masks of eager from the same seed"),
    "tridrop": ("tridrop", "compiled", "compiled, the mask of eager from the same seed"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_calls(name):
    file, calls, eager = COMPILED[name]
    cells = row("Compilers and export", name)
    assert SEEN[file][calls] in cells[0]
    assert cells[1] == ("yes" if SEEN[file][eager] else "no")


@pytest.mark.parametrize("backend", ["torch", "TensorFlow", "JAX"])
def test_compiled_and_exported_keras(backend):
    seen = SEEN[f"keras_{backend.lower()}"]
    cells = row("Compilers and export", f"Keras on {backend}")
    assert seen["compiled by the backend"]["two calls"] in cells[0]
    assert f"`fit`: {seen['steps of fit']}" in cells[0]
    assert cells[1] == (
        "yes" if seen["compiled by the backend"]["the mask of eager from the same seed"] else "no"
    )
    assert cells[2].endswith(seen["exported"])


def test_compiled_and_exported_jax_and_the_rest():
    for name in ("Flax", "Haiku", "Equinox"):
        assert facts(name)["jit"] == {
            "the mask of eager from the same key": True,
            "a key that is not an argument": "one mask in all calls",
        }
        assert facts(name)["jax.export has the mask of its key"] is True
    assert row("Compilers and export", "Flax, Haiku, Equinox")[1] == "yes"
    assert SEEN["tensorflow"]["XLA"] == "a mask a call"
    exported = SEEN["tensorflow"]["a SavedModel of a function that drops"]
    assert row("Compilers and export", "TensorFlow")[2].endswith(exported)
    assert row("Compilers and export", "Paddle")[2].endswith(SEEN["paddle"]["jit.save in training"])
    assert row("Compilers and export", "MLX")[2].endswith(
        SEEN["mlx"]["export_function in training"]
    )
    state = SEEN["mlx"]["compiled, the random state as inputs and outputs"]
    assert row("Compilers and export", "MLX")[0].endswith(state)
    assert SEEN["tinygrad"]["names of tinygrad with export in them"] == []
    assert SEEN["torch"]["torch.export in training"] == "aten.dropout.default with train=True"
    assert SEEN["tridrop"]["torch.export in evaluation"] == []
    assert "tridrop.forward.default" in SEEN["tridrop"]["torch.export in training"]
    assert SEEN["tridrop"]["ONNX in training"].startswith("raises")


def test_versions_are_those_of_the_results_and_the_requirements():
    text = (PORTING / "requirements.txt").read_text() + (ROOT / "constraints.txt").read_text()
    for name, seen in SEEN.items():
        for package, version in seen["versions"].items():
            assert f"{package.replace('mlx', 'mlx[cpu]')}=={version.partition('+')[0]}" in text, (
                name
            )
            if name != "export":
                assert version.partition("+")[0] in PAGE, (name, package)


def test_ports_are_all_named():
    named = {cells[0].strip("`").rpartition("/")[2] for cells in TABLES["Worked ports"][1:]}
    assert named == {path.name for path in PORTING.glob("port_*.py")}
    assert {path.stem.removesuffix("_facts") for path in PORTING.glob("*_facts.py")} == {
        name.partition("_")[0] for name in SEEN
    }
