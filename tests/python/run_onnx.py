"""What another ONNX front end says about an exported folder: onnx.checker and Python's onnxruntime, no mlac code.

    python run_onnx.py check FOLDER ..                                   every *.onnx, full checking, one line each
    python run_onnx.py logits FOLDER IO OUT .. --prefill N --steps K     logits of N + K tokens as OUT (f32, C order)
    python run_onnx.py generate FOLDER IDS COUNT .. --operators LIB      COUNT greedy tokens after IDS (1,2,3), a line of JSON

`logits` runs the first N tokens as one prefill from an empty cache and K tokens one by one, feeding each step's
`present*` outputs back as `past*` inputs. IO is a safetensors file with input_ids, attention_mask and position_ids
[batch, seq] i64, seq >= N + K. Any number of folders, or of triples. Prints one line of JSON for each triple:
the shape, and the caches' names, shapes and types after the last step.
Prefill runs prefill.onnx where the folder has one, everything else decoder.onnx. A cache whose axis is called capacity*
is kept in place: one buffer is bound to its input and its output. `--operators` is mlac's library, libmlac_ort.so.

Needs onnx, onnxruntime and numpy: PYTHONPATH=target/runtime/python.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")


def check(folder: Path) -> int:
    import onnx

    files = sorted(folder.glob("*.onnx"))
    if not files:
        print(f"{folder}: expected at least one .onnx file, found none", file=sys.stderr)
        return 2
    failures = 0
    for file in files:
        try:
            onnx.checker.check_model(str(file), full_check=True)
            model = onnx.load(str(file), load_external_data=False)
            opsets = ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import)
            print(f"{file}: ok, {len(model.graph.node)} nodes, opset {opsets}, onnx {onnx.__version__}")
        except Exception as error:  # noqa: BLE001, the checker has no common base class
            failures += 1
            print(f"{file}: {type(error).__name__}: {error}")
    return 1 if failures else 0


def read_integers(path: Path) -> dict[str, np.ndarray]:
    """The I64 tensors of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], np.int64).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "I64"
    }


def present_of(past: str) -> str:
    """The output that a cache input is fed from."""
    if past.startswith("past_key_values."):
        return past.replace("past_key_values.", "present.", 1)
    if past.startswith("past_latent."):
        return past.replace("past_latent.", "present_latent.", 1)
    raise SystemExit(f"input {past!r} is neither {', '.join(TEXT_INPUTS)} nor a cache")


def empty_cache(entry, batch: int) -> np.ndarray:
    """A cache without tokens: the first axis is the batch, the other axis without a fixed size is the past."""
    free = [axis for axis, size in enumerate(entry.shape) if not isinstance(size, int)]
    if len(free) != 2 or free[0] != 0:
        raise SystemExit(f"input {entry.name!r}: expected a free batch and a free past axis, found {entry.shape}")
    shape = [batch if axis == 0 else 0 if axis == free[1] else size for axis, size in enumerate(entry.shape)]
    return np.zeros(shape, TYPES[entry.type])


