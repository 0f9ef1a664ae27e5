"""Writes images as webdataset shards with a manifest: `python -m data.write_shards SOURCE OUT`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.text import print_anything, printable, shown

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NAMED = 5  # left-out files in the summary; the manifest lists all


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 on success and 2 on a user error, printed as one message."""
    print_anything()
    arguments = _parser().parse_args(argv)
    try:
        if arguments.quality is not None and arguments.max_side is None:
            raise DataError("--quality has no effect without --max-side: no image is re-encoded")
        from data.shard_writer import WriteOptions, write_shards  # slow to import; not for --help

        options = WriteOptions(arguments.target_size, arguments.max_side, arguments.quality or 95)
        manifest = write_shards(arguments.source, arguments.out, options)
    except DataError as error:
        print(f"write_shards: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("write_shards: interrupted; the same command continues", file=sys.stderr)
        return 130
    print(printable(_summary(manifest, arguments.out)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.write_shards",
        description="Write the images of SOURCE as webdataset shards OUT/000000.tar, ... and "
        "OUT/manifest.json. Every image is decoded once. Unreadable, truncated, too large and "
        "duplicate images are left out and listed in the manifest. Repeat an interrupted command "
        "to continue it; the shards are the same, byte for byte.",
        epilog="Exit codes: 0 on success, 2 for an error in the arguments, the source or the disk.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder (with subfolders), zip or uncompressed tar of JPEG, PNG and WebP images",
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a new or empty folder, or one to continue"
    )
    parser.add_argument(
        "--target-size",
        type=_size,
        default="256MB",
        metavar="SIZE",
        help="largest size of a shard, such as 500000, 64MB or 1GiB (default: %(default)s)",
    )
    parser.add_argument(
        "--max-side",
        type=_whole_number(1, 65535),
        metavar="N",
        help="shrink images whose longer side is above N pixels to N, as JPEG; "
        "without it every image keeps its bytes",
    )
    parser.add_argument(
        "--quality",
        type=_whole_number(1, 100),
        metavar="Q",
        help="quality of the JPEGs that --max-side writes (default: 95)",
    )
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; write 500000, 64MB or 1GiB")
    return size


def _whole_number(low: int, high: int) -> Any:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _summary(manifest: dict[str, Any], out: Path) -> str:
    lines = [
        f"{out}: {manifest['samples']} images in {len(manifest['shards'])} shards, "
        f"{manifest['bytes'] / 1e6:.1f} MB"
    ]
    left_out = manifest["left_out"]
    if left_out:
        counts = ", ".join(f"{n} {fault}" for fault, n in manifest["left_out_counts"].items())
        lines.append(f"left out {len(left_out)} ({counts}); manifest.json lists all, the first:")
        lines += [
            f"  {shown(e['name'])}: {e['fault']}, {shown(e['detail'], 500)}"
            for e in left_out[:_NAMED]
        ]
    if manifest["ignored"]:
        others = ", ".join(f"{n} {shown(kind)}" for kind, n in manifest["ignored"].items())
        lines.append(f"ignored other extensions: {others}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
