"""ONNX export of swapped models: standard operators and the original's results, or an error."""

import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_models import MODELS, W, close, pair
from torch import nn

import tridrop

NAMES = ["block", "attention", "weights", "causal", "encoder layer", "padded", "BERT"]
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def exported(model: nn.Module, x: torch.Tensor, dynamo: bool = True, **options) -> onnx.ModelProto:
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (x,), dynamo=True, verbose=False, **options).save(file)
    else:
        torch.onnx.export(model, (x,), file, dynamo=False, **options)
    return onnx.load_from_string(file.getvalue())


def run(program: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    """By onnxruntime, which knows nothing of tridrop."""
    session = onnxruntime.InferenceSession(
        program.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (name,) = (given.name for given in session.get_inputs())
    found = session.run(None, {name: x.numpy()})[0]
    assert isinstance(found, np.ndarray)
    return torch.from_numpy(found)


def held(program: onnx.ModelProto, model: nn.Module, x: torch.Tensor) -> None:
    onnx.checker.check_model(program)
    assert {node.domain for node in program.graph.node} == {""}  # ONNX's own
    assert not program.functions
    assert "Dropout" not in {node.op_type for node in program.graph.node}
    close(run(program, x), model.eval()(x).detach())


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_in_onnx_is_that_of_the_original(name):
    model, swapped, x = pair(name)
    held(exported(swapped.eval(), x), model, x)


def test_layer_norm_and_gelu_stay_single_operators():
    _, swapped, x = pair("block")
    program = exported(swapped.eval(), x)
    kinds = {node.op_type for node in program.graph.node}
    assert {"LayerNormalization", "Gelu"} <= kinds


@pytest.mark.parametrize("name", ["block", "attention", "encoder layer"])
def test_an_evaluation_in_onnx_takes_other_shapes(name):
    model, swapped, x = pair(name)
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    program = exported(swapped.eval(), x, dynamic_shapes=(dims,))
    other = torch.randn(3, 7, W)
    close(run(program, other), model.eval()(other).detach())


@pytest.mark.parametrize("name", ["block", "weights", "BERT"])
def test_the_exporter_by_jit_traces_gives_the_same(name):
    model, swapped, x = pair(name)
    swapped.eval().requires_grad_(False)
    held(exported(swapped, x, dynamo=False, opset_version=17), model, x)


@pytest.mark.parametrize("name", [*MODELS])
def test_training_in_onnx_says_why_not_and_what_to_do(name):
    _, swapped, x = pair(name)
    with pytest.raises(Exception, match=r"model\.eval\(\)") as caught:  # of the exporter's own type
        exported(swapped, x)
    assert "tridrop.unswap(model)" in str(caught.value)
    assert "cannot be exported to ONNX" in str(caught.value)


def test_training_in_the_exporter_by_jit_traces_says_so_as_well():
    _, swapped, x = pair("block")
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        exported(swapped, x, dynamo=False, training=torch.onnx.TrainingMode.TRAINING)


def test_after_unswap_a_training_graph_is_torch_s():
    model, swapped, x = pair("block")
    tridrop.unswap(swapped)
    kinds = [[n.op_type for n in exported(m, x).graph.node] for m in (model, swapped)]
    assert kinds[0] == kinds[1]
