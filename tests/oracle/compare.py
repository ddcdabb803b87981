"""Compares a folder of committed fixtures with a freshly computed one and lists every difference."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

# Computed numbers, relative to the largest of their tensor: another processor sums in another order.
LOGITS_TOLERANCE = 1e-5
FREQUENCY_TOLERANCE = 1e-6
COMPUTED = ("logits", "probe_logits", "logsumexp")


def folders(committed: Path, fresh: Path, whole: bool) -> list[str]:
    """Every difference; `whole`: a file that only one side has is one too."""
    names = {file.relative_to(fresh) for file in fresh.rglob("*") if file.is_file()}
    problems = []
    if whole:
        for file in sorted(committed.rglob("*")):
            if file.is_file() and file.relative_to(committed) not in names:
                problems.append(f"{file}: committed, but no fixture writes it")
    for name in sorted(names):
        old, new = committed / name, fresh / name
        if not old.is_file():
            problems.append(f"{old}: missing, a fresh run writes it")
        elif name.name in ("io.safetensors", "oracle.safetensors"):
            problems += tensors(old, new)
        elif name.name == "rope_tables.json":
            problems += rope_tables(old, new)
        elif old.read_bytes() != new.read_bytes():
            problems.append(f"{old}: bytes differ from a fresh run's")
    return problems


def tensors(old_file: Path, new_file: Path) -> list[str]:
    old, new = load_file(old_file), load_file(new_file)
    if old.keys() != new.keys():
        return [f"{old_file}: holds {sorted(old)}, a fresh run writes {sorted(new)}"]
    problems = []
    for name in sorted(old):
        if old[name].shape != new[name].shape or old[name].dtype != new[name].dtype:
            problems.append(f"{old_file}: {name} is {old[name].dtype} {list(old[name].shape)}, fresh {new[name].dtype} {list(new[name].shape)}")
        elif name in COMPUTED:
            scale = new[name].abs().max().item()
            error = (old[name] - new[name]).abs().max().item() / scale
            if not error <= LOGITS_TOLERANCE:
                problems.append(f"{old_file}: {name} differs by {error:.1e} of its scale {scale:.2f}, allowed {LOGITS_TOLERANCE:.0e}")
        elif not torch.equal(old[name], new[name]):
            problems.append(f"{old_file}: {name} differs")
    return problems


def rope_tables(old_file: Path, new_file: Path) -> list[str]:
    old, new = json.loads(old_file.read_text()), json.loads(new_file.read_text())
    if [(t["name"], t["config"]) for t in old] != [(t["name"], t["config"]) for t in new]:
        return [f"{old_file}: other configurations than a fresh run's"]
    problems = []
    for a, b in zip(old, new):
        x = torch.tensor([*a["inv_freq"], a["attention_factor"]], dtype=torch.float64)
        y = torch.tensor([*b["inv_freq"], b["attention_factor"]], dtype=torch.float64)
        error = ((x - y).abs() / y.abs()).max().item() if x.shape == y.shape else float("inf")
        if not error <= FREQUENCY_TOLERANCE:
            problems.append(f"{old_file}: {a['name']} differs by {error:.1e}, allowed {FREQUENCY_TOLERANCE:.0e}")
    return problems
