#!/usr/bin/env python3
"""Runs FlashMLA, FlashAttention-3 and PyTorch's own attention on the GPU check's problems and times them on its shapes.

    python3 run_peers.py EXTENSIONS WORK REPEATS

`mlac-gpu-check --peers EXTENSIONS` calls it. EXTENSIONS holds what `fetch_peers.py` fetched from the vllm 0.26.0 wheel, which
was built for PyTorch 2.11. WORK holds `problems.json` and, for each of its cases, bf16 queries and caches (bits, little-endian);
outputs and log-sum-exps are left there in f32, and judged by the program that called, against its f64 reference.

The calls are those of vllm's own Python: FlashMLA's dense decode, and FlashAttention-3's forward on paged caches, with q_v for a latent
cache. Where a peer takes no sinks, its output times sigmoid(lse - sink) is what it would be with them; the
correction is not timed. PyTorch's own attention (scaled_dot_product_attention) knows no pages: it gets each request's tokens one
behind the other. FlashMLA's division of the work is made once and kept between timed calls; ours is timed with every call.
"""

import glob
import json
import os
import sys

import torch


def load(folder, pattern):
    found = glob.glob(os.path.join(folder, pattern))
    if not found:
        raise SystemExit(f"{folder}: expected {pattern}, found none; run fetch_peers.py {folder}")
    torch.ops.load_library(found[0])


def flashmla(case, q, cache, values, lengths, pages, sinks):
    """q [batch, tokens, heads, row], cache [pages, 64, row]; out [batch, tokens, heads, rank], lse [batch, heads, tokens]."""
    state = [None, None]

    def call(cache, values):
        out, lse, state[0], state[1] = torch.ops._flashmla_C.dense_decode_fwd(
            q, cache.unsqueeze(2), case["out_row"], lengths, pages, case["scale"], case["mask"] == "causal", state[0], state[1], None
        )
        return out, lse.transpose(1, 2)

    return call, True


def fa3(case, q, k, v, q_v, lengths, pages, s_aux):
    batch, tokens, heads = case["batch"], case["query_tokens"], case["query_heads"]
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device="cuda")
    window = (case["window"] - 1, 0) if case["window"] else (-1, -1)
    out, lse, *_ = torch.ops._vllm_fa3_C.fwd(
        q.reshape(batch * tokens, heads, -1), k, v, None, None,
        None if q_v is None else q_v.reshape(batch * tokens, heads, -1),
        None, starts, None, None, None, lengths, tokens, case["most"], pages,
        None, None, None, None, None, None, None, None,
        case["scale"], True, window[0], window[1], 0.0, True, None, 0, None, 0, s_aux, 1, 0, None,
    )  # fmt: skip
    return out.reshape(batch, tokens, heads, -1), lse.transpose(0, 1).reshape(batch, tokens, heads)


def fa3_latent(case, q, cache, values, lengths, pages, sinks):
    rank = case["out_row"]
    turned, latent = q[..., rank:].contiguous(), q[..., :rank].contiguous()

    def call(cache, values):
        paged = cache.unsqueeze(2)
        return fa3(case, turned, paged[..., rank:], paged[..., :rank], latent, lengths, pages, None)

    return call, True


def fa3_grouped(case, q, cache, values, lengths, pages, sinks):
    s_aux = None if sinks is None else sinks.to(torch.bfloat16)

    def call(cache, values):
        shape = (cache.shape[0], 64, case["kv_heads"], case["out_row"])
        return fa3(case, q, cache.view(shape), values.view(shape), None, lengths, pages, s_aux)

    return call, False


def sdpa_grouped(case, q, cache, values, lengths, pages, sinks):
    """The caches hold each request's pages in order; there is one query token, which sees all of its request."""
    batch, count = pages.shape
    seen = torch.arange(count * 64, device=pages.device)[None] < lengths[:, None]
    mask = None if bool(seen.all()) else seen[:, None, None, :]

    def call(cache, values):
        heads = lambda x: x.view(batch, count * 64, case["kv_heads"], case["out_row"]).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), heads(cache), heads(values), attn_mask=mask, scale=case["scale"], enable_gqa=True
        )
        return out.transpose(1, 2), None

    return call, False


