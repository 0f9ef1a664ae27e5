"""A shard's headers: what is found in a whole tar file, and what is said of a damaged one."""

import gzip
import io
import pickle
import random
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.layout import fixed_layout
from data.stream import TrainStream
from data.tar_scan import ShardScan, scan_shard, split_name

SIZES = (700, 512, 30, 1500, 1024)


def _tar(path: Path, members: Sequence[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _scan(path: Path) -> ShardScan:
    return scan_shard(path, path.name)


def _contents(path: Path, scan: ShardScan) -> dict[str, bytes]:
    raw = path.read_bytes()
    places = zip(scan.keys, scan.offsets, scan.sizes, strict=True)
    return {key: raw[offset : offset + size] for key, offset, size in places}


@pytest.fixture
def members() -> list[tuple[str, bytes]]:
    rng = random.Random(0)
    return [(f"{i:03}.jpg", rng.randbytes(size)) for i, size in enumerate(SIZES)]


@pytest.fixture
def shard(tmp_path: Path, members: list[tuple[str, bytes]]) -> Path:
    return _tar(tmp_path / "s.tar", members)


def _starts(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_image_is_found_where_it_lies(tmp_path: Path, kind: int) -> None:
    rng = random.Random(0)
    names = ["a.jpg", "./b.JPEG", "x/y/c.png", "d/" + "e" * 90 + ".webp"]
    if kind != tarfile.USTAR_FORMAT:  # which cannot hold them
        names += ["long" * 60 + ".jpg", "größe.jpg"]
    members = [(name, rng.randbytes(100 + len(name))) for name in names]
    scan = _scan(path := _tar(tmp_path / "s.tar", members, format=kind))
    keys = [name.removeprefix("./").split(".")[0] for name in names]
    assert _contents(path, scan) == dict(zip(keys, [data for _, data in members], strict=True))
    assert (scan.bad, scan.broken) == ([], None)


def test_headers_for_all_members_are_no_damage(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    """`git archive` writes one."""
    path = _tar(
        tmp_path / "s.tar", members, format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}
    )
    scan = _scan(path)
    assert _contents(path, scan) == {name[:-4]: data for name, data in members}
    assert (scan.bad, scan.broken) == ([], None)
    raw = bytearray(path.read_bytes())
    start = scan.offsets[0] - 512
    raw[start] ^= 1  # damage right behind such a header is damage
    path.write_bytes(raw)
    scan = _scan(path)
    assert scan.keys == [name[:-4] for name, _ in members[1:]]
    assert [b.key for b in scan.bad] == [""]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("number", range(4))
def test_damage_behind_the_header_of_a_long_name_costs_one_sample(
    tmp_path: Path, kind: int, number: int
) -> None:
    members = [(f"{i}" * 200 + ".jpg", bytes([i + 1]) * 700) for i in range(4)]
    path = _tar(tmp_path / "s.tar", members, format=kind)
    raw = bytearray(path.read_bytes())
    raw[_scan(path).offsets[number] - 512] ^= 1
    path.write_bytes(raw)
    scan = _scan(path)
    assert _contents(path, scan) == {n[:-4]: d for i, (n, d) in enumerate(members) if i != number}
    assert scan.broken is None
    assert [b.key for b in scan.bad] == [""]


def test_archives_written_one_behind_the_other_are_read_whole(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    first = _tar(tmp_path / "a.tar", members[:2]).read_bytes()
    second = _tar(tmp_path / "b.tar", members[2:]).read_bytes()
    path = tmp_path / "s.tar"
    path.write_bytes(first + second)
    scan = _scan(path)
    assert _contents(path, scan) == {name[:-4]: data for name, data in members}
    assert (scan.bad, scan.broken) == ([], None)


def test_a_file_cut_inside_a_member_keeps_the_images_before_and_is_broken(
    shard: Path, members: list[tuple[str, bytes]]
) -> None:
    raw = shard.read_bytes()
    for number, start in enumerate(_starts(shard)):
        shard.write_bytes(raw[: start + 512 + SIZES[number] - 1])
        scan = _scan(shard)
        assert scan.keys == [name[:-4] for name, _ in members[:number]]
        assert scan.broken == f"the file ends inside the member '{members[number][0]}'"


def test_a_file_cut_between_members_is_broken(
    shard: Path, members: list[tuple[str, bytes]]
) -> None:
    raw = shard.read_bytes()
    for number, start in list(enumerate(_starts(shard)))[1:]:
        shard.write_bytes(raw[:start])
        scan = _scan(shard)
        assert scan.keys == [name[:-4] for name, _ in members[:number]]
        assert scan.broken == f"the file ends at byte {start} without an end-of-archive mark"


def test_a_file_cut_at_any_byte_is_noticed(shard: Path) -> None:
    raw = shard.read_bytes()
    end = _starts(shard)[-1] + 512 + 1024  # behind it only the mark, blocks of zeros
    for length in range(0, end + 512, 37):
        shard.write_bytes(raw[:length])
        scan = _scan(shard)
        assert scan.broken or scan.bad, length


@pytest.mark.parametrize("at", [0, 50, 124, 130, 148, 156, 257, 400, 511])
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_a_flipped_header_byte_costs_one_sample_and_is_named(
    shard: Path, members: list[tuple[str, bytes]], number: int, at: int
) -> None:
    raw = bytearray(shard.read_bytes())
    starts = [*_starts(shard), _starts(shard)[-1] + 512 + 1024]
    raw[starts[number] + at] ^= 0x41
    shard.write_bytes(raw)
    scan = _scan(shard)
    assert _contents(shard, scan) == {n[:-4]: d for i, (n, d) in enumerate(members) if i != number}
    assert [(b.shard, b.key) for b in scan.bad] == [("s.tar", "")]
    # Zeros may stand at either end of the lost part; the damage lies inside what is named.
    assert f"bytes {starts[number]} to {starts[number + 1]} belong to" in scan.bad[0].reason or (
        number == len(SIZES) - 1 and f"bytes {starts[number]} to " in scan.bad[0].reason
    )


@pytest.mark.parametrize("repeats", [1, 200])
def test_a_web_page_instead_of_a_tar_file_is_named(tmp_path: Path, repeats: int) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(b"<html>404</html>" * repeats)
    scan = _scan(path)
    assert scan.keys == []
    assert (
        scan.broken == "the file is not a tar file; it begins with b'<html>404</html>' (a web page)"
    )


def test_a_compressed_archive_is_no_shard(shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(shard.read_bytes(), mtime=0))
    assert "not a tar file; it begins with b'\\x1f\\x8b" in str(_scan(path).broken)


def test_empty_shards_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(b"")
    assert _scan(path).broken == "the file is empty"
    _tar(path, [])
    assert _scan(path).broken == "the file is an archive without members"


def test_a_shard_that_is_not_there_is_broken(tmp_path: Path) -> None:
    assert "No such file" in str(_scan(tmp_path / "s.tar").broken)


def test_a_sample_without_an_image_is_bad_and_one_with_more_members_is_not(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"1"),
        ("a.json", b"{}"),
        ("b.json", b"{}"),
        ("c.txt", b"x"),
        ("c.png", b"3"),
    ]
    scan = _scan(_tar(tmp_path / "s.tar", members))
    assert scan.keys == ["a", "c"]
    assert [tuple(b) for b in scan.bad] == [
        ("s.tar", "b", "no image (jpg, jpeg, png, webp); there is a .json")
    ]


def test_of_two_images_with_one_key_the_first_is_used_and_the_second_named(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"22"), ("a.jpg", b"333"), ("b.png", b"4444")]
    scan = _scan(path := _tar(tmp_path / "s.tar", members))
    assert _contents(path, scan) == {"a": b"1", "b": b"22"}
    assert [(b.key, b.reason) for b in scan.bad] == [
        ("a", "a second image for the key (.jpg); the first is used"),
        ("b", "a second image for the key (.png); the first is used"),
    ]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    members = [("a.json", b"{}"), ("b.jpg", b"2"), ("a.jpg", b"1"), ("b.json", b"{}")]
    scan = _scan(path := _tar(tmp_path / "s.tar", members))
    assert _contents(path, scan) == {"b": b"2", "a": b"1"}
    assert scan.bad == []


def test_an_empty_image_and_a_link_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("empty.jpg"))
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard")):
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    scan = _scan(path)
    assert scan.keys == []
    assert [(b.key, b.reason) for b in scan.bad] == [
        ("empty", "an image of 0 bytes"),
        ("soft", "the image is a link or special file"),
        ("hard", "the image is a link or special file"),
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.jpg", ("a", "jpg")),
        ("./x/a.JPG", ("x/a", "jpg")),
        ("x.y/a.jpg", ("x.y/a", "jpg")),
        ("img.v1.0.jpg", ("img", "v1.0.jpg")),
        (".hidden", None),
        ("x/.hidden.jpg", None),
        ("plain", None),
    ],
)
def test_names_are_split_at_the_first_dot_as_webdataset_does(
    name: str, split: tuple[str, str] | None
) -> None:
    assert split_name(name) == split


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class _Attack:
    """Calls back while it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._marker,)


def test_pickles_are_never_decoded_and_compressed_members_never_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "attacked"
    attack = pickle.dumps(_Attack(marker))
    pickle.loads(attack)
    assert marker.exists()  # the attack works where it is decoded
    marker.unlink()
    bomb = gzip.compress(bytes(10_000_000))
    members = [(f"{i}.{kind}", _jpeg(i)) for i, kind in enumerate(("jpg", "jpeg"))]
    kinds = ("pkl", "pickle", "pyd", "pth", "cls", "index")
    members += [(f"0.{kind}", attack) for kind in kinds]
    members += [("1.txt.gz", bomb), ("1.jpg.gz", bomb), ("2.pkl", attack)]
    folder = tmp_path / "shards"
    folder.mkdir()
    _tar(folder / "0.tar", members)
    for module, name in ((zlib, "decompress"), (zlib, "decompressobj"), (gzip, "GzipFile")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a member was expanded"))
    config = DataConfig.model_validate(
        {"sources": [{"shards": str(folder)}], "workers": 0, "max_bad_share": 0.5}
    )
    stream = TrainStream(config, fixed_layout(resolution=(8, 8), batch_size=2, micro_batch_size=2))
    assert sorted(next(stream.batches()).keys) == ["0.tar/0", "0.tar/1"]
    assert stream.num_samples == 2
    assert not marker.exists()


@pytest.mark.parametrize(
    "data", [b"<html>", pickle.dumps([1, 2]), gzip.compress(bytes(999), mtime=0)]
)
def test_other_content_under_an_image_extension_is_a_bad_sample(
    tmp_path: Path, data: bytes
) -> None:
    _tar(tmp_path / "0.tar", [("0.jpg", _jpeg(0)), ("1.jpg", _jpeg(1)), ("wrong.png", data)])
    config = DataConfig.model_validate(
        {"sources": [{"shards": str(tmp_path)}], "workers": 0, "max_bad_share": 0.5}
    )
    stream = TrainStream(config, fixed_layout(resolution=(8, 8), batch_size=3, micro_batch_size=3))
    assert len(next(stream.batches()).keys) == 3
    ((*place, reason),) = stream.bad
    assert place == ["0.tar", "wrong"]
    assert reason.startswith("not a JPEG, PNG or WebP image")


def test_a_png_named_jpg_is_read_by_its_content(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    _tar(tmp_path / "0.tar", [("0.jpg", buffer.getvalue())])
    config = DataConfig.model_validate({"sources": [{"shards": str(tmp_path)}], "workers": 0})
    stream = TrainStream(config, fixed_layout(resolution=(8, 8), batch_size=1, micro_batch_size=1))
    assert next(stream.batches()).images[0, :, 0, 0].tolist() == [1, 2, 3]
