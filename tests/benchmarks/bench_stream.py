"""Speed of the training stream, compared with a bare loop and with open_clip's pipeline.

    python -m tests.benchmarks.bench_stream

One process, no workers, one thread, the same JPEGs of 500 x 375 in the page cache, random crops to
224 x 224. The bare loop holds the files in memory and only decodes, crops, resizes and flips.
open_clip's pipeline repeats the stages of `open_clip_train.data.get_wds_dataset`, which cannot be
imported without pandas; captions are left out. It is timed as it is (float images, normalised) and
with a transform that ends at uint8, as the stream does. All take turns; the ratios of wall time and
of process CPU time, which other processes disturb less, are medians over rounds. Targets: at least
0.9 times the images/s of the bare loop and 1.0 times those of open_clip.
"""

import argparse
import io
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from data.config import AugmentationConfig, DataConfig
from data.decode import random_box
from data.layout import fixed_layout
from data.stream import TrainStream
from teachers.torchvision_ops import declare_missing_operators
from tests.benchmarks.figure import Figure

PHOTOGRAPHS = {
    "skimage": ("data", "coffee.png astronaut.png chelsea.png rocket.jpg motorcycle_left.png"),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
SIZE, OUTPUT, BATCH = (500, 375), 224, 32
Round = Callable[[], int]  # reads some images and returns their number


def make_photographs(num: int) -> list[bytes]:
    """Random 4:3 crops of packaged photographs as JPEGs of about 70 KB."""
    rng, whole = random.Random(0), []
    for package, (folder, names) in PHOTOGRAPHS.items():
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent / folder
        whole += [Image.open(home / name).convert("RGB") for name in names.split()]
    photographs = []
    for number in range(num):
        image = whole[number % len(whole)]
        width = round(min(image.width, image.height * 4 / 3) * rng.uniform(0.7, 1))
        height = round(width * 3 / 4)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        crop = image.resize(SIZE, box=(left, top, left + width, top + height))
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=95)
        photographs.append(buffer.getvalue())
    return photographs


def write_shards(folder: Path, photographs: list[bytes], per_shard: int) -> list[str]:
    """Tar files of `per_shard` photographs each."""
    paths = []
    for start in range(0, len(photographs), per_shard):
        paths.append(str(folder / f"{start // per_shard:03}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(start, min(start + per_shard, len(photographs))):
                info = tarfile.TarInfo(f"{number:06}.jpg")
                info.size = len(photographs[number])
                tar.addfile(info, io.BytesIO(photographs[number]))
    return paths


def stream_round(shards: list[str], num: int) -> Round:
    """The training stream; one iterator over all rounds, as in a run."""
    config = DataConfig.model_validate({"sources": [{"shards": shards}], "workers": 0})
    size = (OUTPUT, OUTPUT)
    stream = TrainStream(
        config, fixed_layout(resolution=size, batch_size=BATCH, micro_batch_size=BATCH)
    )
    batches = stream.batches()
    return lambda: sum(len(next(batches).images) for _ in range(num // BATCH))


def bare_round(photographs: list[bytes]) -> Round:
    """Decodes, crops, resizes and flips."""
    import simplejpeg

    how, rng = AugmentationConfig(), random.Random(0)

    def run() -> int:
        for data in photographs:
            image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
            box = random_box(image.height, image.width, 1.0, how, rng)
            small = image.resize((OUTPUT, OUTPUT), Image.Resampling.BICUBIC, box=box)
            pixels = np.asarray(small)
            if rng.random() < how.flip:
                pixels = pixels[:, ::-1]
        return len(photographs)

    return run


def open_clip_round(shards: list[str], transform: Callable[[Image.Image], torch.Tensor]) -> Round:
    """open_clip's stages for training, with its buffer sizes; one epoch a round."""
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.detshuffle(bufsize=2000, initial=500, seed=0),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.decode("pilrgb", handler=wds.warn_and_continue),
        wds.rename(image="jpg;png;jpeg;webp"),
        wds.map_dict(image=transform),
        wds.to_tuple("image"),
        wds.batched(BATCH, partial=False),
    )
    loader = wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=0)
    return lambda: sum(len(images) for (images,) in loader)


def open_clip_transforms() -> Iterator[Callable[[Image.Image], torch.Tensor]]:
    """open_clip's transform for training, with the stream's crops; and one that ends at uint8."""
    declare_missing_operators()  # else torchvision does not import with a CPU torch
    from open_clip.transform import AugmentationCfg, image_transform
    from torchvision.transforms import Compose, PILToTensor

    how = AugmentationConfig()
    own: Any = image_transform(OUTPUT, is_train=True, aug_cfg=AugmentationCfg(scale=how.scale))
    yield own
    yield Compose([*own.transforms[:-2], PILToTensor()])


def measure(variants: dict[str, Round], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds per image, by variant and round; the first round only warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            num = run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                times[name].append((wall / num, cpu / num))
    return times


def main() -> list[Figure]:
    """Prints the table; returns the two ratios of wall time that have a target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--images", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    photographs = make_photographs(options.images)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), photographs, 32)
        own, short = open_clip_transforms()
        variants = {
            "stream": stream_round(shards, options.images),
            "bare loop": bare_round(photographs),
            "open_clip": open_clip_round(shards, own),
            "open_clip, uint8": open_clip_round(shards, short),
        }
        times = measure(variants, options.rounds)
    size = statistics.mean(map(len, photographs)) / 1000
    print(f"{options.images} JPEGs of {size:.0f} KB, {options.rounds} rounds, medians")
    print(f"{'':18}{'images/s':>10}{'CPU ms/image':>14}{'stream, wall':>14}{'stream, CPU':>13}")
    wall_ratios = {}
    for name, rows in times.items():
        wall, cpu = (statistics.median(row[i] for row in rows) for i in (0, 1))
        pairs = list(zip(rows, times["stream"], strict=True))
        ratios = [statistics.median(row[i] / ours[i] for row, ours in pairs) for i in (0, 1)]
        wall_ratios[name] = ratios[0]
        print(f"{name:18}{1 / wall:10.0f}{cpu * 1000:14.2f}{ratios[0]:13.2f}x{ratios[1]:12.2f}x")
    return [
        Figure(
            "stream over a bare loop of decode and resize", wall_ratios["bare loop"], 0.9, False
        ),
        Figure("stream over open_clip's pipeline", wall_ratios["open_clip"], 1.0, False),
    ]


if __name__ == "__main__":
    main()
