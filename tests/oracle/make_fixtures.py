"""Writes the oracle fixtures under tests/fixtures, or checks the committed ones against a fresh run.

    python make_fixtures.py                      write all of them
    python make_fixtures.py --check              compute again, compare, exit 1 where they differ
    python make_fixtures.py --perplexity TEXT    SmolLM2's perplexity on the first windows of a text

Everything here is computed by transformers (versions in requirements.txt), none of it by mlac.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from safetensors.torch import save_file

import compare
import rope_cases
import smollm2
import tiny_models

TESTS = Path(__file__).resolve().parent.parent


def default_gguf() -> Path | None:
    """Where the project's set-up puts SmolLM2."""
    found = sorted((TESTS.parent / "target" / "runtime" / "models").glob("**/SmolLM2*.gguf"))
    return found[0] if found else None


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_all(folder: Path, gguf: Path | None, only: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case in tiny_models.cases():
        if only is None or only in case.name:
            print(tiny_models.write(case, folder / case.name), flush=True)
    if only is None or only in "rope_tables":
        write_json(folder / "rope_tables.json", rope_cases.tables())
        print("rope_tables.json")
    if gguf is not None and (only is None or only in "smollm2"):
        (folder / "smollm2").mkdir(exist_ok=True)
        write_json(folder / "smollm2" / "encodings.json", smollm2.encodings(gguf))
        save_file(smollm2.logits(gguf), folder / "smollm2" / "oracle.safetensors")
        print("smollm2")
    # safetensors writes files that only their owner can read.
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TESTS / "fixtures", help="folder of the fixtures")
    parser.add_argument("--check", action="store_true", help="compare with the folder instead of writing it")
    parser.add_argument("--only", help="only fixtures whose name contains this")
    parser.add_argument("--gguf", type=Path, default=default_gguf(), help="SmolLM2's GGUF file")
    parser.add_argument("--perplexity", type=Path, metavar="TEXT", help="print SmolLM2's perplexity on a text file")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window (with --perplexity)")
    parser.add_argument("--windows", type=int, default=2, help="windows (with --perplexity)")
    args = parser.parse_args()

    wants_gguf = args.perplexity is not None or args.only is None or args.only in "smollm2"
    if wants_gguf and (args.gguf is None or not args.gguf.is_file()):
        found = args.gguf or "nothing under target/runtime/models"
        print(
            f"SmolLM2: expected its GGUF file, found {found}; fix: run `cargo xtask setup`, or pass --gguf FILE",
            file=sys.stderr,
        )
        return 2
    if args.perplexity is not None:
        value = smollm2.perplexity(args.gguf, args.perplexity, args.window, args.windows)
        print(f"perplexity {value:.4f} over {args.windows} windows of {args.window} tokens")
        return 0
    # One thread: sums are taken in the same order everywhere.
    torch.set_num_threads(1)
    if not args.check:
        write_all(args.out, args.gguf, args.only)
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        write_all(Path(fresh), args.gguf, args.only)
        problems = compare.folders(args.out, Path(fresh), whole=args.only is None)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(problems)} differences" if problems else "the committed fixtures agree with a fresh run")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
