"""The private names of torch that tridrop touches: each does what torch_private.py says, and no
other module reaches for one."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tridrop
from tridrop.base import torch_private as private

PACKAGE = Path(tridrop.__file__).parent


def reaches(tree: ast.AST) -> list[tuple[int, str]]:
    """The private names of torch that a module's code names: by a path, or by an import."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            paths = [ast.unparse(node)]
        else:
            continue
        for path in paths:
            first, *names = path.split(".")
            private_name = any(n.startswith("_") and not n.startswith("__") for n in names)
            if first in ("torch", "nn", "forward_ad", "profiler", "F") and private_name:
                found.append((node.lineno, path))
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import torch._dynamo",
        "from torch._functorch import config",
        "from torch.utils.checkpoint import _CheckpointFrame",
        "torch._C._len_torch_dispatch_stack()",
        "base = nn.modules.dropout._DropoutNd",
        "forward_ad._current_level >= 0",
    ],
)
def test_the_search_finds_every_way_to_a_private_name(text):
    assert reaches(ast.parse(text))


def test_no_other_module_reaches_for_a_private_name_of_torch():
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "torch_private.py"
        for line, name in reaches(ast.parse(path.read_text()))
    ]
    assert not found, f"put these into tridrop/base/torch_private.py: {found}"


def test_what_is_gone_raises_and_says_what_it_was_for():
    gone = private.Interface("torch._C._no_such_name", "show an error")
    with pytest.raises(ImportError, match=r"has no torch\._C\._no_such_name.*to show an error"):
        private.require(gone)


def test_every_path_that_the_module_names_is_in_its_list():
    """Those of its functions too, which are looked up when they are called."""
    listed = {interface.path for interface in private.INTERFACES}
    optional = {"torch._functorch.config", "torch.distributed._functional_collectives",
                "torch.cuda._sleep"}  # fmt: skip
    tree = ast.parse((PACKAGE / "base" / "torch_private.py").read_text())
    named = {path for _, path in reaches(tree)}
    named = {path.replace("forward_ad.", "torch.autograd.forward_ad.", 1)
             if path.startswith("forward_ad.") else path for path in named}  # fmt: skip
    named = {path.replace("profiler.", "torch.autograd.profiler.", 1)
             if path.startswith("profiler.") else path for path in named}  # fmt: skip
    missing = {path for path in named - optional if not any(p.startswith(path) for p in listed)}
    assert not missing


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def test_dispatch_modes():
    assert private.dispatch_modes() == 0
    with FlopCounterMode(display=False):
        assert private.dispatch_modes() > 0
        assert private.watched()
    assert private.dispatch_modes() == 0


def test_transformations_and_their_tensors():
    seen = []

    def f(x):
        seen.append((private.transformation() is not None, private.is_wrapped(x)))
        return x.sum()

    x = torch.ones(2, 3)
    torch.func.vmap(f)(x)
    torch.func.grad(f)(x)
    assert seen == [(True, True), (True, True)]
    assert private.transformation() is None
    assert not private.is_wrapped(x)


def test_batched_gradients():
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(private.is_legacy_batched(grad))
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Identity.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert seen == [True]
    assert not private.is_legacy_batched(x)


def test_a_trace_is_seen():
    seen = []

    def f(x):
        seen.append(private.trace_state() is not None)
        return x + 1

    torch.jit.trace(f, torch.ones(2), check_trace=False)
    assert seen == [True]
    assert private.trace_state() is None


def test_forward_mode_is_seen():
    assert not private.forward_mode()
    with forward_ad.dual_level():
        assert private.forward_mode()
        assert private.watched()
    assert not private.watched()


def test_a_profiler_is_seen():
    assert not private.watched()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert private.watched()


def test_a_running_backward_has_a_number():
    seen = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: seen.append(private.backward_task()))
    assert private.backward_task() == -1
    x.sum().backward()
    assert len(seen) == 1
    assert seen[0] >= 0
    assert private.backward_task() == -1


def test_the_innermost_saved_tensor_hooks_are_given():
    assert private.saved_tensor_hooks(False) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (x, "packed"), lambda x: x[0]):
        pack, unpack = private.saved_tensor_hooks(False)[:2]
        x = torch.ones(2)
        assert pack(x)[1] == "packed"
        assert unpack((x, "packed")) is x


