"""Dropout on the way to onnxruntime, OpenVINO, TVM and PT2E."""

import io

import facts
import numpy as np
import onnx
import onnxruntime
import openvino
import torch
import tvm
from onnx import TensorProto, helper
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

ONES = np.ones((4, 16), np.float32)


def graph(after):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Dropout", ["a", "ratio", "on"], ["d"]),
    ]
    if after:
        nodes.append(helper.make_node("Relu", ["d"], ["y"]))
    names = ("x", nodes[-1].output[0])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 16]) for n in names]
    constants = [
        helper.make_tensor("ratio", TensorProto.FLOAT, [], [0.5]),
        helper.make_tensor("on", TensorProto.BOOL, [], [True]),
    ]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def zeros(out):
    return "nothing dropped" if not (np.asarray(out) == 0).any() else "dropped"


def runtime(after, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(
        graph(after).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kept = np.stack([session.run(None, {"x": ONES})[0] != 0 for _ in range(200)])
    first = kept[:, 0, 0]
    return {
        "nothing dropped": bool(kept.all()),
        "element 0 is the same in 200 runs": bool((first[1:] != first[:-1]).sum() <= 1),
    }


def by_openvino():
    model = openvino.Core().read_model(graph(True).SerializeToString())
    return zeros(openvino.compile_model(model, "CPU")(ONES)[0])


def by_openvino_from_torch():
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.ReLU()).train()
    program = torch.export.export(model, (torch.from_numpy(ONES),))
    return zeros(openvino.compile_model(openvino.convert_model(program), "CPU")(ONES)[0])


def by_tvm():
    machine = relax.VirtualMachine(relax.build(from_onnx(graph(True)), target="llvm"), tvm.cpu())
    return zeros(machine["main"](tvm.runtime.tensor(ONES)).numpy())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        p = 0.5 if self.training else 0.0
        return self.drop(nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p))


def by_pt2e():
    module = torch.export.export(Attention().train(), (torch.randn(2, 2, 4, 8),)).module()
    move_exported_model_to_eval(module)
    calls = {
        str(node.target): node.args for node in module.graph.nodes if "aten" in str(node.target)
    }
    return {
        "nn.Dropout is on": calls["aten.dropout.default"][2],
        "attention's dropout_p": calls["aten.scaled_dot_product_attention.default"][4],
    }


def by_onnx_from_torch(**options):
    """The training_mode of the Dropout that torch's exporter writes, of a model in training."""
    module, target = nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).train(), io.BytesIO()
    program = torch.onnx.export(
        module, (torch.from_numpy(ONES),), None if options["dynamo"] else target,
        training=torch.onnx.TrainingMode.TRAINING, **options,
    )  # fmt: skip
    model = program.model_proto if program is not None else onnx.load_from_string(target.getvalue())
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    (drop,) = (node for node in model.graph.node if node.op_type == "Dropout")
    return f"Dropout, training_mode {bool(constants[drop.input[2]])}"


facts.report(
    "export",
    ["onnxruntime", "openvino", "apache-tvm", "torch", "torchao"],
    {
        "ONNX, from torch in training, torch.export": facts.said(
            lambda: by_onnx_from_torch(dynamo=True)
        ),
        "ONNX, from torch in training, TorchScript": facts.said(
            lambda: by_onnx_from_torch(dynamo=False)
        ),
        "onnxruntime, between two nodes": runtime(True, "ORT_ENABLE_ALL"),
        "onnxruntime, between two nodes, optimisations off": runtime(True, "ORT_DISABLE_ALL"),
        "onnxruntime, last": runtime(False, "ORT_ENABLE_ALL"),
        "OpenVINO, from ONNX": facts.said(by_openvino),
        "OpenVINO, from torch.export in training": facts.said(by_openvino_from_torch),
        "TVM, from ONNX": facts.said(by_tvm),
        "PT2E, after move_exported_model_to_eval": by_pt2e(),
    },
)
