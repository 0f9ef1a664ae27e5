"""Trains upsamplers on the same images and views, and compares them on held-out photographs.

    python -m tests.quality.compare_upsamplers --data DATA --out OUT --teacher clip

One run of `train_together` for each seed trains all methods; finished runs are skipped and stopped
runs resume. Then `distill.evaluate` writes and prints the table. Some methods test what the public
code does differently: `featup-7taps` against `featup`, and `featup-aliased` and
`featsharp-jbu-aliased` at factors 2, 3 and 4, which are trained and evaluated with its resizing.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from distill.runtime.checkpoint import checkpoint_name, is_complete
from distill.runtime.config import dump_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
ALIASED = "-aliased"
JBU_AND_TILES = {"kind": "featsharp", "inputs": ["jbu", "tiles"]}
METHODS: dict[str, dict[str, Any]] = {
    "bilinear": {"kind": "bilinear"},
    "tile": {"kind": "tile"},
    "s2": {"kind": "s2"},
    "featup": {"kind": "featup"},
    "sapa": {"kind": "sapa"},
    "resfu": {"kind": "resfu"},
    "jafar": {"kind": "jafar"},
    "anyup": {"kind": "anyup"},
    "featsharp": {"kind": "featsharp"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "featsharp-jbu": JBU_AND_TILES,
    "featsharp-published": JBU_AND_TILES | {"layer_scale": 1e-6, "sigma": 1.0},
    "featup-published": {"kind": "featup", "sigma": 1.0},
    "featup-7taps": {"kind": "tests.quality.seven_taps:SevenTaps"},
    f"featup{ALIASED}": {"kind": "featup"},
    f"featsharp-jbu{ALIASED}": JBU_AND_TILES,
}
NATIVE = 128  # px of all three encoders here
TRAIN = ("nyuv2/train/rgb", "camvid/images/training", "coco/train2017", "photos")
HELD_OUT = {"nyuv2/test/rgb": 4, "camvid/images/validation": 5, "large": 1, "coco/val2017": 1}
_LEAST = 0.7  # smallest short side of a photograph, as a share of the upsampler's input
_NYU_INSIDE = (41, 45, 601, 471)  # without the white border of NYUv2's frames


def teachers(data: Path) -> dict[str, dict[str, Any]]:
    """The encoders' recipe entries."""
    weights = data.absolute() / "weights" / "squeezenet1_0_rgb255_f16.npz"
    return {
        "clip": {"kind": "dfn_clip", "model": "clip_ti16_128"},
        "siglip": {"kind": "siglip", "model": "siglip_ti16_128"},
        "squeezenet": {
            "kind": "tests.quality.squeezenet:SqueezeNet",
            "weights": str(weights),
            "resolution": [NATIVE, NATIVE],
        },
    }


