"""Writes the tiny ONNX files of this folder. Run: PYTHONPATH=target/runtime/python python3 engines/tests/data/make.py

toy/decoder.onnx and toy/prefill.onnx: a "decoder" of two layers, one with keys and values
[batch, 2, past, 2], one with a latent [batch, past, 3]; whole numbers, so every result is exact.
  x = E[ids]                                  [batch, seq, 4]
  present.0.key = past ++ x as 2 heads        present.0.value = past ++ 2x as 2 heads
  present_latent.1 = past ++ x[..., :3]
  logits[t] = (sum over s <= t of latent[s]) @ W + position[t]     (+ 1000 in prefill.onnx)
The attention mask multiplies the latents, so a mask of the wrong length cannot pass.
"""
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

HERE = Path(__file__).parent


def value(name, kind, shape):
    return h.make_tensor_value_info(name, kind, shape)


def toy(bonus):
    e = (np.arange(28).reshape(7, 4) % 5 - 2).astype(np.float32)
    w = (np.arange(21).reshape(3, 7) % 4 - 1).astype(np.float32)
    const = {
        "E": e, "W": w, "two": np.float32(2), "bonus": np.float32(bonus), "one": np.int64(1),
        "heads": np.array([0, 0, 2, 2], np.int64), "zero1": np.array([0], np.int64), "three1": np.array([3], np.int64),
        "axis1": np.array([1], np.int64), "axis2": np.array([2], np.int64), "end1": np.array([2**31 - 1], np.int64),
    }
    nodes = [
        h.make_node("Gather", ["E", "input_ids"], ["x"]),
        h.make_node("Reshape", ["x", "heads"], ["xh"]),
        h.make_node("Transpose", ["xh"], ["k"], perm=[0, 2, 1, 3]),
        h.make_node("Mul", ["k", "two"], ["v"]),
        h.make_node("Concat", ["past_key_values.0.key", "k"], ["present.0.key"], axis=2),
        h.make_node("Concat", ["past_key_values.0.value", "v"], ["present.0.value"], axis=2),
        h.make_node("Slice", ["x", "zero1", "three1", "axis2"], ["c"]),
        h.make_node("Concat", ["past_latent.1", "c"], ["present_latent.1"], axis=1),
        h.make_node("Cast", ["attention_mask"], ["mask"], to=T.FLOAT),
        h.make_node("Unsqueeze", ["mask", "axis2"], ["mask3"]),
        h.make_node("Mul", ["present_latent.1", "mask3"], ["masked"]),
        h.make_node("CumSum", ["masked", "one"], ["sums"]),
        h.make_node("Shape", ["past_latent.1"], ["past"], start=1, end=2),
        h.make_node("Slice", ["sums", "past", "end1", "axis1"], ["seen"]),
        h.make_node("MatMul", ["seen", "W"], ["scores"]),
        h.make_node("Cast", ["position_ids"], ["positions"], to=T.FLOAT),
        h.make_node("Unsqueeze", ["positions", "axis2"], ["positions3"]),
        h.make_node("Add", ["scores", "positions3"], ["placed"]),
        h.make_node("Add", ["placed", "bonus"], ["logits"]),
    ]
    kv, lat = ["batch", 2, "past", 2], ["batch", "past", 3]
    kv2, lat2 = ["batch", 2, "total", 2], ["batch", "total", 3]
    graph = h.make_graph(
        nodes, "toy",
        [value("input_ids", T.INT64, ["batch", "seq"]), value("position_ids", T.INT64, ["batch", "seq"]),
         value("attention_mask", T.INT64, ["batch", "total"]), value("past_key_values.0.key", T.FLOAT, kv),
         value("past_key_values.0.value", T.FLOAT, kv), value("past_latent.1", T.FLOAT, lat)],
        [value("logits", T.FLOAT, ["batch", "seq", 7]), value("present.0.key", T.FLOAT, kv2),
         value("present.0.value", T.FLOAT, kv2), value("present_latent.1", T.FLOAT, lat2)],
        [nh.from_array(np.asarray(a), n) for n, a in const.items()],
    )
    return save(graph, "toy/" + ("prefill" if bonus else "decoder") + ".onnx")


def save(graph, name, extra=()):
    model = h.make_model(graph, ir_version=10, opset_imports=[h.make_opsetid("", 17), *extra])
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    if not extra:
        onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def one_node(name, domain, op, extra=()):
    """y = op(x) in f16: what the reader of node domains is tried on."""
    graph = h.make_graph(
        [h.make_node(op, ["x"], ["y"], domain=domain)], "one",
        [value("x", T.FLOAT16, ["batch", 4])], [value("y", T.FLOAT16, ["batch", 4])],
    )
    save(graph, name, extra)


def nested():
    """A foreign node inside a branch of an If, where a scan of the top level misses it."""
    out = value("b", T.FLOAT16, None)
    then = h.make_graph([h.make_node("LatentAttention", ["x"], ["b"], domain="mlac")], "then", [], [out])
    other = h.make_graph([h.make_node("Identity", ["x"], ["b"])], "else", [], [out])
    graph = h.make_graph(
        [h.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)], "nested",
        [value("c", T.BOOL, []), value("x", T.FLOAT16, [4])], [value("y", T.FLOAT16, [4])],
    )
    save(graph, "foreign_nested.onnx", [h.make_opsetid("mlac", 1)])


def unsupported():
    """Two operators of the standard that TensorRT does not have: both must be in the error."""
    graph = h.make_graph(
        [h.make_node("Bernoulli", ["x"], ["a"], name="coin"), h.make_node("Multinomial", ["x"], ["b"], name="dice")],
        "unsupported", [value("x", T.FLOAT, [2, 4])],
        [value("a", T.FLOAT, [2, 4]), value("b", T.INT32, [2, 1])],
    )
    save(graph, "unsupported.onnx")


toy(0)
toy(1000)
one_node("half.onnx", "", "Exp")
one_node("foreign.onnx", "mlac", "LatentAttention", [h.make_opsetid("mlac", 1)])
unsupported()
nested()
