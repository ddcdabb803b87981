"""Runs `mlac::Linear16` in onnxruntime through libmlac_ort.so.

    linear16.py LIBRARY FOLDER...

Each folder has problem.json (shapes of x and weight, the weight's type, whether there is a bias) and files x, weight, bias. Weight and bias
are initializers, as numpy has no bf16. Writes out as f32, and refuses an output whose inferred shape is not the one that comes out.

Needs onnx, onnxruntime and numpy: PYTHONPATH=target/runtime/python.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

KINDS = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}


def run(options: onnxruntime.SessionOptions, folder: Path) -> None:
    problem = json.loads((folder / "problem.json").read_text())
    shape, (rows, columns) = problem["x"], problem["weight"]
    names = ["x", "weight"]
    kind = KINDS[problem["kind"]]
    weights = [helper.make_tensor("weight", kind, [rows, columns], (folder / "weight").read_bytes(), raw=True)]
    if problem["bias"]:
        names.append("bias")
        weights.append(helper.make_tensor("bias", TensorProto.FLOAT, [rows], (folder / "bias").read_bytes(), raw=True))
    node = helper.make_node("Linear16", names, ["out"], domain="mlac")
    # The runtime knows the shape of the last output only when it knows that of the operator's.
    behind = helper.make_node("Identity", ["out"], ["behind"])
    axes = [f"n{i}" for i in range(len(shape) - 1)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*axes, columns])]
    outputs = [helper.make_tensor_value_info("behind", TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mlac", 1)]
    graph = helper.make_graph([node, behind], "problem", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inferred = session.get_outputs()[0].shape
    if inferred != [*axes, rows]:
        raise SystemExit(f"{folder}: the runtime infers {inferred}, expected {[*axes, rows]}")
    (out,) = session.run(["behind"], {"x": np.fromfile(folder / "x", np.float32).reshape(shape)})
    if list(out.shape) != [*shape[:-1], rows]:
        raise SystemExit(f"{folder}: out has shape {out.shape}, x {shape}, {rows} rows")
    (folder / "out").write_bytes(out.astype(np.float32).tobytes())


if __name__ == "__main__":
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    session_options.register_custom_ops_library(sys.argv[1])
    for place in sys.argv[2:]:
        run(session_options, Path(place))
