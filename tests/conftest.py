"""No network and no GPU in tests; torchvision is repaired before any test imports timm."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs a process a core

import teachers  # noqa: F401
