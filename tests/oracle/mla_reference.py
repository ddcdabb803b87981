"""A plain float64 reading of a GQA or MLA checkpoint folder: numpy only, one loop over heads, no cache.

Written from the definition of the checkpoint, not from mlac's code. Letters: t query position, s key position,
h query head, g KV head, D hidden size, d head_dim, r kv_lora_rank, d_r qk_rope_head_dim, E experts.

    python mla_reference.py CHECKPOINT IO.safetensors OUT ..     logits of the file's input_ids as OUT (f64, C order)

Any number of such triples. IO.safetensors holds input_ids, attention_mask and position_ids [batch, seq] i64.
Prints one line of JSON for each triple: the shape.
`--expanded` computes scores from decompressed keys and values, otherwise queries are absorbed into the latent space.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

MLA = "_mla"


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one file; bf16 is widened to f32."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        raw = body[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8}
            array = np.frombuffer(raw, kinds[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint in float64, those of bytes as they are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    weights: dict[str, np.ndarray] = {}
    for file in files:
        weights.update(read_safetensors(folder / file))
    return {name: t if t.dtype == np.uint8 else t.astype(np.float64) for name, t in weights.items()}


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values [.., 32 * b] of blocks [.., b, 16] with scales [.., b]: two E2M1 numbers a byte, the low four bits first."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    sign, exponent, mantissa = np.where(codes & 8, -1.0, 1.0), (codes >> 1 & 3).astype(int), codes & 1
    # Exponent 0 is the subnormal pair 0 and 1/2.
    value = sign * np.where(exponent == 0, mantissa * 0.5, np.ldexp(1.0 + mantissa * 0.5, exponent - 1))
    value = np.ldexp(value, scales.astype(int)[..., None] - 127)
    return value.reshape(*scales.shape[:-1], -1)


def rope_table(config: dict) -> tuple[np.ndarray, float]:
    """inv_freq [d / 2] and the factor on cos and sin, for layers that are not converted."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    half = np.arange(d // 2)
    base = theta ** (-2.0 * half / d)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return base / factor, 1.0
    length = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    if kind == "llama3":
        turns = length * base / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return base * (kept + (1.0 - kept) / factor), 1.0
    if kind != "yarn":
        raise ValueError(f"rope_type {kind!r}")

    def component(turns: float) -> float:
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = component(rope.get("beta_fast") or 32), component(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = np.clip((half - low) / ((high - low) or 0.001), 0.0, 1.0)

    def mscale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        m, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = mscale(m) / mscale(all_dim) if m and all_dim else mscale(1.0)
    return base * ((1.0 - ramp) + ramp / factor), attention


def rotate(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """x [seq, .., n], half-split: component l turns with component l + n / 2 by positions * inv_freq[l]."""
    angle = positions[:, None] * inv_freq
    shape = (len(positions), *([1] * (x.ndim - 2)), len(inv_freq))
    cos, sin = (factor * np.cos(angle)).reshape(shape), (factor * np.sin(angle)).reshape(shape)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def window(config: dict, layer: int) -> int | None:
    """Positions a query sees, itself included."""
    source = config["model_type"].removesuffix(MLA)
    if source == "llama":
        return None
    if source == "mistral":
        return config.get("sliding_window")
    if source != "gpt_oss" and not config.get("use_sliding_window"):
        return None
    types = config.get("layer_types")
    if types:
        sliding = types[layer] == "sliding_attention"
    else:
        sliding = layer % 2 == 0 if source == "gpt_oss" else layer >= config["max_window_layers"]
    return config.get("sliding_window") if sliding else None


class Model:
    """A checkpoint folder; `logits` for one batch of texts."""

    def __init__(self, folder: Path, expanded: bool = False):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = read_weights(folder)
        self.expanded = expanded
        self.heads = self.config["num_attention_heads"]
        self.converted = list(self.config.get("mla_layers", []))
        # The smallest difference met so far between a router's last chosen and first not chosen logit.
        self.router_gap = np.inf

    def weight(self, layer: int, name: str) -> np.ndarray:
        return self.weights[f"model.layers.{layer}.{name}"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        bias = self.weights.get(f"{name}.bias")
        y = x @ self.weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean_square = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def mla_size(self, key: str, layer: int) -> int:
        value = self.config[key]
        return value[self.converted.index(layer)] if isinstance(value, list) else value

    def sinks(self, name: str) -> np.ndarray:
        """For each head the logit of what is attended besides the tokens; minus infinity where there is none."""
        return self.weights.get(f"{name}.sinks", np.full(self.heads, -np.inf))

    def gqa(self, layer: int, x: np.ndarray, positions: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """Head outputs [seq, H * d] of a layer in its original form."""
        name, seq = f"model.layers.{layer}.self_attn", len(x)
        inv_freq, factor = rope_table(self.config)
        d = 2 * len(inv_freq)
        q, k, v = (self.linear(x, f"{name}.{part}_proj").reshape(seq, -1, d) for part in "qkv")
        if f"{name}.q_norm.weight" in self.weights:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k = rotate(q, positions, inv_freq, factor), rotate(k, positions, inv_freq, factor)
        group = self.heads // k.shape[1]
        outputs = []
        sinks = self.sinks(name)
        for h in range(self.heads):
            p = softmax(q[:, h] @ k[:, h // group].T * d**-0.5, visible, sinks[h])
            outputs.append(p @ v[:, h // group])
        return np.concatenate(outputs, -1)

    def rotary_queries(self, name: str, queries: np.ndarray, d_r: int) -> np.ndarray:
        """From the queries [seq, H, d] of each head what its rotary part [seq, H, d_r] is before rotation."""
        rows = self.weights[f"{name}.q_rope_proj.weight"].reshape(self.heads, d_r, queries.shape[-1])
        return np.einsum("thd,hrd->thr", queries, rows)

    def mla(self, layer: int, x: np.ndarray, positions: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """Head outputs [seq, H * d_v] of a converted layer."""
        name, seq = f"model.layers.{layer}.self_attn", len(x)
        r, d_r = self.mla_size("kv_lora_rank", layer), self.mla_size("qk_rope_head_dim", layer)
        d_nope, d_v = self.mla_size("qk_nope_head_dim", layer), self.mla_size("v_head_dim", layer)
        inv_freq = self.weights[f"{name}.rotary_inv_freq"]
        assert inv_freq.shape == (d_r // 2,), inv_freq.shape
        if self.config["mla_encoder"] == "hidden":
            q = self.linear(x, f"{name}.q_proj").reshape(seq, self.heads, d_nope + d_r)
            q_nope, q_rope = q[..., :d_nope], q[..., d_nope:]
            encoded = x
        elif self.config["mla_encoder"] == "kept_query":
            d = self.config["head_dim"]
            assert d == d_nope == d_v
            q_nope = self.linear(x, f"{name}.q_proj").reshape(seq, self.heads, d)
            q_rope = self.rotary_queries(name, q_nope, d_r)
            encoded = x
        else:
            q_norm, k_norm = self.weights[f"{name}.q_norm.weight"], self.weights[f"{name}.k_norm.weight"]
            d = len(k_norm)
            assert len(q_norm) == d == d_nope
            q_nope = self.norm(self.linear(x, f"{name}.q_proj").reshape(seq, self.heads, d), f"{name}.q_norm")
            q_rope = self.rotary_queries(name, q_nope, d_r)
            k = self.norm(self.linear(x, f"{name}.k_proj").reshape(seq, -1, d), f"{name}.k_norm")
            encoded = np.concatenate([k.reshape(seq, -1), self.linear(x, f"{name}.v_proj")], -1)
        row = self.linear(encoded, f"{name}.kv_a_proj_with_mqa")
        assert row.shape[-1] == r + d_r, row.shape
        latent, k_rope = row[:, :r], rotate(row[:, r:], positions, inv_freq)
        q_rope = rotate(q_rope, positions, inv_freq)
        up = self.weights[f"{name}.kv_b_proj.weight"].reshape(self.heads, d_nope + d_v, r)
        outputs, sinks = [], self.sinks(name)
        for h in range(self.heads):
            w_uk, w_uv = up[h, :d_nope], up[h, d_nope:]
            if self.expanded:
                content, values = q_nope[:, h] @ (latent @ w_uk.T).T, latent @ w_uv.T
            else:
                content, values = (q_nope[:, h] @ w_uk) @ latent.T, latent
            scores = (content + q_rope[:, h] @ k_rope.T) * self.config["attention_scale"]
            p = softmax(scores, visible, sinks[h])
            outputs.append(p @ values if self.expanded else (p @ values) @ w_uv.T)
        return np.concatenate(outputs, -1)

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        gate = self.linear(x, f"{name}.gate_proj")
        return self.linear(gate * sigmoid(gate) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def mixture(self, name: str, x: np.ndarray) -> np.ndarray:
        """The chosen experts' outputs [seq, D], weighted by the softmax over the chosen ones' logits."""
        limit, alpha = self.config.get("swiglu_limit", 7.0), self.config.get("swiglu_alpha", 1.702)
        chosen = self.config["num_experts_per_tok"]
        logits = self.linear(x, f"{name}.router")
        order = np.argsort(-logits, axis=-1, kind="stable")
        ranked = np.take_along_axis(logits, order, -1)
        self.router_gap = min(self.router_gap, (ranked[:, chosen - 1] - ranked[:, chosen]).min())
        share = softmax(ranked[:, :chosen], True)
        out = np.zeros_like(x)
        for expert in range(self.config["num_local_experts"]):
            token, place = np.nonzero(order[:, :chosen] == expert)
            gate_up = x[token] @ self.expert(name, "gate_up_proj", expert)
            gate_up += self.weights[f"{name}.experts.gate_up_proj_bias"][expert]
            gate, up = np.minimum(gate_up[:, 0::2], limit), np.clip(gate_up[:, 1::2], -limit, limit)
            y = (up + 1.0) * gate * sigmoid(alpha * gate) @ self.expert(name, "down_proj", expert)
            y += self.weights[f"{name}.experts.down_proj_bias"][expert]
            out[token] += share[token, place, None] * y
        return out

    def expert(self, name: str, matrix: str, expert: int) -> np.ndarray:
        """One expert's matrix [in, out]."""
        stored = f"{name}.experts.{matrix}"
        if stored in self.weights:
            return self.weights[stored][expert]
        return mxfp4(self.weights[f"{stored}_blocks"][expert], self.weights[f"{stored}_scales"][expert]).T

    def text(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits [seq, vocab] of one text; rows of padding are zero."""
        real = np.flatnonzero(mask)
        ids, positions = ids[real], positions[real].astype(np.float64)
        hidden = self.weights["model.embed_tokens.weight"][ids]
        distance = np.arange(len(ids))[:, None] - np.arange(len(ids))[None, :]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            seen = window(self.config, layer)
            visible = (distance >= 0) & (distance < (seen or len(ids)))
            x = self.norm(hidden, f"{prefix}.input_layernorm")
            attention = self.mla if layer in self.converted else self.gqa
            hidden = hidden + self.linear(attention(layer, x, positions, visible), f"{prefix}.self_attn.o_proj")
            x = self.norm(hidden, f"{prefix}.post_attention_layernorm")
            mlp = self.mixture if "num_local_experts" in self.config else self.mlp
            hidden = hidden + mlp(f"{prefix}.mlp", x)
        x = self.norm(hidden, "model.norm")
        tied = self.config.get("tie_word_embeddings", False)
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        logits = np.zeros((len(mask), len(head)))
        logits[real] = x @ head.T
        return logits

    def logits(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits [batch, seq, vocab] of input_ids, attention_mask and position_ids [batch, seq]."""
        return np.stack([self.text(*row) for row in zip(ids, mask, positions)])


def softmax(scores: np.ndarray, visible: np.ndarray | bool, sink: float = -np.inf) -> np.ndarray:
    """Over the last axis; the sink is one more logit, whose share is dropped."""
    scores = np.where(visible, scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), sink)
    e = np.exp(scores - top)
    return e / (e.sum(-1, keepdims=True) + np.exp(sink - top))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="CHECKPOINT IO OUT")
    parser.add_argument("--expanded", action="store_true")
    args = parser.parse_args()
    if len(args.paths) % 3:
        parser.error(f"expected triples of CHECKPOINT IO OUT, found {len(args.paths)} paths")
    for checkpoint, io_file, out in zip(*(iter(args.paths),) * 3):
        io = read_safetensors(io_file)
        found = Model(checkpoint, args.expanded).logits(io["input_ids"], io["attention_mask"], io["position_ids"])
        out.write_bytes(np.ascontiguousarray(found, dtype="<f8").tobytes())
        print(json.dumps({"shape": list(found.shape)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
