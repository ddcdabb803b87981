"""Loads converted GPT-OSS checkpoints in transformers with the code that mlac writes beside them.

    python remote_code.py [--only NAME]              synthetic checkpoints (synthetic_mla.py) of the GPT-OSS fixtures
    python remote_code.py CHECKPOINT IO ..           checkpoints that mlac wrote, code included

Each is loaded with `trust_remote_code=True` and compared with the float64 reference on the texts of the fixture's
io.safetensors: as one prefill, token by token across the window's edge, and in pieces. `generate` must give the same text
with and without a cache, also with beams, and the cache must hold latents only. Exit 1 with a list of what does not hold.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
SCRATCH = tempfile.TemporaryDirectory()
# Where transformers copies the code of a checkpoint to.
os.environ["HF_MODULES_CACHE"] = f"{SCRATCH.name}/modules"

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import mla_reference
import synthetic_mla

TESTS = Path(__file__).resolve().parent.parent
PYTHON = TESTS.parent / "mlac" / "src" / "release" / "python"
AUTO_MAP = {
    "AutoConfig": "configuration_gpt_oss_mla.GptOssMlaConfig",
    "AutoModelForCausalLM": "modeling_gpt_oss_mla.GptOssMlaForCausalLM",
}
# Of the logits' scale; f32 against float64.
TOLERANCE = 1e-4
# The whole text at once, token by token after a prefill, and several tokens on top of a cache.
PIECES = {
    "prefill": [56],
    "token by token": [24] + 32 * [1],
    "in pieces": [17, 7, 1, 5, 1, 25],
}
NEW_TOKENS = 20


def write(source: Path, folder: Path, kind: str) -> None:
    """A converted checkpoint as mlac leaves it: configuration, weights and code."""
    synthetic_mla.convert(source, folder, kind)
    for file in PYTHON.glob("*.py"):
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))


def synthetic(only: str, scratch: Path) -> Iterator[tuple[Path, Path]]:
    """Checkpoints of every kind, each with its texts."""
    for source in sorted((TESTS / "fixtures").glob("gpt_oss_*")):
        for kind in synthetic_mla.KINDS if only in source.name else ():
            folder = scratch / f"{source.name}_{kind}"
            write(source, folder, kind)
            yield folder, folder / "io.safetensors"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=True, local_files_only=True, output_loading_info=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {sorted(info[kind])}"
    return model.eval()


def row_sizes(config, layer: int) -> tuple[int, ...]:
    """Heads and numbers per head of the two tensors that a layer's cache should have."""
    if layer in config.mla_layers:
        return 1, config.mla_size("kv_lora_rank", layer), 1, config.mla_size("qk_rope_head_dim", layer)
    return 2 * (config.num_key_value_heads, config.head_dim)


def check_cache(cache, config, batch: int, seen: int) -> int:
    """Refuses a cache of other shapes than planned; its bytes."""
    total = 0
    for layer, cached in enumerate(cache.layers):
        heads_k, wide_k, heads_v, wide_v = row_sizes(config, layer)
        # transformers leaves out the row that the next token pushes out of the window.
        sliding = config.layer_types[layer] == "sliding_attention"
        rows = min(seen, config.sliding_window - 1) if sliding else seen
        for tensor, expected in (
            (cached.keys, (batch, heads_k, rows, wide_k)),
            (cached.values, (batch, heads_v, rows, wide_v)),
        ):
            assert tuple(tensor.shape) == expected, f"layer {layer} caches {tuple(tensor.shape)}, expected {expected}"
            total += tensor.numel() * tensor.element_size()
    return total


