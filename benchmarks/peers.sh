#!/usr/bin/env bash
# Create an environment with the systems that `benchmarks/bench.py --peers FOLDER` measures.
#
#     bash benchmarks/peers.sh FOLDER [REFERENCE]
#
# FOLDER      the virtual environment to create or update
# REFERENCE   a clone of the reference implementation to copy; default: cloned from GitHub
#
# PYTHON names the interpreter whose torch is measured (default: python). The environment uses that
# interpreter's packages, so that all systems run on the same torch and nothing large is installed
# twice; Vitrail's environment is not changed.
set -euo pipefail

folder=${1:?usage: bash benchmarks/peers.sh FOLDER [REFERENCE]}
given=${2:-}
python=${PYTHON:-python}
repository=https://github.com/nick8592/ViT-Classification-CIFAR10
commit=31be6ce

"$python" -c 'import torch' || { echo "peers.sh: $python has no torch: set PYTHON" >&2; exit 2; }
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/torch-of-vitrail.pth"

# torchvision must match torch (0.28 for 2.13), and --no-deps keeps it from installing another torch.
minor=$("$python" -c 'import torch; print(torch.__version__.split(".")[1])')
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --no-deps \
    timm==1.0.31 vit-pytorch==1.26.11 einops==0.8.2 "torchvision==0.$((minor + 15)).*"
# transformers (which needs no torch), and what the reference and timm import.
pip install --quiet transformers==5.24.0 tqdm==4.70.1 scikit-learn==1.9.1

# The package index's torchvision is built for CUDA. With a CPU-only torch it lacks two operators that
# no system here calls, but it cannot be imported without them: sitecustomize.py declares them.
import_all='import torchvision, timm, vit_pytorch, transformers, sklearn.metrics'
if ! "$folder/bin/python" -c 'import torchvision' 2>/dev/null; then
    cat >"$site/sitecustomize.py" <<'PYTHON'
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor x) -> Tensor")
torch.torchvision_shim = library  # kept alive
PYTHON
fi
"$folder/bin/python" -W ignore -c "$import_all"

if [ -n "$given" ]; then
    mkdir -p "$folder/reference"
    cp -r "$given/." "$folder/reference"
elif [ ! -d "$folder/reference" ]; then
    git clone --quiet "$repository" "$folder/reference"
    git -C "$folder/reference" checkout --quiet "$commit"
fi
[ -f "$folder/reference/model.py" ] ||
    { echo "peers.sh: $folder/reference has no model.py: not the reference implementation" >&2; exit 2; }

echo "ready: python benchmarks/bench.py --peers $folder"