def opener(folder: Path, operators: Path | None):
    """Sessions of a folder's files, with mlac's operators."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if operators is not None:
        options.register_custom_ops_library(str(operators))
    return lambda name: onnxruntime.InferenceSession(
        str(folder / name), options, providers=["CPUExecutionProvider"]
    )


def kept_window(entry) -> int | None:
    """Of a cache that is kept in place the window, 0 for none; None for a cache that grows."""
    names = [size for size in entry.shape[1:] if isinstance(size, str) and size.startswith("capacity")]
    return int(names[0].partition("_w")[2] or 0) if names else None


class InPlace:
    """A session with caches of a capacity, one buffer each."""

    def __init__(self, session, capacity: int):
        import onnxruntime

        self.session, self.buffers = session, {}
        for entry in session.get_inputs():
            window = kept_window(entry)
            if window is not None:
                shape = [1, window or capacity, entry.shape[2]]
                buffer = np.zeros(shape, TYPES[entry.type])
                self.buffers[entry.name] = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)

    def run(self, inputs: dict, wanted: list[str]) -> dict:
        binding = self.session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(present_of(name), buffer)
        for name in wanted:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        bound = [*(present_of(name) for name in self.buffers), *wanted]
        outputs = binding.get_outputs()
        return {name: outputs[bound.index(name)].numpy() for name in wanted}


def generate(folder: Path, ids: list[int], count: int, operators: Path | None) -> int:
    """The most likely token, again and again."""
    session = opener(folder, operators)
    decoder = session("decoder.onnx")
    inside = InPlace(decoder, len(ids) + count)
    first = session("prefill.onnx") if (folder / "prefill.onnx").is_file() else None
    others = [e for e in decoder.get_inputs() if e.name not in TEXT_INPUTS and e.name not in inside.buffers]
    caches = {entry.name: empty_cache(entry, 1) for entry in others}
    wanted = {entry.name for entry in decoder.get_inputs()}
    tokens, past, new = [], 0, list(ids)
    for _ in range(count):
        total = past + len(new)
        inputs = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
            **caches,
        }
        inputs = {name: value for name, value in inputs.items() if name in wanted}
        names = ["logits", *(present_of(name) for name in caches)]
        if inside.buffers:
            results = inside.run(inputs, names)
        else:
            running = first if past == 0 and first is not None else decoder
            results = dict(zip(names, running.run(names, inputs)))
        caches = {name: results[present_of(name)] for name in caches}
        tokens.append(int(results["logits"][0, -1].argmax()))
        past, new = total, tokens[-1:]
    print(json.dumps({"tokens": tokens, "kept": sorted(inside.buffers)}), flush=True)
    return 0


def logits(folder: Path, io: Path, out: Path, prefill: int, steps: int) -> int:
    import onnxruntime

    session = opener(folder, None)
    decoder = session("decoder.onnx")
    first = session("prefill.onnx") if (folder / "prefill.onnx").is_file() else decoder
    tensors = read_integers(io)
    ids, mask, positions = (tensors[name] for name in TEXT_INPUTS)
    if ids.shape[1] < prefill + steps:
        raise SystemExit(f"{io}: expected {prefill + steps} tokens, found {ids.shape[1]}")
    caches = {
        entry.name: empty_cache(entry, ids.shape[0]) for entry in decoder.get_inputs() if entry.name not in TEXT_INPUTS
    }
    pieces, start = [], 0
    for end in [prefill, *range(prefill + 1, prefill + steps + 1)]:
        running = first if start == 0 else decoder
        inputs = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
            **caches,
        }
        wanted = {entry.name for entry in running.get_inputs()}
        names = ["logits", *(present_of(past) for past in caches)]
        results = dict(zip(names, running.run(names, {name: inputs[name] for name in inputs if name in wanted})))
        pieces.append(results["logits"].astype(np.float32))
        caches = {past: results[present_of(past)] for past in caches}
        start = end
    found = np.concatenate(pieces, axis=1)
    out.write_bytes(np.ascontiguousarray(found, dtype="<f4").tobytes())
    report = {
        "shape": list(found.shape),
        "caches": [{"name": name, "shape": list(c.shape), "dtype": str(c.dtype)} for name, c in caches.items()],
        "onnxruntime": onnxruntime.__version__,
    }
    print(json.dumps(report), flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check")
    checking.add_argument("folders", type=Path, nargs="+")
    running = commands.add_parser("logits")
    running.add_argument("paths", type=Path, nargs="+", metavar="FOLDER IO OUT")
    running.add_argument("--prefill", type=int, required=True)
    running.add_argument("--steps", type=int, required=True)
    speaking = commands.add_parser("generate")
    speaking.add_argument("paths", nargs="+", metavar="FOLDER IDS COUNT")
    speaking.add_argument("--operators", type=Path)
    args = parser.parse_args()
    if args.command == "generate":
        if len(args.paths) % 3:
            parser.error(f"expected triples of FOLDER IDS COUNT, found {len(args.paths)} arguments")
        triples = zip(*(iter(args.paths),) * 3)
        return max(
            generate(Path(folder), [int(i) for i in ids.split(",")], int(count), args.operators)
            for folder, ids, count in triples
        )
    if args.command == "check":
        return max([check(folder) for folder in args.folders])
    if len(args.paths) % 3:
        parser.error(f"expected triples of FOLDER IO OUT, found {len(args.paths)} paths")
    return max(logits(*paths, args.prefill, args.steps) for paths in zip(*(iter(args.paths),) * 3))


if __name__ == "__main__":
    sys.exit(main())
