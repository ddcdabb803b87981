"""Computes the committed fixtures again with the programs they came from and compares; needs only Python 3.11.

    python3 oracle.py            check every fixture, then remote_code.py (this is `cargo xtask oracle`)
    python3 oracle.py write      write the fixtures, instead of comparing
    python3 oracle.py remote     converted checkpoints in transformers only (remote_code.py)

Further arguments go to make_fixtures.py, with `remote` to remote_code.py.

The packages of requirements.txt go into target/oracle/venv (about 6 GB), once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REQUIREMENTS = HERE / "requirements.txt"
VENV = ROOT / "target" / "oracle" / "venv"
ACTIONS = {
    "check": [["make_fixtures.py", "--check"], ["remote_code.py"]],
    "write": [["make_fixtures.py"]],
    "remote": [["remote_code.py"]],
}


def environment() -> Path:
    """The interpreter of a complete environment; made again when the requirements changed or it is incomplete."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    stamp, python = VENV / "complete", VENV / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == digest and python.is_file():
        return python
    if sys.version_info[:2] != (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"{REQUIREMENTS.name}: expected Python 3.11, found {version}; fix: run this with python3.11")
    print(f"installing {REQUIREMENTS.name} into {VENV} (about 6 GB, once)", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True, env=own_environment())
    pip = [python, "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "-r", REQUIREMENTS], check=True, env=own_environment())
    stamp.write_text(digest)
    return python


def own_environment() -> dict[str, str]:
    """Without the PYTHONPATH of a caller, whose packages are of other versions."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def main() -> int:
    action, *rest = sys.argv[1:] or ["check"]
    if action.startswith("-"):
        action, rest = "check", [action, *rest]
    if action not in ACTIONS:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        python = environment()
    except subprocess.CalledProcessError as error:
        print(f"the oracle's environment: {' '.join(map(str, error.cmd))} failed with {error.returncode}", file=sys.stderr)
        return 2
    # All of them run, so that everything wrong is seen at once.
    codes = []
    for script, *fixed in ACTIONS[action]:
        codes.append(subprocess.run([python, "-B", HERE / script, *fixed, *rest], env=own_environment()).returncode)
        rest = []
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
