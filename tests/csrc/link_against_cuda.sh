#!/usr/bin/env bash
# Before a release: csrc/ as it is in the working tree, with its CUDA kernels and NCCL, linked against a torch that was
# built for CUDA, loads and registers every operation. Needs nvcc and 8 GB of disk; no GPU.
# Usage: tests/csrc/link_against_cuda.sh [FOLDER] (default: build/cuda)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(realpath -m "${1:-$root/build/cuda}")
# nvcc knows where its toolkit is; the path may only hold a script that calls it.
toolkit=$(nvcc --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p')
export CUDA_HOME=${CUDA_HOME:-$(dirname "$toolkit")}

mkdir -p "$folder"
[ -x "$folder/venv/bin/pip" ] || python3.11 -m venv "$folder/venv"
# PyPI's torch for Linux is the CUDA build; the library serves any torch that is newer than its stable ABI (setup.py).
"$folder/venv/bin/pip" install --quiet "setuptools>=77" wheel numpy pydantic pyyaml torch
rm -rf "$folder/moescale"
mkdir "$folder/moescale"
git -C "$root" ls-files -z --cached --others --exclude-standard | tar -c -C "$root" --null -T - --ignore-failed-read |
  tar -x -C "$folder/moescale"
(cd "$folder/moescale" && "$folder/venv/bin/python" setup.py --quiet build_ext --inplace)
cd "$folder"
venv/bin/python - <<'PYTHON'
import re
import subprocess

import torch
from torch.distributed import ProcessGroupNCCL

from moescale.compat.native import LIBRARY
from moescale.moe import ops
from moescale.parallel.exchange import NcclExchange  # noqa: F401

assert torch.version.cuda is not None, f"torch {torch.__version__} is not built for CUDA"
found = {(name, device): ops.implementation(name, device) for name in ops.OPERATIONS for device in ("CPU", "CUDA")}
assert set(found.values()) == {"native"}, (ops.unavailable, found)
print(f"torch {torch.__version__}: all {len(ops.OPERATIONS)} operations are native on CPU and CUDA")

assert torch._C._dispatch_has_kernel_for_dispatch_key("moescale_nccl::exchange", "CUDA")
assert hasattr(ProcessGroupNCCL, "_comm_ptr"), "parallel/exchange/nccl.py takes the communicator from there"
with open("/proc/self/maps") as maps:
    nccl = {line.split()[-1] for line in maps if "libnccl" in line}
assert len(nccl) == 1, f"the extension and torch must share one NCCL, not {nccl}"
print(f"the exchange over NCCL is native; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))} from {nccl.pop()}")

symbols = subprocess.run(["nm", "-D", "-u", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
assert not re.search(r" _ZNK?(2at|3c10|5torch)", symbols), "only torch's stable ABI is called"
PYTHON