def test_a_checkpoint_makes_one_frame_and_calls_its_function_to_recompute(monkeypatch):
    calls = []
    make = private.CheckpointFrame.__init__

    def __init__(self, recompute_fn, *rest, **options):
        def counted(*args, **kwargs):
            calls.append("again")
            return recompute_fn(*args, **kwargs)

        make(self, counted, *rest, **options)

    monkeypatch.setattr(private.CheckpointFrame, "__init__", __init__)
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(torch.sin, x, use_reentrant=False)
    assert calls == []
    y.sum().backward()
    assert calls == ["again"]


def test_the_gradient_of_the_softmax():
    scores = torch.randn(2, 5, requires_grad=True)
    probabilities = scores.softmax(-1)
    dprobabilities = torch.randn(2, 5)
    (expected,) = torch.autograd.grad(probabilities, scores, dprobabilities)
    found = private.aten_softmax_backward(dprobabilities, probabilities, -1, torch.float32)
    torch.testing.assert_close(found, expected)


def test_operators_name_their_arguments():
    dropout = torch.ops.aten.native_dropout
    assert isinstance(dropout, private.OpOverloadPacket)
    assert isinstance(dropout.default, private.OpOverload)
    assert [a.name for a in private.schema_of(dropout.default)] == ["input", "p", "train"]


@pytest.mark.parametrize("backward", [False, True])
def test_attention_of_cpus_has_its_operator(backward, monkeypatch):
    assert private.cpu_attention(backward) is not None
    monkeypatch.setattr(private, "schema_of", lambda operator: [])  # another operator by that name
    assert private.cpu_attention(backward) is None


def test_recurrent_layers_run_on_given_weights():
    layer = nn.GRU(3, 4)
    x, state = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    weights = [w.detach() for w in layer.parameters()]
    found = private.recurrent.gru(x, state, weights, True, 1, 0.0, False, False, False)
    torch.testing.assert_close(found[0], layer(x)[0])


@pytest.mark.parametrize("name", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"])
def test_dropouts_have_one_base(name):
    assert issubclass(getattr(nn, name), private.AnyDropout)


def test_hooks_on_all_modules_are_seen():
    assert not private.has_global_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert private.has_global_hook()
    finally:
        handle.remove()
    assert not private.has_global_hook()


def test_tensors_of_a_compiler_are_known():
    seen = []

    def f(x):
        return x + 1

    def backend(graph, inputs):
        seen.extend(type(x) for x in inputs)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    kinds = []

    class Notes(private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kinds.extend(type(x) for x in private.tree_leaves((args, kwargs)))
            return func(*args, **(kwargs or {}))

    torch.compiler.reset()
    torch.compile(f, backend=aot_autograd(fw_compiler=backend))(torch.ones(2))
    assert seen
    assert all(issubclass(kind, private.FakeTensor) for kind in seen)
    functional = private.FunctionalTensor
    assert issubclass(functional, torch.Tensor)
    with Notes():
        f(torch.ones(2))
    assert torch.Tensor in kinds


def test_the_partitioner_says_whether_it_draws_again():
    from torch._functorch import config

    assert not private.partitioner_redraws()
    with config.patch(activation_memory_budget=0.5):  # monkeypatch would lose the setting
        assert private.partitioner_redraws()
    assert not private.partitioner_redraws()


def test_collectives_that_are_traced():
    collectives = private.functional_collectives()
    assert callable(collectives.broadcast)
    assert callable(collectives.wait_tensor)


def test_a_gpu_can_be_kept_busy():
    if torch.cuda.is_available():
        private.sleep(1000)
        torch.cuda.synchronize()
    else:  # a build without CUDA has the function, and nothing that it calls
        assert callable(torch.cuda._sleep)


@pytest.mark.parametrize("name", private.MODULE_ATTRIBUTES)
def test_modules_have_the_attribute(linear, name):
    assert hasattr(linear, name), f"torch {torch.__version__}: nn.Module has no {name}"


def test_recurrent_layers_hold_their_weights_by_name():
    layer = nn.LSTM(2, 2)
    assert layer._flat_weights_names == [name for name, _ in layer.named_parameters()]
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))


def test_a_hook_steps_aside_for_the_time_it_stands():
    """Of what is around it a selective checkpoint is told, and no longer once it is left."""

    def users(t):
        return t

    def between(t):
        return t

    def inner(t):
        return t

    ends = [private.step_aside(between, (users, users))]
    ends.append(private.step_aside(inner, (between, between)))
    assert inner._checkpoint_internal
    assert inner._user_hooks == between._user_hooks == (users, users)
    for end in reversed(ends):
        end()
    assert not hasattr(inner, "_user_hooks")
    assert not hasattr(between, "_user_hooks")
    private.step_aside(inner, None)()
    assert inner._checkpoint_internal
