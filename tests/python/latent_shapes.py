"""Shapes that Python's onnxruntime infers behind `mlac::LatentAttention`, as JSON: {case: {output: shape}}.

    python latent_shapes.py LIBRARY

Needs onnx and onnxruntime: PYTHONPATH=target/runtime/python.
"""

from __future__ import annotations

import json
import sys

import onnxruntime
from onnx import TensorProto, helper

FLOAT, HALF, INT32, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64


def shapes(library: str, inputs: list, names: list[str]) -> dict[str, list]:
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    # The shape of `behind` is known only when that of `sums` is.
    nodes = [
        helper.make_node("LatentAttention", names, ["sums", "cache_out"], domain="mlac", kv_lora_rank=8, scale=0.5),
        helper.make_node("Transpose", ["sums"], ["behind"], perm=[2, 0, 1, 3]),
    ]
    kind = inputs[0][1]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in ("behind", "cache_out")]
    graph = helper.make_graph(nodes, "shapes", infos, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mlac", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return {output.name: output.shape for output in session.get_outputs()}


def main(library: str) -> None:
    required = [
        ("query", FLOAT, ["batch", "seq", 3, 12]),
        ("new_rows", FLOAT, ["batch", "seq", 12]),
        ("cache", FLOAT, ["batch", "capacity", 12]),
        ("past_lengths", INT32, ["batch"]),
    ]
    names = [name for name, _, _ in required]
    mask = ("key_mask", INT64, ["batch", "total"])
    half = [(name, HALF if kind == FLOAT else kind, shape) for name, kind, shape in required]
    unnamed = [("query", FLOAT, [None, 5, 3, 12]), *required[1:]]
    print(
        json.dumps(
            {
                "required": shapes(library, required, names),
                "half": shapes(library, half, names),
                "left_out": shapes(library, [*required, mask], [*names, "", "", "", "key_mask"]),
                "unnamed": shapes(library, unnamed, names),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
