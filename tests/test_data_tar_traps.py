"""One table of traps in tar files, through every reader: index, stream, and `data.gather`."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from data.batch import BadSample
from data.errors import DataError
from data.gather import open_images
from data.images import load_images
from data.tar_scan import scan_shard
from data.tar_stream import StreamedImage, read_shard

LONG = "x" * 150


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


A, B, C = _jpeg(1), _jpeg(2), _jpeg(3)


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member with its header in GNU's format, padded to blocks."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def link(name: str, target: str, kind: bytes, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(name: str, data: bytes, **headers: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), headers
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def sparse(name: str) -> bytes:
    """A sparse file in the format of PAX 1.0: a map, then 512 of 100,000 bytes."""
    content = b"1\n0\n512\n".ljust(512, b"\0") + b"s" * 512
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    return pax(name, content, **headers, **{"GNU.sparse.realsize": "100000"})


def old_sparse(name: str) -> bytes:
    """A sparse file in the old format of GNU."""
    info = tarfile.TarInfo(name)
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\x00" + b"00000001000\x00"
    header[483:495] = b"00000303240\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"s" * 512


def global_header(size: int) -> bytes:
    record = f"{size} comment={'c' * (size - len(str(size)) - 10)}\n".encode()
    assert len(record) == size
    return member("pax_global_header", record, tarfile.XGLTYPE)


def damaged(whole: bytes) -> bytes:
    """The same with a wrong checksum."""
    return whole[:148] + b"7" + whole[149:]


END = bytes(1024)


class Trap(NamedTuple):
    archive: bytes
    images: dict[str, bytes]
    faults: dict[str, str] = {}  # the key of a bad sample to a part of its reason
    listed: dict[str, bytes] | None = None  # what `data.gather` finds, by its own names


TRAPS = {
    "plain": Trap(member("a.jpg", A) + member("b.png", B) + END, {"a": A, "b": B}),
    "upper case": Trap(member("a.JPG", A) + member("b.JpEg", B) + END, {"a": A, "b": B}),
    "dot slash": Trap(
        member("./", kind=tarfile.DIRTYPE) + member("./x/a.jpg", A) + END,
        {"x/a": A},
        listed={"x/a.jpg": A},
    ),
    "a folder named as an image": Trap(
        member("d.jpg/", kind=tarfile.DIRTYPE) + member("d.jpg/a.jpg", A) + END, {"d.jpg/a": A}
    ),
    "a folder with a size": Trap(
        link("d/", "", tarfile.DIRTYPE, 4096) + member("d/a.jpg", A) + END, {"d/a": A}
    ),
    "a long name, GNU": Trap(
        member(f"{LONG}.jpg", A) + member("b.jpg", B) + END, {LONG: A, "b": B}
    ),
    "a long name, PAX": Trap(pax(f"{LONG}.jpg", A) + member("b.jpg", B) + END, {LONG: A, "b": B}),
    "a name of 4000 characters": Trap(pax("y" * 4000 + ".jpg", A) + END, {"y" * 4000: A}),
    "the size in a PAX header": Trap(
        pax("a.jpg", A, size=str(len(A))) + member("b.jpg", B) + END, {"a": A, "b": B}
    ),
    "a global header": Trap(global_header(52) + member("a.jpg", A) + END, {"a": A}),
    "a global header of one block": Trap(global_header(512) + member("a.jpg", A) + END, {"a": A}),
    "global headers inside": Trap(
        member("a.jpg", A) + global_header(99) * 2 + member("b.jpg", B) + END, {"a": A, "b": B}
    ),
    "a damaged global header": Trap(
        damaged(global_header(52)) + member("a.jpg", A) + END, {"a": A}, {"": "no readable member"}
    ),
    "a damaged header behind a long name": Trap(
        member("a.jpg", A)
        + member(f"{LONG}.jpg", C)[:1024]
        + damaged(member("x", C))
        + member("b.jpg", B)
        + END,
        {"a": A, "b": B},
        {"": "no readable member"},
    ),
    "a damaged header behind a PAX header": Trap(
        pax(f"{LONG}.jpg", A)[:1024] + damaged(member("x", C)) + member("b.jpg", B) + END,
        {"b": B},
        {"": "no readable member"},
    ),
    "a sparse member": Trap(
        sparse("s.jpg") + member("b.jpg", B) + END,
        {"b": B},
        {"s": "link or special file"},
    ),
    "a sparse member that is no image": Trap(
        member("a.jpg", A) + sparse("a.bin") + member("b.jpg", B) + END, {"a": A, "b": B}
    ),
    "a sparse member of old": Trap(
        old_sparse("s.jpg") + member("b.jpg", B) + END, {"b": B}, {"s": "link or special file"}
    ),
    "a member of another size than is stored": Trap(
        pax("a.bin", b"x", **{"GNU.sparse.realsize": "100000"})
        + pax("s.jpg", A, **{"GNU.sparse.size": "99999"})
        + member("b.jpg", B)
        + END,
        {"b": B},
        {"a": "there is a .bin", "s": "link or special file"},
    ),
    "links": Trap(
        member("a.jpg", A)
        + link("h.jpg", "a.jpg", tarfile.LNKTYPE)
        + link("s.jpg", "/etc/passwd", tarfile.SYMTYPE)
        + END,
        {"a": A},
        {"h": "link or special file", "s": "link or special file"},
    ),
    "a hard link that states its target's size": Trap(
        member("a.jpg", A)
        + link("h.jpg", "a.jpg", tarfile.LNKTYPE, 99999)
        + member("b.jpg", B)
        + END,
        {"a": A, "b": B},
        {"h": "link or special file"},
    ),
    "a contiguous file": Trap(member("a.jpg", A, tarfile.CONTTYPE) + END, {"a": A}),
    "a device": Trap(
        member("a.jpg", A) + link("d.jpg", "", tarfile.FIFOTYPE) + END,
        {"a": A},
        {"d": "link or special file"},
    ),
    "a key twice": Trap(
        member("a.jpg", A) + member("a.png", B) + END,
        {"a": A},
        {"a": "a second image for the key (.png)"},
        {"a.jpg": A, "a.png": B},
    ),
    "a key with dots": Trap(
        member("v1.0/a.jpg", A) + member("b.v2.jpg", B) + END,
        {"v1.0/a": A},
        {"b": "there is a .v2.jpg"},
        {"v1.0/a.jpg": A, "b.v2.jpg": B},
    ),
    "an extension of several parts": Trap(
        member("a.jpg", A) + member("a.seg.png", B) + member("a.cls", b"1") + END,
        {"a": A},
        listed={"a.jpg": A, "a.seg.png": B},
    ),
    "an empty member": Trap(
        member("e.jpg") + member("a.jpg", A) + END,
        {"a": A},
        {"e": "an image of 0 bytes"},
        {"a.jpg": A, "e.jpg": b""},
    ),
    "a name that is not UTF-8": Trap(
        member("ol\udce9.jpg", A) + END, {"ol\\xe9": A}, listed={"ol\udce9.jpg": A}
    ),
    "a name with line breaks and commands": Trap(
        member("a\n\x1b[2Jb.jpg", A) + END, {"a\n\x1b[2Jb": A}
    ),
    "hidden files": Trap(
        member("._a.jpg", C)
        + member("a.jpg", A)
        + member("__MACOSX/x/._b.jpg", C)
        + member(".ipynb_checkpoints/b.jpg", C)
        + member("x/.cache/b.json", b"{}")
        + member("Thumbs.db", b"t")
        + END,
        {"a": A},
    ),
    "two archives": Trap(member("a.jpg", A) + END + member("b.jpg", B) + END, {"a": A, "b": B}),
    "no mark at the end": Trap(
        member("a.jpg", A), {"a": A}, {"": "without an end-of-archive mark"}
    ),
    "cut inside the last image": Trap(
        member("a.jpg", A) + member("b.jpg", B)[:600],
        {"a": A},
        {"": "ends inside the member 'b.jpg'"},
    ),
    "cut inside another member": Trap(
        member("a.jpg", A) + member("a.json", bytes(3000))[:1000],
        {"a": A},
        {"": "ends inside the member 'a.json'"},
    ),
    "cut inside the padding": Trap(
        member("a.jpg", A)[: 512 + len(A) + 1], {"a": A}, {"": "without an end-of-archive mark"}
    ),
    "a size below zero": Trap(
        member("a.jpg", A)
        + tarfile.TarInfo("n.jpg").tobuf(tarfile.GNU_FORMAT)[:124]
        + b"\xff" * 12
        + END,
        {"a": A},
        {"": ""},
    ),
    "bytes behind the end": Trap(
        member("a.jpg", A) + END + b"rubbish", {"a": A}, {"": "no readable member"}
    ),
    "compressed": Trap(b"\x1f\x8b" + bytes(99), {}, {"": "compressed with gzip; unpack it"}),
    "a pointer of Git LFS": Trap(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        {},
        {"": "`git lfs pull`"},
    ),
    "a zip": Trap(b"PK\x03\x04" + bytes(600), {}, {"": "a zip file"}),
    "empty": Trap(b"", {}, {"": "is empty"}),
    "zeros": Trap(bytes(10240), {}, {"": "an archive without members"}),
}

Found = tuple[dict[str, bytes], list[tuple[str, str]]]


def _indexed(path: Path) -> Found:
    scan, raw = scan_shard(path, path.name), path.read_bytes()
    places = zip(scan.keys, scan.offsets, scan.sizes, strict=True)
    bad = [(b.key, b.reason) for b in scan.bad]
    if scan.broken:
        bad.append(("", scan.broken))
    return {key: raw[offset : offset + size] for key, offset, size in places}, bad


def _streamed(path: Path) -> Found:
    items = list(read_shard(f"file://{path}", path.name))
    images = {item.key: item.data for item in items if isinstance(item, StreamedImage)}
    bad = [(item.key, item.reason) for item in items if isinstance(item, BadSample)]
    return images, [(key, reason.replace("the stream ", "the file ")) for key, reason in bad]


@pytest.mark.parametrize("reader", [_indexed, _streamed])
@pytest.mark.parametrize("name", TRAPS)
def test_every_reader_of_shards_finds_what_is_there(
    tmp_path: Path, name: str, reader: Callable[[Path], Found]
) -> None:
    trap = TRAPS[name]
    path = tmp_path / "s.tar"
    path.write_bytes(trap.archive)
    images, bad = reader(path)
    assert images == trap.images
    assert {key for key, _ in bad} == set(trap.faults)
    for key, reason in bad:
        assert trap.faults[key] in reason


@pytest.mark.parametrize("name", TRAPS)
def test_the_index_and_the_stream_agree_to_the_word(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(TRAPS[name].archive)
    indexed, streamed = _indexed(path), _streamed(path)
    assert streamed[0] == indexed[0]
    assert sorted(streamed[1]) == sorted(indexed[1])


@pytest.mark.parametrize("name", [n for n, trap in TRAPS.items() if trap.images])
def test_the_reader_of_archives_finds_the_same_images(tmp_path: Path, name: str) -> None:
    trap = TRAPS[name]
    path = tmp_path / "s.tar"
    path.write_bytes(trap.archive)
    with open_images(path) as files:
        found = {file: files.read(file) for file in files.sizes}
        damaged = dict(files.damaged)
    if trap.listed is None:
        assert sorted(found.values()) == sorted(trap.images.values())
    else:
        assert found == trap.listed
    assert bool(damaged) == (trap.listed is None and bool(trap.faults))


def test_evaluation_takes_only_the_image_of_a_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A label map `a.seg.png` is no photograph, as the stream of training has it."""
    (tmp_path / "0.tar").write_bytes(TRAPS["an extension of several parts"].archive)
    assert load_images(tmp_path, (8, 8))[1] == ["0.tar/a.jpg"]
    assert "left out 1 .png (a.seg.png)" in caplog.text


@pytest.mark.parametrize("name", ["compressed", "a pointer of Git LFS"])
def test_what_is_no_tar_is_told_with_the_way_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(TRAPS[name].archive)
    with pytest.raises(DataError, match=r"compressed|`git lfs pull`"), open_images(path):
        pass