PEERS = {"flashmla": flashmla, "fa3-latent": fa3_latent, "fa3-grouped": fa3_grouped, "sdpa-grouped": sdpa_grouped}


def bits(path, shape):
    return torch.frombuffer(bytearray(open(path, "rb").read()), dtype=torch.bfloat16).reshape(shape).cuda()


def check(work, case):
    """One problem: outputs and log-sum-exps (without the sink; null where the peer gives another one) into files."""
    at = lambda name: os.path.join(work, f"{case['file']}.{name}")
    row, width = case["row"], case["row"] * case["kv_heads"]
    q = bits(at("q"), (case["batch"], case["query_tokens"], case["query_heads"], row))
    cache = bits(at("cache"), (-1, 64, width))
    values = bits(at("values"), (-1, 64, width)) if case["grouped"] else None
    lengths = torch.tensor(case["lengths"], dtype=torch.int32, device="cuda")
    pages = torch.tensor(case["pages"], dtype=torch.int32, device="cuda").reshape(case["batch"], -1)
    sinks = torch.tensor(case["sinks"], dtype=torch.float32, device="cuda") if case["sinks"] else None
    if case["peer"] == "sdpa-grouped":
        cache, values = (x[pages.long()].reshape(-1, 64, width) for x in (cache, values))
    call, correct = PEERS[case["peer"]](case, q, cache, values, lengths, pages, sinks)
    out, lse = call(cache, values)
    out = out.float()
    if correct and sinks is not None:
        out = out * torch.sigmoid(lse.float() - sinks).unsqueeze(-1)
    has_lse = lse is not None and (correct or sinks is None)
    out.contiguous().cpu().numpy().tofile(at("out"))
    if has_lse:
        lse.float().contiguous().cpu().numpy().tofile(at("lse"))


def time(case, batch, context, repeats, l2):
    """Median in microseconds, with caches in turn that are larger than the L2 cache together; None when they do not fit."""
    case = dict(case, batch=batch, most=context)
    width, count = case["row"] * case["kv_heads"], -(-context // 64)
    size = batch * count * 64 * width * 2 * (2 if case["grouped"] else 1)
    copies = min(64, max(1, -(-4 * l2 // size)))
    if copies * size > torch.cuda.get_device_properties(0).total_memory // 2:
        return None
    make = lambda: torch.rand(batch * count, 64, width, device="cuda").sub_(0.5).to(torch.bfloat16)
    caches = [(make(), make() if case["grouped"] else None) for _ in range(copies)]
    q = torch.rand(batch, case["query_tokens"], case["query_heads"], case["row"], device="cuda").sub_(0.5).to(torch.bfloat16)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    pages = torch.randperm(batch * count, device="cuda").to(torch.int32).reshape(batch, count)
    sinks = torch.zeros(case["query_heads"], device="cuda") if case["sinks"] else None
    call, _ = PEERS[case["peer"]](case, q, *caches[0], lengths, pages, sinks)
    times = []
    for i in range(repeats + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(*caches[i % copies])
        end.record()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def main():
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    extensions, work, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3])
    load(extensions, "_flashmla_C*.so")
    load(extensions, "_vllm_fa3_C*.so")
    with open(os.path.join(work, "problems.json")) as file:
        problems = json.load(file)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    answers = {"torch": torch.__version__, "failures": {}, "times": []}
    for case in problems["cases"]:
        try:
            check(work, case)
        except Exception as error:  # a peer that refuses a shape is news, and no reason to leave the others out
            answers["failures"][case["file"]] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if not case["timed"]:
            continue
        for batch, context in problems["shapes"]:
            microseconds = time(case, batch, context, repeats, l2)
            answers["times"].append({"file": case["file"], "batch": batch, "context": context, "microseconds": microseconds})
            torch.cuda.empty_cache()
    with open(os.path.join(work, "answers.json"), "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
