"""The workload of the step benchmarks: its recipe, its images, and a run of it.

A ViT-S/16 student of 224 px and two ViT-B/16 teachers with random weights; 8 images a step, AdamW,
fp32, one thread.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.write_shards import main as write_shards
from distill.runtime.config import dump_yaml

BATCH, SIDE = 8, 224
HIDDEN, LAYERS = 768, 1
TEACHER = "vit_base_patch16_224"
REPOSITORY = Path(__file__).resolve().parents[2]


def recipe(folder: Path, *, steps: int, **sections: Any) -> dict[str, Any]:
    """The recipe, over shards in `folder`; sections are merged in, but `teachers` replaces."""
    tree: dict[str, Any] = {
        "task": "student",
        "run": {"dir": str(folder / "run"), "steps": steps, "resolution": SIDE},
        "data": {"sources": [{"shards": str(folder / "shards")}], "workers": 0},
        "teachers": {
            name: {"kind": "timm", "model": TEACHER, "weights": "none"}
            for name in ("first", "second")
        },
        "student": {
            "size": "small",
            "max_resolution": SIDE,
            "num_registers": 0,
            "final_norm": True,  # as timm's ViT has, beside which it runs
            "head": {"hidden_dim": HIDDEN, "num_layers": LAYERS},
        },
        "targets": {"statistics_images": BATCH},
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 0},
        "checkpoint": {"every": 10_000},
        "tracking": {"every": 1},
    }
    tree["run"]["batch_size"] = BATCH
    for name, section in sections.items():
        tree[name] = section if name == "teachers" else {**tree.get(name, {}), **section}
    return tree


def write_workload(folder: Path, *, steps: int, **sections: Any) -> Path:
    """Writes shards of a few images, and the recipe; returns the recipe's path."""
    if not (folder / "shards").exists():
        (folder / "images").mkdir(parents=True)
        generator = np.random.default_rng(0)
        for i in range(32):
            coarse = generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((320, 256), Image.Resampling.BICUBIC)
            image.save(folder / "images" / f"{i}.jpg", quality=95)
        assert write_shards([str(folder / "images"), str(folder / "shards")]) == 0
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(recipe(folder, steps=steps, **sections)))
    return path


def launch(path: Path, num_ranks: int) -> tuple[float, float]:
    """Runs a recipe under the `deepspeed` launcher.

    Returns:
        The wall-clock times of launch and end, in seconds since the epoch.
    """
    # This environment's scripts first: DeepSpeed's launcher calls `python` and `ninja` by name.
    bins = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": bins}
    command = ["deepspeed", "--num_gpus", str(num_ranks), "--module", "distill.train_student"]
    command += [str(path)]
    started = time.time()
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    ended = time.time()
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return started, ended
