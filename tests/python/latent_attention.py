"""`mlac::LatentAttention` from Python's onnxruntime: no mlac code but the library of operators.

    python latent_attention.py LIBRARY FOLDER ..

Each FOLDER has problem.json (tensors in the operator's order, attributes) and a file for each tensor: its numbers,
floats as f32. Writes sums, lse and cache_out as f32. A cache in f32 or f16 is bound to its output (kept in place), and the
copying run must give the same bytes; bf16 comes and goes through Cast, for numpy has no such type.

Needs onnx, onnxruntime and numpy: PYTHONPATH=target/runtime/python.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

INPUTS = ("query", "new_rows", "cache", "past_lengths", "page_table", "sinks", "tree_mask", "key_mask")
OUTPUTS = ("sums", "cache_out", "lse")
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


def model(tensors: dict, attributes: dict) -> onnx.ModelProto:
    narrow = tensors["query"]["dtype"] == "bfloat16"
    kind = TYPES["float32" if narrow else tensors["query"]["dtype"]]
    nodes, names, inputs = [], [], []
    for name in INPUTS:
        if name not in tensors:
            names.append("")
            continue
        dtype = tensors[name]["dtype"]
        inputs.append(helper.make_tensor_value_info(name, TYPES.get(dtype, kind), tensors[name]["shape"]))
        if dtype == "bfloat16":
            nodes.append(helper.make_node("Cast", [name], [f"{name}_bf16"], to=TensorProto.BFLOAT16))
            name = f"{name}_bf16"
        names.append(name)
    while not names[-1]:
        names.pop()
    made = ["sums_bf16", "cache_bf16_out", "lse"] if narrow else list(OUTPUTS)
    nodes.append(helper.make_node("LatentAttention", names, made, domain="mlac", **attributes))
    if narrow:
        nodes.append(helper.make_node("Cast", [made[0]], ["sums"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Cast", [made[1]], ["cache_out"], to=TensorProto.FLOAT))
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT if n == "lse" else kind, None) for n in OUTPUTS]
    graph = helper.make_graph(nodes, "problem", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mlac", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def run(library: str, folder: Path) -> None:
    problem = json.loads((folder / "problem.json").read_text())
    tensors = {tensor["name"]: tensor for tensor in problem["tensors"]}
    arrays = {}
    for name, tensor in tensors.items():
        stored = tensor["dtype"] if tensor["dtype"].startswith("int") else "float32"
        wanted = "float32" if tensor["dtype"] == "bfloat16" else tensor["dtype"]
        array = np.fromfile(folder / name, stored).reshape(tensor["shape"])
        arrays[name] = np.ascontiguousarray(array.astype(wanted))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(library)
    graph = model(tensors, problem["attributes"]).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    results = dict(zip(OUTPUTS, session.run(list(OUTPUTS), arrays)))
    if tensors["query"]["dtype"] != "bfloat16":
        binding = session.io_binding()
        cache = onnxruntime.OrtValue.ortvalue_from_numpy(arrays["cache"].copy())
        for name, array in arrays.items():
            if name == "cache":
                binding.bind_ortvalue_input(name, cache)
            else:
                binding.bind_cpu_input(name, array)
        binding.bind_output("sums")
        binding.bind_ortvalue_output("cache_out", cache)
        binding.bind_output("lse")
        session.run_with_iobinding(binding)
        sums, _, lse = (value.numpy() for value in binding.get_outputs())
        kept = {"sums": sums, "cache_out": cache.numpy(), "lse": lse}
        for name in OUTPUTS:
            if kept[name].tobytes() != results[name].tobytes():
                raise SystemExit(f"{folder}: {name} in place differs from {name} of a copied cache")
    for name in OUTPUTS:
        (folder / name).write_bytes(results[name].astype(np.float32).tobytes())


if __name__ == "__main__":
    for place in sys.argv[2:]:
        run(sys.argv[1], Path(place))
