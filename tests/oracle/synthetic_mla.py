"""Turns a GQA checkpoint folder into an MLA one by definition, without mlac: material for tests of MLA graphs.

    python synthetic_mla.py SOURCE OUT KIND ..     any number of such triples; KIND is exact, random or random_full

`exact`: full rank, computes the same function as SOURCE. The rotary key is every KV head's key, frequency by frequency mixed over the heads by a random unitary matrix
(which commutes with the rotation), the latent is all values mixed by a random invertible matrix, and W_UK is zero.
`random`: ranks that differ by layer, the first layer unconverted, every matrix filled, W_UK too.
`random_full`: the same, with the layers unconverted that have a sliding window.
Routers of `random` ones are kept away from ties on the texts of SOURCE's io.safetensors.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np

from mla_reference import Model, read_safetensors, read_weights, rope_table, window

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt_oss": "GptOss"}
ENCODERS = {"qwen3": "normed_key", "gpt_oss": "kept_query"}
KINDS = ("exact", "random", "random_full")
# Between the last expert chosen and the first one not chosen.
ROUTER_GAP = 0.01


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One file, everything but bytes as f32."""
    header, parts, offset = {}, [], 0
    for name, tensor in tensors.items():
        dtype, form = ("U8", np.uint8) if tensor.dtype == np.uint8 else ("F32", "<f4")
        raw = np.ascontiguousarray(tensor, dtype=form).tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(raw)]}
        parts.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def rotary_basis(generator, kv_heads: int, d: int) -> np.ndarray:
    """Matrix [G*d, G*d] from the keys of all heads (head-major) to the shared rotary key.

    Frequency l has a random unitary U_l [G, G]; component j of frequency l of the rotary key is
    z = sum_g U_l[j, g] (k[g][l] + i k[g][l + d/2]), its real part at l * G + j, its imaginary part d_r/2 further.
    """
    half, size = d // 2, kv_heads * d
    basis = np.zeros((size, size))
    for l in range(half):
        raw = generator.standard_normal((2, kv_heads, kv_heads))
        unitary, _ = np.linalg.qr(raw[0] + 1j * raw[1])
        for j in range(kv_heads):
            real = l * kv_heads + j
            for g in range(kv_heads):
                u = unitary[j, g]
                basis[real, g * d + l], basis[real, g * d + l + half] = u.real, -u.imag
                basis[size // 2 + real, g * d + l], basis[size // 2 + real, g * d + l + half] = u.imag, u.real
    return basis


def exact_layer(generator, weights: dict, prefix: str, config: dict, form: str) -> tuple[dict, dict]:
    """New tensors of one layer's attention and its sizes; `form` is the encoder's."""
    inv_freq, factor = rope_table(config)
    d, heads = 2 * len(inv_freq), config["num_attention_heads"]
    key_rows = weights[f"{prefix}.k_proj.weight"]
    kv_heads = key_rows.shape[0] // d
    size, group = kv_heads * d, heads // kv_heads
    basis = rotary_basis(generator, kv_heads, d)
    mix = generator.standard_normal((size, size)) / size**0.5 + 1.5 * np.eye(size)
    unmix = np.linalg.inv(mix)
    new = {f"{prefix}.rotary_inv_freq": np.repeat(inv_freq, kv_heads)}

    def slot(g: int) -> np.ndarray:
        """[d_r, d]: a query of group g placed where its head's key is."""
        return basis[:, g * d : (g + 1) * d]

    # k' = B k with B unitary, so q . k = (B q) . (B k); both carry YaRN's factor.
    kept = {"hidden": (), "normed_key": ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"), "kept_query": ("q_proj",)}
    for name, kind in itertools.product(kept[form], ("weight", "bias")):
        if f"{prefix}.{name}.{kind}" in weights:
            new[f"{prefix}.{name}.{kind}"] = weights[f"{prefix}.{name}.{kind}"]
    if form != "hidden":
        new[f"{prefix}.q_rope_proj.weight"] = np.concatenate([factor**2 * slot(h // group) for h in range(heads)])
    if form == "normed_key":
        encoder = np.zeros((2 * size, 2 * size))
        encoder[:size, size:], encoder[size:, :size] = mix, basis
        new[f"{prefix}.kv_a_proj_with_mqa.weight"] = encoder
    else:
        for kind in ("weight", "bias"):
            if f"{prefix}.q_proj.{kind}" not in weights:
                continue
            key, value = weights[f"{prefix}.k_proj.{kind}"], weights[f"{prefix}.v_proj.{kind}"]
            new[f"{prefix}.kv_a_proj_with_mqa.{kind}"] = np.concatenate([mix @ value, basis @ key])
            if form == "kept_query":
                continue
            query = weights[f"{prefix}.q_proj.{kind}"].reshape(heads, d, *key.shape[1:])
            rows = [np.concatenate([query[h], factor**2 * (slot(h // group) @ query[h])]) for h in range(heads)]
            new[f"{prefix}.q_proj.{kind}"] = np.concatenate(rows)
    decoders = []
    for h in range(heads):
        g = h // group
        decoders += [np.zeros((d, size)), unmix[g * d : (g + 1) * d]]
    new[f"{prefix}.kv_b_proj.weight"] = np.concatenate(decoders)
    return new, {"kv_lora_rank": size, "qk_rope_head_dim": size, "qk_nope_head_dim": d, "v_head_dim": d}


def random_layer(generator, exact: dict, sizes: dict, prefix: str, heads: int) -> tuple[dict, dict]:
    """The exact layer with fewer, random numbers in the cache."""
    d = sizes["v_head_dim"]
    d_r = 2 * int(generator.integers(1, sizes["qk_rope_head_dim"] // 2))
    r = int(generator.integers(3, sizes["kv_lora_rank"] + 3))
    new = dict(exact)

    def fill(name: str, shape: tuple[int, ...], fan: int) -> None:
        if f"{prefix}.{name}" in exact:
            new[f"{prefix}.{name}"] = generator.standard_normal(shape) * 1.3 / fan**0.5

    inputs = exact[f"{prefix}.kv_a_proj_with_mqa.weight"].shape[1]
    fill("kv_a_proj_with_mqa.weight", (r + d_r, inputs), inputs)
    fill("kv_a_proj_with_mqa.bias", (r + d_r,), 1)
    fill("kv_b_proj.weight", (heads * 2 * d, r), r)
    fill("q_rope_proj.weight", (heads * d_r, d), d)
    if f"{prefix}.q_rope_proj.weight" not in exact:
        hidden = exact[f"{prefix}.q_proj.weight"].shape[1]
        fill("q_proj.weight", (heads * (d + d_r), hidden), hidden)
        fill("q_proj.bias", (heads * (d + d_r),), 1)
    new[f"{prefix}.rotary_inv_freq"] = np.exp(generator.uniform(-6.0, 0.0, d_r // 2))
    return new, {**sizes, "kv_lora_rank": r, "qk_rope_head_dim": d_r}


def convert(source: Path, out: Path, kind: str) -> None:
    out.mkdir(parents=True)
    if (source / "io.safetensors").is_file():
        shutil.copy(source / "io.safetensors", out / "io.safetensors")
    for attempt in itertools.count():
        write(source, out, kind, f"{source.name}/{kind}" + (f"/{attempt}" if attempt else ""))
        if kind == "exact" or far_from_ties(out):
            return


def far_from_ties(folder: Path) -> bool:
    model = Model(folder)
    if "num_local_experts" not in model.config:
        return True
    io = read_safetensors(folder / "io.safetensors")
    model.logits(io["input_ids"], io["attention_mask"], io["position_ids"])
    return model.router_gap > ROUTER_GAP


def write(source: Path, out: Path, kind: str, seed: str) -> None:
    """config.json and the weights."""
    config, weights = json.loads((source / "config.json").read_text()), read_weights(source)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))
    form = ENCODERS.get(config["model_type"], "hidden")
    converted = {
        "exact": lambda layer: True,
        "random": lambda layer: layer > 0,
        "random_full": lambda layer: window(config, layer) is None,
    }
    layers = list(filter(converted[kind], range(config["num_hidden_layers"])))
    columns: dict[str, list[int]] = {}
    for layer in layers:
        prefix = f"model.layers.{layer}.self_attn"
        new, sizes = exact_layer(generator, weights, prefix, config, form)
        if kind != "exact":
            new, sizes = random_layer(generator, new, sizes, prefix, config["num_attention_heads"])
        kept = {n: tensor for n, tensor in weights.items() if f"{prefix}.o_proj" in n or f"{prefix}.sinks" == n}
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{prefix}.")}
        weights.update(kept | new)
        for key, value in sizes.items():
            columns.setdefault(key, []).append(value)
    source_type = config["model_type"]
    d = 2 * len(rope_table(config)[0])
    config.update(
        model_type=f"{source_type}_mla",
        architectures=[f"{CLASSES[source_type]}MlaForCausalLM"],
        mla_layers=layers,
        mla_encoder=form,
        attention_scale=d**-0.5,
        mla_o_bias="model.layers.1.self_attn.o_proj.bias" in weights,
        **{key: values if len(set(values)) > 1 else values[0] for key, values in columns.items()},
    )
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_safetensors(out / "model.safetensors", weights)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or len(arguments) % 3 or not set(arguments[2::3]) <= set(KINDS):
        print(__doc__.strip(), file=sys.stderr)
        sys.exit(2)
    for source, out, kind in zip(*(iter(arguments),) * 3):
        convert(Path(source), Path(out), kind)
