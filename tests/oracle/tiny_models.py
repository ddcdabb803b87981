"""Tiny random models of every supported architecture, and the logits transformers computes for them.

Each fixture folder holds

    config.json            as such a checkpoint has it in the wild (old and new spellings both occur)
    model*.safetensors     weights, with an index where sharded; experts in MXFP4 where the configuration says so
    io.safetensors         input_ids, attention_mask, position_ids [batch, seq] i64, logits [batch, seq, vocab] f32

seq = PREFILL + STEPS: a reader runs the first PREFILL tokens as one prefill and the rest token by token,
and must reproduce the logits of the whole sequence, which transformers computed in one pass without a cache.

Weights are large enough that attention is peaked and logits have a scale of 1 to 10, norm weights vary around 1
and biases are large. They come from numpy's PCG64 and are rounded to multiples of 2^-16, so that every machine
writes the same bytes. MXFP4 experts are random bytes; transformers computes the logits from the same numbers in f32.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import mla_reference

PREFILL = 24
STEPS = 32
SEQ = PREFILL + STEPS
VOCAB = 128
# Between the last expert chosen and the first one not chosen: so far from a tie that f16 chooses the same.
ROUTER_GAP = 0.02


@dataclass(frozen=True)
class Case:
    """One fixture: its configuration as written to disk and how its weights are stored and drawn."""

    name: str
    config: dict
    dtype: torch.dtype = torch.float32
    shards: int = 1
    batch: int = 1
    # Tokens of padding on the left of each row of the batch.
    left_padding: tuple[int, ...] = ()
    # Standard deviation of each kind of bias.
    qkv_bias: float = 0.0
    o_bias: float = 0.0
    mlp_bias: float = 0.0
    # Mean and spread of q_norm and k_norm (qwen3).
    head_norm: tuple[float, float] = (1.5, 0.5)
    # Standard deviation of queries and keys without their biases; a score's is about its square.
    query_key: float = 1.6
    # Mean and spread of the heads' sinks, and the seed that keeps the router away from ties (gpt_oss).
    sinks: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    def key(self) -> str:
        """What the random numbers are drawn from."""
        return f"{self.name}/{self.seed}" if self.seed else self.name


def base(model_type: str, architecture: str, **keys) -> dict:
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    config.update(keys)
    return {key: value for key, value in config.items() if value is not ABSENT}


ABSENT = object()


def llama(**keys) -> dict:
    return base("llama", "LlamaForCausalLM", **keys)


def mistral(**keys) -> dict:
    return base("mistral", "MistralForCausalLM", **keys)


def qwen2(**keys) -> dict:
    return base("qwen2", "Qwen2ForCausalLM", rms_norm_eps=1e-6, **keys)


def qwen3(**keys) -> dict:
    return base("qwen3", "Qwen3ForCausalLM", **{"rms_norm_eps": 1e-6, "head_dim": 16, **keys})


def gpt_oss(**keys) -> dict:
    return base(
        "gpt_oss",
        "GptOssForCausalLM",
        **{
            "attention_bias": True,
            "attention_dropout": 0.0,
            "initial_context_length": 4096,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.9,
            "swiglu_limit": 7.0,
            "torch_dtype": ABSENT,
            **keys,
        },
    )


def experts(number: int, chosen: int) -> dict:
    return {"num_local_experts": number, "num_experts_per_tok": chosen, "experts_per_token": chosen}


MXFP4 = {
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
}
SLIDING, FULL = "sliding_attention", "full_attention"


def cases() -> list[Case]:
    return [
        # llama: grouped heads, three layers, a batch of two, the key names of transformers 5.
        Case(
            "llama_gqa",
            llama(
                num_hidden_layers=3,
                head_dim=8,
                dtype="float32",
                torch_dtype=ABSENT,
                attention_bias=False,
                mlp_bias=False,
                rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
            ),
            batch=2,
        ),
        # Tied embeddings, biases everywhere, the key names of transformers 4, eos as a list.
        Case(
            "llama_tied_bias",
            llama(
                tie_word_embeddings=True,
                attention_bias=True,
                mlp_bias=True,
                rope_theta=10000.0,
                rope_scaling=None,
                eos_token_id=[2, 5, 7],
            ),
            qkv_bias=1.5,
            o_bias=0.5,
            mlp_bias=0.5,
        ),
        # head_dim that is not hidden / heads; linear scaling in the old spelling.
        Case(
            "llama_head_dim_linear",
            llama(head_dim=16, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0}),
        ),
        # Llama 3.1's rule; the three bands of frequencies are all populated.
        Case(
            "llama_llama3",
            llama(
                head_dim=16,
                rope_theta=500.0,
                rope_scaling={
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "rope_type": "llama3",
                },
            ),
        ),
        Case(
            "llama_yarn",
            llama(
                head_dim=16,
                num_attention_heads=8,
                dtype="float32",
                torch_dtype=ABSENT,
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 1.0,
                    "beta_slow": 0.25,
                },
            ),
        ),
        # YaRN with fractional correction bounds (GPT-OSS) and DeepSeek's two mscale keys.
        Case(
            "llama_yarn_mscale",
            llama(
                head_dim=16,
                rope_theta=100.0,
                rope_scaling={
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 1.0,
                    "beta_slow": 0.25,
                    "truncate": False,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.4,
                },
            ),
        ),
        # G = H, as Llama 2: the KV head count is absent.
        Case("llama_mha", llama(num_key_value_heads=ABSENT, rope_theta=10000.0), dtype=torch.float16),
        # G = 1; an epsilon that matters.
        Case("llama_mqa", llama(num_key_value_heads=1, head_dim=16, rms_norm_eps=0.03, rope_theta=10000.0), batch=2),
        # Shards with an index; layers and their parts fall on different files.
        Case("llama_sharded", llama(num_hidden_layers=3, rope_theta=10000.0), shards=3),
        # Rows of one batch with different lengths, padded on the left.
        Case("llama_padded", llama(rope_theta=10000.0), batch=2, left_padding=(0, 7)),
        # A window far shorter than the text, in every layer.
        Case("mistral_window", mistral(head_dim=8, sliding_window=9, rope_theta=10000.0)),
        Case(
            "mistral_bf16",
            mistral(sliding_window=None, rope_theta=1000000.0, torch_dtype="bfloat16"),
            dtype=torch.bfloat16,
        ),
        # Large biases on q, k and v; a window that use_sliding_window switches off.
        Case(
            "qwen2_bias",
            qwen2(
                tie_word_embeddings=True,
                rope_theta=1000000.0,
                use_sliding_window=False,
                sliding_window=9,
                max_window_layers=0,
            ),
            qkv_bias=4.0,
        ),
        # The layers from max_window_layers on have the window.
        Case(
            "qwen2_window",
            qwen2(
                num_hidden_layers=3,
                rope_theta=10000.0,
                use_sliding_window=True,
                sliding_window=7,
                max_window_layers=1,
            ),
            qkv_bias=1.5,
        ),
        # Qwen 2.5's long-context setting.
        Case(
            "qwen2_yarn",
            qwen2(
                rope_theta=1000.0,
                use_sliding_window=False,
                rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            ),
            qkv_bias=1.5,
        ),
        # An epsilon that matters, in the head norms too.
        Case(
            "qwen3_norm",
            qwen3(
                tie_word_embeddings=True,
                rms_norm_eps=0.1,
                rope_theta=1000000.0,
                attention_bias=False,
                rope_scaling=None,
            ),
        ),
        # Biases before the head norms, windows by layer_types, YaRN with a given attention factor.
        Case(
            "qwen3_bias_window_yarn",
            qwen3(
                num_hidden_layers=3,
                dtype="float32",
                torch_dtype=ABSENT,
                attention_bias=True,
                use_sliding_window=True,
                sliding_window=11,
                max_window_layers=3,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 1000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "attention_factor": 1.25,
                    "beta_fast": 0.8,
                    "beta_slow": 0.1,
                },
            ),
            qkv_bias=1.0,
            o_bias=0.5,
        ),
        # The published model's keys and numbers, but small: every second layer slides, YaRN by 32, 4 experts a token.
        Case(
            "gpt_oss_mxfp4",
            gpt_oss(
                **MXFP4,
                **experts(6, 4),
                num_hidden_layers=4,
                num_attention_heads=6,
                num_key_value_heads=3,
                head_dim=16,
                intermediate_size=64,
                layer_types=[SLIDING, FULL, SLIDING, FULL],
                sliding_window=8,
                rope_theta=150000,
                rope_scaling={
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "factor": 32.0,
                    "original_max_position_embeddings": 4096,
                    "rope_type": "yarn",
                    "truncate": False,
                },
            ),
            dtype=torch.bfloat16,
            qkv_bias=1.5,
            o_bias=1.5,
            mlp_bias=0.5,
            query_key=1.0,
            sinks=(1.0, 3.0),
            seed=100,
        ),
        # Dense experts, one a token, in the key names of transformers 5; G = 1, no YaRN, a clamp that often bites.
        Case(
            "gpt_oss_dense",
            gpt_oss(
                num_local_experts=3,
                num_experts_per_tok=1,
                num_hidden_layers=3,
                num_attention_heads=5,
                num_key_value_heads=1,
                head_dim=8,
                intermediate_size=20,
                layer_types=[SLIDING, FULL, SLIDING],
                sliding_window=13,
                swiglu_alpha=1.25,
                swiglu_limit=1.5,
                dtype="float32",
                rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
            ),
            qkv_bias=1.5,
            o_bias=1.5,
            mlp_bias=1.5,
            query_key=1.0,
            sinks=(1.0, 3.0),
            seed=1,
        ),
        # G = H = 7, YaRN with whole correction bounds, a first layer with full attention.
        Case(
            "gpt_oss_mha",
            gpt_oss(
                **experts(5, 2),
                num_hidden_layers=3,
                num_attention_heads=7,
                num_key_value_heads=7,
                head_dim=8,
                intermediate_size=20,
                layer_types=[FULL, SLIDING, FULL],
                sliding_window=8,
                rope_theta=1000.0,
                rope_scaling={
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "beta_fast": 1.0,
                    "beta_slow": 0.1,
                },
            ),
            dtype=torch.bfloat16,
            qkv_bias=0.5,
            o_bias=0.5,
            mlp_bias=0.5,
            sinks=(0.0, 3.0),
            seed=1,
        ),
        # Rows of one batch with different lengths, padded on the left by more than the window.
        Case(
            "gpt_oss_padded",
            gpt_oss(
                **MXFP4,
                **experts(5, 3),
                hidden_size=64,
                intermediate_size=32,
                head_dim=8,
                layer_types=[SLIDING, FULL],
                sliding_window=8,
                rope_theta=150000,
                rope_scaling={
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "factor": 32.0,
                    "original_max_position_embeddings": 4096,
                    "rope_type": "yarn",
                    "truncate": False,
                },
            ),
            dtype=torch.bfloat16,
            batch=2,
            left_padding=(0, 11),
            qkv_bias=1.5,
            o_bias=1.5,
            mlp_bias=0.5,
            query_key=1.0,
            sinks=(1.0, 3.0),
            seed=33,
        ),
        # YaRN's three bands of frequencies all populated, sinks that take most of many heads, shards, no layer_types.
        Case(
            "gpt_oss_sinks",
            gpt_oss(
                **MXFP4,
                **experts(4, 2),
                num_hidden_layers=3,
                num_attention_heads=8,
                head_dim=8,
                sliding_window=13,
                rope_theta=100.0,
                rope_scaling={
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 1.0,
                    "beta_slow": 0.25,
                    "truncate": False,
                },
                intermediate_size=32,
                swiglu_limit=3.0,
            ),
            shards=2,
            qkv_bias=0.5,
            o_bias=0.5,
            mlp_bias=1.5,
            query_key=1.3,
            sinks=(2.0, 3.0),
            seed=10,
        ),
    ]


class Draw:
    """Seeded random tensors, rounded to multiples of 2^-16."""

    def __init__(self, name: str):
        self.generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))

    def normal(self, shape: tuple[int, ...], mean: float, spread: float) -> torch.Tensor:
        values = self.generator.standard_normal(shape) * spread + mean
        return torch.from_numpy((np.round(values * 65536.0) / 65536.0).astype(np.float32))

    def bytes(self, shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        return torch.from_numpy(self.generator.integers(low, high, size=shape, dtype=np.uint8))

    def tokens(self, shape: tuple[int, ...], vocab: int) -> torch.Tensor:
        return torch.from_numpy(self.generator.integers(3, vocab, size=shape, dtype=np.int64))


def weights(case: Case) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in the file's names, weights [out, in]."""
    config, draw = case.config, Draw(case.key())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", hidden // heads)
    tensors = {"model.embed_tokens.weight": draw.normal((config["vocab_size"], hidden), 0.0, 1.0)}

    def linear(name: str, out: int, inp: int, gain: float, bias: float) -> None:
        tensors[f"{name}.weight"] = draw.normal((out, inp), 0.0, gain / inp**0.5)
        if bias > 0.0:
            tensors[f"{name}.bias"] = draw.normal((out,), 0.0, bias)

    def expert_matrices(name: str, out: int, inp: int) -> None:
        """One of the two matrices of all experts of a layer, with its bias."""
        number = config["num_local_experts"]
        if "quantization_config" in config:
            # Of random blocks' values the root of the mean square is 2.9; five scales around 2^-4.
            tensors[f"{name}_blocks"] = draw.bytes((number, out, inp // 32, 16), 0, 256)
            tensors[f"{name}_scales"] = draw.bytes((number, out, inp // 32), 121, 126)
        else:
            tensors[name] = draw.normal((number, inp, out), 0.0, 2.0 / inp**0.5)
        tensors[f"{name}_bias"] = draw.normal((number, out), 0.0, case.mlp_bias)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        linear(f"{attention}.q_proj", heads * head_dim, hidden, case.query_key, case.qkv_bias)
        linear(f"{attention}.k_proj", kv_heads * head_dim, hidden, case.query_key, case.qkv_bias)
        linear(f"{attention}.v_proj", kv_heads * head_dim, hidden, 1.0, case.qkv_bias)
        linear(f"{attention}.o_proj", hidden, heads * head_dim, 1.0, case.o_bias)
        if config["model_type"] == "qwen3":
            for norm in ("q_norm", "k_norm"):
                tensors[f"{attention}.{norm}.weight"] = draw.normal((head_dim,), *case.head_norm)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = draw.normal((hidden,), 1.0, 0.25)
        if config["model_type"] == "gpt_oss":
            tensors[f"{attention}.sinks"] = draw.normal((heads,), *case.sinks)
            linear(f"{prefix}.mlp.router", config["num_local_experts"], hidden, 2.0, 1.0)
            expert_matrices(f"{prefix}.mlp.experts.gate_up_proj", 2 * inner, hidden)
            expert_matrices(f"{prefix}.mlp.experts.down_proj", hidden, inner)
            continue
        linear(f"{prefix}.mlp.gate_proj", inner, hidden, 1.0, case.mlp_bias)
        linear(f"{prefix}.mlp.up_proj", inner, hidden, 1.0, case.mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, 1.0, case.mlp_bias)
    tensors["model.norm.weight"] = draw.normal((hidden,), 1.0, 0.25)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden, 2.5, 0.0)
    return {name: tensor.to(case.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def dense_twin(case: Case, folder: Path) -> Path:
    """The same numbers with experts as f32 matrices, in a folder below; refuses what transformers decodes otherwise."""
    tensors = weights(case)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        base_name = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(f"{base_name}_scales")
        values = torch.from_numpy(mla_reference.mxfp4(blocks.numpy(), scales.numpy())).transpose(1, 2).contiguous()
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        if not torch.equal(values, theirs.double()):
            raise SystemExit(f"{case.name}: {base_name}: transformers reads other numbers out of the blocks")
        tensors[base_name] = values.float()
    twin = folder / "twin"
    twin.mkdir()
    config = {name: value for name, value in case.config.items() if name != "quantization_config"}
    (twin / "config.json").write_text(json.dumps(config))
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    return twin


def write_checkpoint(case: Case, folder: Path) -> None:
    """config.json and the safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    tensors = weights(case)
    if case.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    # Dealt like cards, so that neighbours lie in different files.
    files = [f"model-{i + 1:05}-of-{case.shards:05}.safetensors" for i in range(case.shards)]
    dealt: list[dict] = [{} for _ in files]
    weight_map = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        dealt[index % case.shards][name] = tensor
        weight_map[name] = files[index % case.shards]
    for file, part in zip(files, dealt):
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load(folder: Path) -> torch.nn.Module:
    """The checkpoint as transformers reads it, in f32, refusing anything missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise SystemExit(f"{folder}: transformers reports {kind}: {sorted(info[kind])}")
    return model.eval()


@torch.no_grad()
def router_gap(model: torch.nn.Module, input_ids, attention_mask, position_ids) -> float:
    """The smallest difference of a router's logits between the last expert chosen and the next one."""
    found = model(input_ids, attention_mask, position_ids, output_router_logits=True, use_cache=False).router_logits
    real, chosen = attention_mask.bool().flatten(), model.config.num_experts_per_tok
    ordered = torch.stack(found)[:, real].sort(dim=-1, descending=True).values
    return (ordered[..., chosen - 1] - ordered[..., chosen]).min().item()


@torch.no_grad()
def run(case: Case, folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The fixture's inputs and logits, and how far transformers' own prefill + decode is from them, relative."""
    quantised = "quantization_config" in case.config
    with tempfile.TemporaryDirectory() as scratch:
        model = load(dense_twin(case, Path(scratch)) if quantised else folder)
    vocab = case.config["vocab_size"]
    padding = case.left_padding or (0,) * case.batch
    input_ids = Draw(case.key() + "/tokens").tokens((case.batch, SEQ), vocab)
    attention_mask = torch.ones_like(input_ids)
    for row, pad in enumerate(padding):
        input_ids[row, :pad] = 0
        attention_mask[row, :pad] = 0
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).logits
    real = attention_mask.bool()
    if quantised:
        own = load(folder)(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
        if not torch.equal(own[real], logits[real]):
            raise SystemExit(f"{case.name}: the dense twin's logits are not those of the MXFP4 checkpoint")
    if "num_local_experts" in case.config:
        gap = router_gap(model, input_ids, attention_mask, position_ids)
        if gap < ROUTER_GAP:
            raise SystemExit(f"{case.name}: a router is {gap:.1e} from a tie, wanted {ROUTER_GAP}: take another seed")
    # Rows of padding carry no meaning: zero, so that nobody compares them by accident.
    logits = torch.where(real[..., None], logits, torch.zeros(()))

    cache, pieces, start = None, [], 0
    for end in [PREFILL, *range(PREFILL + 1, SEQ + 1)]:
        out = model(
            input_ids=input_ids[:, start:end],
            attention_mask=attention_mask[:, :end],
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, end
        pieces.append(out.logits)
    stepwise = torch.cat(pieces, dim=1)
    scale = logits[real].abs().max().item()
    own_error = (stepwise - logits)[real].abs().max().item() / scale
    tensors = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "logits": logits.contiguous(),
    }
    return tensors, own_error


def write(case: Case, folder: Path) -> str:
    """Writes one fixture folder; the line to print about it."""
    write_checkpoint(case, folder)
    tensors, own_error = run(case, folder)
    save_file(tensors, folder / "io.safetensors")
    logits = tensors["logits"][tensors["attention_mask"].bool()]
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{case.name:24} {size:7} bytes, logits std {logits.std().item():.2f}, max {logits.abs().max().item():.2f}, "
        f"transformers' own decode differs by {own_error:.1e} of the scale"
    )
