"""No loop reads or writes memory that is not its tensors': what is lost, exchanged, or interrupted.

What could end a process runs in one of its own (memory_probes.py, interrupts.py).
"""

import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

import tridrop
from tridrop.backends.cpu import masks, serving, threads, torch_library
from tridrop.backends.cpu import memory as cpu_memory
from tridrop.backends.cpu.own_threads import share
from tridrop.base import memory

HERE = Path(__file__).parents[1]
needs_numba = pytest.mark.skipif(not serving.can_serve(), reason="numba does not serve CPU tensors")


def child(script, *arguments, **environment):
    """Run a script of this folder with the package that is tested here."""
    own = {"PYTHONPATH": str(Path(tridrop.__file__).parents[1]), **environment}
    return subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("loops", [pytest.param("numba", marks=needs_numba), "torch"])
def test_tensors_without_their_memory_are_refused(loops):
    ran = child("memory_probes.py", "", 1 if loops == "numba" else 3, TRIDROP_CPU=loops)
    lines = ran.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)
    assert ran.returncode == 0, f"{ran.returncode} at {lines[-1:]}: {ran.stderr[-2000:]}"
    word, count, failed = lines[-1].split()
    assert (word, failed) == ("done", "0")
    assert int(count) > 1000


def test_kernels_read_tensors_of_any_strides():
    """Also seeds, statistics and log-sum-exps, which a kernel reads from their addresses on."""
    interpreter = {"TRITON_INTERPRET": "1", "TRIDROP_BACKEND": "triton"}
    ran = child("memory_probes.py", "spread", 5, **interpreter)
    *lines, last = ran.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)
    assert ran.returncode == 0, ran.stderr[-2000:]
    word, count, failed = last.split()
    assert (word, failed) == ("done", "0")
    assert int(count) > 80


@needs_numba
@pytest.mark.parametrize("of", [[], ["own"]], ids=["torch's threads", "own threads"])
def test_interrupts_free_no_memory_that_threads_write_to(of):
    ran = child("interrupts.py", 600, 1, *of)
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stderr[-2000:]}"
    interrupted = int(ran.stdout.split()[1])
    assert interrupted > 200


# ------------------------------------------------------------------------- how kernels ask for it


needs_table = pytest.mark.skipif(
    not torch_library.table, reason="torch's library has no C interface here"
)


def every_kernel():
    """The kernels by one call each, with all operands that they read; returns the results."""
    torch.manual_seed(0)
    x, r = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    b, s, w, n = (torch.rand(8, requires_grad=True) for _ in range(4))
    found = [tridrop.dropout_add(x, r, 0.3, bias=b, layer_scale=s, activation="gelu", seed=1)]
    vectors = {"bias": b, "layer_scale": s, "p": 0.3, "seed": 2}
    found.extend(tridrop.dropout_add_layer_norm(x, r, w, n, prenorm=True, **vectors))
    found.append(tridrop.softmax_dropout(x[None, None], 0.3, seed=3))
    incoming = list(map(torch.ones_like, found))
    found.extend(torch.autograd.grad(found, (x, r, b, s, w, n), incoming))
    found.append(tridrop.keep_mask(4, (6, 8), 0.3))
    found.append(tridrop.attention_keep_mask(5, (1, 2, 6, 8), 0.3))
    return found


def test_torchs_table_is_found():
    """It is wherever torch's library lies on Linux, and says of dtypes what tridrop counts on."""
    if sys.platform.startswith("linux"):
        assert torch_library.table
        assert torch_library._table[torch_library.CPU] >= 0
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
        numbers = set(map(torch_library.dtype_number, dtypes))
        assert len(numbers) == 4  # one for each
        assert min(numbers) >= 0