@torch.no_grad()
def decode(model, io: dict, pieces: list[int]) -> torch.Tensor:
    """Logits [B, tokens, vocab] of the text run in pieces with a cache, which is checked after each."""
    cache, logits, start = None, [], 0
    for piece in pieces:
        end = start + piece
        out = model(
            input_ids=io["input_ids"][:, start:end],
            attention_mask=io["attention_mask"][:, :end],
            position_ids=io["position_ids"][:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, end
        check_cache(cache, model.config, len(io["input_ids"]), end)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def difference(found: torch.Tensor, expected: torch.Tensor, real: torch.Tensor) -> float:
    """The largest one at real tokens, relative to the scale."""
    return ((found.double() - expected)[real].abs().max() / expected[real].abs().max()).item()


def check_logits(model, io: dict, expected: torch.Tensor) -> float:
    worst = 0.0
    for name, pieces in PIECES.items():
        error = difference(decode(model, io, pieces), expected, io["attention_mask"].bool())
        assert error <= TOLERANCE, f"{name}: differs by {error:.1e} of the scale, allowed {TOLERANCE:.0e}"
        worst = max(worst, error)
    return worst


@torch.no_grad()
def check_generate(model, io: dict) -> None:
    """The same tokens with and without a cache; beams reorder the cache."""
    prompt = {name: io[name][:, :24] for name in ("input_ids", "attention_mask")}
    for beams in (1, 3):
        fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": beams}
        cached = model.generate(**prompt, **fixed, use_cache=True, return_dict_in_generate=True)
        plain = model.generate(**prompt, **fixed, use_cache=False)
        assert torch.equal(cached.sequences, plain), f"generate with {beams} beams: the cache changes the text"
        seen = plain.shape[1] - 1
        check_cache(cached.past_key_values, model.config, beams * len(plain), seen)


def check_types(folder: Path, model) -> None:
    """In bf16 the frequencies keep all their bits, and the cache is as narrow as the weights."""
    weights = mla_reference.read_weights(folder)
    stored = {name: torch.from_numpy(t).float() for name, t in weights.items() if name.endswith("rotary_inv_freq")}
    narrow = load(folder, dtype=torch.bfloat16)
    for cast in (narrow, model.bfloat16()):
        for name, frequencies in stored.items():
            assert torch.equal(cast.get_buffer(name), frequencies), f"{name} lost bits in bf16"
    cache = narrow(torch.arange(3, 12)[None]).past_key_values
    assert {tensor.dtype for layer in cache.layers for tensor in (layer.keys, layer.values)} == {torch.bfloat16}


def check_offloaded(folder: Path, scratch: Path, io: dict, expected: torch.Tensor) -> None:
    """Weights that accelerate fetches from disk for the time of a module's call."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    places = {f"model.layers.{layer}": "disk" for layer in range(layers)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    check_logits(load(folder, device_map=places, offload_folder=scratch), io, expected)


def check(folder: Path, io_file: Path, scratch: Path) -> str:
    """Everything about one checkpoint; the line to print about it."""
    io = load_file(io_file)
    arrays = [io[name].numpy() for name in ("input_ids", "attention_mask", "position_ids")]
    expected = torch.from_numpy(mla_reference.Model(folder).logits(*arrays))
    model = load(folder)
    error = check_logits(model, io, expected)
    check_generate(model, io)
    check_offloaded(folder, scratch / f"{folder.name}_offloaded", io, expected)
    cache = model(io["input_ids"]).past_key_values
    size = check_cache(cache, model.config, *io["input_ids"].shape)
    check_types(folder, model)
    return f"layers {model.config.mla_layers}, differs by {error:.1e} of the scale, cache {size} bytes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="*", metavar="CHECKPOINT IO")
    parser.add_argument("--only", default="", help="only fixtures whose name contains this")
    args = parser.parse_args()
    if len(args.paths) % 2:
        parser.error(f"expected pairs of CHECKPOINT IO, found {len(args.paths)} paths")
    torch.set_num_threads(1)
    disable_progress_bar()
    # It says of every offloaded model that it is offloaded.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    scratch = Path(SCRATCH.name)
    given = list(zip(args.paths[::2], args.paths[1::2]))
    problems = 0
    for folder, io_file in given or synthetic(args.only, scratch):
        try:
            print(f"{folder.name:26} {check(folder, io_file, scratch)}", flush=True)
        except AssertionError as error:
            problems += 1
            print(f"{folder.name}: {error}", file=sys.stderr)
    print(f"{problems} checkpoints failed" if problems else "every converted checkpoint runs as the reference says")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
