"""Runs `mlac::Mxfp4Experts` in onnxruntime through libmlac_ort.so.

    mxfp4_experts.py LIBRARY FOLDER...

Each folder has problem.json (tensors by name, in the operator's order, and attributes as text) and a file for each tensor. All inputs are
inputs of the session. Writes out as f32.

Needs onnx, onnxruntime and numpy: PYTHONPATH=target/runtime/python.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}


def run(options: onnxruntime.SessionOptions, folder: Path) -> None:
    problem = json.loads((folder / "problem.json").read_text())
    tensors = problem["tensors"]
    inputs = [helper.make_tensor_value_info(t["name"], TYPES[t["dtype"]], t["shape"]) for t in tensors]
    names = [t["name"] for t in tensors]
    attributes = {name: float(text) for name, text in problem["attributes"].items()}
    node = helper.make_node("Mxfp4Experts", names, ["out"], domain="mlac", **attributes)
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mlac", 1)]
    graph = helper.make_graph([node], "problem", inputs, [output])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    arrays = {t["name"]: np.fromfile(folder / t["name"], t["dtype"]).reshape(t["shape"]) for t in tensors}
    (out,) = session.run(["out"], arrays)
    if list(out.shape) != tensors[0]["shape"]:
        raise SystemExit(f"{folder}: out has shape {out.shape}, hidden {tensors[0]['shape']}")
    (folder / "out").write_bytes(out.astype(np.float32).tobytes())


if __name__ == "__main__":
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    session_options.register_custom_ops_library(sys.argv[1])
    for place in sys.argv[2:]:
        run(session_options, Path(place))