def recipe(methods: list[str], seed: int, options: argparse.Namespace, run: Path) -> dict[str, Any]:
    """The recipe of one run of several methods."""
    known = METHODS | VARIANTS
    entries = {name: known[name] | {"factor": options.factor} for name in methods}
    return {
        "task": "upsampler",
        "run": {
            "dir": str(run),
            "seed": seed,
            "steps": options.steps,
            "batch_size": options.batch,
        },
        "data": {
            "sources": [{"shards": str(_photographs(options) / "train")}],
            "augmentation": {"scale": [0.25, 1.0], "ratio": [1.0, 1.0]},
            "workers": 0,
        },
        "teacher": teachers(options.data)[options.teacher],
        "upsampler": entries[methods[0]],
        "methods": entries,
        "targets": {"statistics_images": 256},
        "consistency": {"uncertainty_dim": 64},
        "spectral": False,
        "rates": {"guidance": 1.0},
        "optimizer": {"lr": options.lr},
        "schedule": {"warmup_steps": min(100, options.steps // 10)},
        # Clipping a common gradient norm would couple the methods.
        "engine": {"zero_stage": 1, "gradient_clipping": 0},
        "checkpoint": {"every": max(1, options.steps // 4)},
        "tracking": {"every": 10},
    }


def main() -> int:
    """The command; returns 1 if a run failed."""
    options = _parse()
    _write_photographs(options)
    folder = options.out / f"{options.teacher}-{options.factor}x-{options.steps}x{options.batch}"
    jobs = [(suffix, seed) for seed in options.seeds for suffix in ("", ALIASED)]
    jobs = [(suffix, seed) for suffix, seed in jobs if _alike(options.methods, suffix)]
    with ThreadPoolExecutor(options.parallel) as pool:
        failed = [log for log in pool.map(lambda job: _train(*job, options, folder), jobs) if log]
    for log in failed:
        print(f"failed: see {log}", file=sys.stderr)
    return 1 if failed else _compare(options, folder)


def _alike(methods: list[str], suffix: str) -> list[str]:
    """The methods with one pipeline."""
    return [m for m in methods if m.endswith(ALIASED) == bool(suffix)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.quality.compare_upsamplers")
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for all outputs")
    parser.add_argument("--teacher", choices=sorted(teachers(Path())), default="clip")
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS | VARIANTS, default=[*METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--views", type=int, default=5, help="views per image in evaluation")
    parser.add_argument("--parallel", type=int, default=1, choices=(1, 2))
    return parser.parse_args()


def _train(suffix: str, seed: int, options: argparse.Namespace, folder: Path) -> str | None:
    """Starts or resumes one run; returns the path of its log if it fails."""
    methods, run = _alike(options.methods, suffix), folder / f"seed{seed}{suffix}"
    if is_complete(run / "checkpoints" / checkpoint_name(options.steps)):
        return None
    run.mkdir(parents=True, exist_ok=True)
    path, log = run.with_suffix(".yaml"), run.with_suffix(".log")
    path.write_text(dump_yaml(recipe(methods, seed, options, run)))
    print(f"seed {seed}: {run}", flush=True)
    with log.open("a") as file:
        done = _command("train", suffix, path, stdout=file, stderr=subprocess.STDOUT)
    return str(log) if done else None


def _compare(options: argparse.Namespace, folder: Path) -> int:
    """Evaluates the methods of each pipeline together, and prints the tables."""
    last = Path("checkpoints") / checkpoint_name(options.steps)
    for suffix in ("", ALIASED):
        alike = _alike(options.methods, suffix)
        if not alike:
            continue
        path = folder / f"comparison{suffix}.yaml"
        runs = [folder / f"seed{seed}{suffix}" for seed in options.seeds]
        tree = {
            "task": "upsamplers",
            "dir": str(folder / f"comparison{suffix}"),
            "teacher": teachers(options.data)[options.teacher],
            "methods": {m: [str(run / last / f"{m}.safetensors") for run in runs] for m in alike},
            "evaluation": {
                "images": str(_photographs(options) / "held-out"),
                "num_views": options.views,
            },
        }
        path.write_text(dump_yaml(tree))
        if _command("evaluate", suffix, path):
            return 1
    return 0


def _command(name: str, suffix: str, recipe: Path, **streams: Any) -> int:
    module = {"train": "tests.quality.train_together", "evaluate": "distill.evaluate"}[name]
    command = [sys.executable, "-m", module, str(recipe)]
    if suffix:
        command = [sys.executable, "-m", "tests.quality.aliased", name, str(recipe)]
    ours = {"OMP_NUM_THREADS": "1", "COLUMNS": "140", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **ours}, check=False, **streams
    ).returncode


def _photographs(options: argparse.Namespace) -> Path:
    return options.out.absolute() / f"photographs-{options.factor * NATIVE}px"


def _write_photographs(options: argparse.Namespace) -> None:
    """Writes shards of photographs large enough for the upsampler's input, and a held-out set."""
    folder, side = _photographs(options), _LEAST * options.factor * NATIVE
    if (folder / "counts.json").exists():
        return
    counts = {"train": 0, "held-out": 0}
    sources = [("train", place, 1) for place in TRAIN]
    sources += [("held-out", place, every) for place, every in HELD_OUT.items()]
    for part, place, every in sources:
        target = folder / ("photographs" if part == "train" else part)
        target.mkdir(parents=True, exist_ok=True)
        for number, (name, data) in enumerate(_images(options.data / place)):
            with Image.open(io.BytesIO(data)) as opened:
                picture = opened.crop(_NYU_INSIDE) if "nyuv2" in place else opened.copy()
            if number % every == 0 and min(picture.size) >= side:
                out = target / f"{place.replace('/', '-')}-{name}.jpg"
                picture.convert("RGB").save(out, quality=95, subsampling=0)
                counts[part] += 1
    module = [sys.executable, "-m", "data.write_shards"]
    shards = [str(folder / "photographs"), str(folder / "train")]
    subprocess.run([*module, *shards], cwd=REPOSITORY, check=True)
    (folder / "counts.json").write_text(json.dumps(counts))


def _images(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the JPEGs of a folder, or of the tars in it."""
    for archive in sorted(source.glob("*.tar")):
        with tarfile.open(archive) as members:
            for member in members:
                file = members.extractfile(member)
                if file is not None and member.name.endswith(".jpg"):
                    yield Path(member.name).stem, file.read()
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg"):
            yield path.stem, path.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