@needs_numba
@needs_table
def test_kernels_ask_torch_themselves(monkeypatch):
    """No plain tensor takes the slow way, and both ways give the same."""
    every_kernel()
    with monkeypatch.context() as patched:
        patched.setattr(threads, "places", lambda *_: pytest.fail("a kernel refused a tensor"))
        quick = every_kernel()
    monkeypatch.setattr(threads, "table", 0)
    for q, slow in zip(quick, every_kernel(), strict=True):
        assert torch.equal(q, slow)


ROWS = torch.arange(64.0).view(8, 8)


@needs_numba
@needs_table
@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (lambda: ROWS[2:], True),  # some way into its storage
        (lambda: ROWS.bfloat16(), True),
        (lambda: ROWS.half(), True),
        (lambda: torch.nn.Parameter(ROWS.clone()), True),
        (lambda: ROWS.double(), False),
        (lambda: ROWS.long(), False),
        (lambda: ROWS.mT, False),
        (lambda: ROWS[:, 1:], False),
        (lambda: ROWS[:1].expand(8, 8), False),
        (lambda: ROWS.to_sparse(), False),
        (lambda: ROWS.to("meta"), False),
        (lambda: torch._efficientzerotensor((8, 8)), False),
        (lambda: torch._neg_view(ROWS), False),
    ],
    ids=["offset", "bf16", "fp16", "parameter", "fp64", "int64", "transposed", "columns",
         "expanded", "sparse", "meta", "zeros", "negated"],
)  # fmt: skip
def test_a_kernel_takes_what_python_would_take(make, asked, capfd):
    """Where it refuses a tensor, ``base.memory.place`` copies it, or says what is wrong."""
    t = make()
    reads = cpu_memory.Reads.of(cpu_memory.Operand("t", t.numel()))
    seen = []

    def kernel(team, work, given, wanted, arguments):
        seen.append((wanted, probe(team, work, given, wanted, arguments)))
        return seen[-1][1]

    # The kernel of masks does nothing for no parts, whatever it is given but the places.
    masks.keep_mask(torch.tensor([1, 0]), (1, 8), 1 << 30)
    probe = serving.kernels().keep_rows
    none = threads.Parts((0, 0, 0, 1, 1), False)
    arguments = (8, (0, 0, 0, 0, -1, 0), 0)
    try:
        threads.share(kernel, none, (t,), reads, arguments, None)
        placed = True
    except (TypeError, ValueError):
        placed = False
    assert seen[0] == (reads.wanted, 0 if asked else -1)
    try:
        assert memory.place(t, t.numel(), "t")[1][0] > 0
        assert placed
    except (TypeError, ValueError):
        assert not placed
    assert capfd.readouterr() == ("", "")  # torch's C interface reports errors, some versions aloud


@needs_numba
@needs_table
@pytest.mark.parametrize("kind", ["freed", "shorter"])
def test_a_kernel_refuses_a_tensor_without_its_memory(kind):
    x = torch.ones(8, 8)
    tridrop.dropout(x, 0.5, seed=1)
    x.untyped_storage().resize_(0 if kind == "freed" else 255)
    with pytest.raises(ValueError, match="which needs a storage of 256 bytes"):
        tridrop.dropout(x, 0.5, seed=1)


# ------------------------------------------------------------------------------------- messages


def test_a_tensor_without_memory_is_named():
    x, r = torch.ones(8, 8), torch.ones(8, 8)
    r.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"residual is a float32 tensor of shape \[8, 8\]"):
            tridrop.dropout_add(x, r, 0.5, seed=1)


@pytest.mark.parametrize("seed", [1, torch.tensor([1, 0])])
def test_what_was_saved_is_named(seed):
    x = torch.ones(8, 8, requires_grad=True)
    for _ in range(2):
        out = tridrop.activation_dropout(x, 0.5, activation="gelu", seed=seed)
        x.data = torch.ones(4, 8)
        with pytest.raises(ValueError, match=r"given x as a float32 tensor of shape \[4, 8\]"):
            out.sum().backward()
        x.data = torch.ones(8, 8)


