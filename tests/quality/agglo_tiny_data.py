"""Lays out the photographs that `recipes/agglo_tiny.yaml` trains on and is looked at with.

    python -m tests.quality.agglo_tiny_data --data DATA runs/agglo_tiny-data

    OUT/thumbnails/   shards of Tiny ImageNet's training pictures, 64 x 64 px
    OUT/photographs/  shards of `photos512` and `bsds`
    OUT/held-out/     twenty photographs of COCO

Nothing that the suite evaluates on is among the first two; Tiny ImageNet's training pictures are
the database of its nearest neighbours.
"""

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path

from data.shard_writer import WriteOptions, write_shards

SHARD = 4_000_000  # bytes


def write_thumbnails(archive: Path, out: Path) -> None:
    """Writes the pictures under `train/` of a zip as shards."""
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        chosen = Path(name) / "train.zip"
        with zipfile.ZipFile(archive) as source, zipfile.ZipFile(chosen, "w") as target:
            for member in source.namelist():
                if member.startswith("train/") and not member.endswith("/"):
                    target.writestr(zipfile.ZipInfo(member), source.read(member))
        write_shards(chosen, out, WriteOptions(SHARD))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tiny-imagenet/ ...")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    for name in ("photographs", "held-out"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_thumbnails(data / "tiny-imagenet" / "tiny-imagenet-180.zip", out / "thumbnails")
    for folder in ("photos512", "bsds"):
        for shard in sorted((data / folder).glob("*.tar")):
            shutil.copyfile(shard, out / "photographs" / shard.name)
    for picture in sorted((data / "coco" / "val2017").glob("*.jpg")):
        shutil.copyfile(picture, out / "held-out" / picture.name)


if __name__ == "__main__":
    main()
