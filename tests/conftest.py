"""No network and no GPU in tests; torchvision is repaired before any test imports timm.

`pytest -m gpu` runs what needs a GPU, and that alone; everything else is about the CPU, also where
there is a GPU. Triton's kernels are interpreted there.
"""

import os
import sys

if "gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs a process a core

import teachers  # noqa: F401