OPS = {
    "dropout": lambda x, b: tridrop.dropout(x, 0.5, seed=1),
    "activation": lambda x, b: tridrop.activation_dropout(
        x, 0.5, activation="gelu", bias=b, seed=1
    ),
    "activation alone": lambda x, b: tridrop.activation_dropout(x, 0.0, activation="gelu"),
    "norm": lambda x, b: tridrop.dropout_add_layer_norm(
        x, x, b, b, bias=b, layer_scale=b, p=0.5, seed=1
    ),
    "softmax": lambda x, b: tridrop.softmax_dropout(x, 0.5, seed=1),
    "masked softmax": lambda x, b: tridrop.softmax_dropout(x, 0.5, mask=b, seed=1),
}
OTHERS = {
    "shorter": lambda t: t[:1].clone(),
    "flat": lambda t: t.reshape(1, 1, -1).clone(),
    "another dtype": lambda t: t.to(torch.float16 if t.dtype == torch.bfloat16 else torch.bfloat16),
    "fp64": lambda t: t.double(),
    "meta": lambda t: t.to("meta"),
}


@needs_numba
@pytest.mark.parametrize("asked", [pytest.param(True, marks=needs_table), False])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", OPS)
def test_what_was_saved_is_compared(name, other, asked, monkeypatch):
    """By kernels or, where these cannot ask torch, in Python: with the same error."""
    if not asked:
        monkeypatch.setattr(threads, "table", 0)
    x = torch.randn(4, 8, requires_grad=True)
    for vector in (torch.ones(8), torch.ones(8, dtype=torch.bfloat16)):
        out = OPS[name](x, vector.requires_grad_())  # its node ends with it
        for changed in range(len(out.grad_fn.saved_tensors)):
            for _ in range(2):  # the second call is known
                packed = []

                def pack(t, packed=packed):
                    packed.append(t)
                    return len(packed) - 1

                def unpack(i, packed=packed, changed=changed):
                    return other(packed[i]) if i == changed else packed[i]

                with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                    out = OPS[name](x, vector)
                if changed >= len(packed):
                    break  # it is None
                with pytest.raises(ValueError, match="backward is given"):
                    out.sum().backward()
        assert packed


def test_a_tensor_that_is_not_strided_is_named():
    with pytest.raises(TypeError, match=r"x is a float32 tensor .* in layout torch.sparse_coo"):
        memory.whole(torch.eye(3).to_sparse(), "x")


@needs_numba
def test_operators_take_no_more_than_there_is():
    x, bias = torch.ones(4, 8), torch.ones(3)
    with pytest.raises(ValueError, match="bias is a float32 tensor of shape"):
        torch.ops.tridrop.forward(
            x, bias, None, None, torch.tensor([1, 2]), None, "gelu", 0.5, 0.0, [], [], [], "mask",
            "cpu",
        )  # fmt: skip


# -------------------------------------------------------------------------------------- sharing


PARTS = 40


class Failure(BaseException):
    """What no code expects."""


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_part_that_fails_ends_the_others(where):
    main, begun, running = threading.get_ident(), [], []

    def call(number):
        begun.append(number)
        running.append(number)
        time.sleep(0.002)
        running.pop()
        if (threading.get_ident() == main) == (where == "here"):
            raise Failure(number)

    for _ in range(5):
        begun.clear()
        with pytest.raises(Failure):
            share(PARTS, 3, call, None)
        assert not running
        assert len(begun) < PARTS
        count = len(begun)
        time.sleep(0.005)
        assert len(begun) == count


def test_what_is_shared_is_let_go():
    class Held:
        pass

    held, freed = Held(), []
    seen = weakref.ref(held, lambda _: freed.append(True))
    share(PARTS, 3, lambda _: None, held)
    assert seen() is held
    del held
    for _ in range(100):
        if freed:
            break
        time.sleep(0.01)
    assert freed


def test_all_parts_are_done_once():
    done = []
    for _ in range(200):
        done.clear()
        share(PARTS, 3, done.append, None)
        assert sorted(done) == list(range(PARTS))
