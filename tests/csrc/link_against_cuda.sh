#!/usr/bin/env bash
# Before a release: csrc/ with its CUDA kernels, linked against a torch that was built for CUDA, loads and registers every
# operation. Needs nvcc and 8 GB of disk; no GPU. Usage: tests/csrc/link_against_cuda.sh [FOLDER] (default: build/cuda)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(realpath -m "${1:-$root/build/cuda}")
export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(realpath "$(command -v nvcc)")")")}

mkdir -p "$folder"
python3.11 -m venv "$folder/venv"
# PyPI's torch for Linux is the CUDA build; the library serves any torch from 2.10 on, so the newest is as good.
"$folder/venv/bin/pip" install --quiet "setuptools>=77" wheel numpy pydantic pyyaml torch
rm -rf "$folder/moescale"
mkdir "$folder/moescale"
git -C "$root" archive HEAD | tar -x -C "$folder/moescale"
(cd "$folder/moescale" && "$folder/venv/bin/python" setup.py --quiet build_ext --inplace)
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch

from moescale.moe import ops

assert torch.version.cuda is not None, f"torch {torch.__version__} is not built for CUDA"
found = {(name, device): ops.implementation(name, device) for name in ops.OPERATIONS for device in ("CPU", "CUDA")}
assert set(found.values()) == {"native"}, (ops.unavailable, found)
print(f"torch {torch.__version__}: all {len(ops.OPERATIONS)} operations are native on CPU and CUDA")
PYTHON
