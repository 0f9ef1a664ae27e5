"""write_shards: one result from folder, zip and tar, however often it was interrupted."""

import fcntl
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.shard_writer
from data.config import DataConfig
from data.errors import DataError
from data.index import load_index
from data.intake import LeftOut, Sample, take_image
from data.layout import fixed_layout
from data.shard_file import unique_keys
from data.stream import TrainStream
from data.write_shards import main

COMMAND = [sys.executable, "-m", "data.write_shards"]
SIZE = "--target-size=20480"


def encode(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30), **options) -> bytes:
    """A noise image of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A valid header of 20000 x 20000 pixels, and little else."""
    small = bytearray(encode(0, "PNG", (8, 8)))
    small[16:24] = (20000).to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


GOOD = {f"{'ab'[i % 2]}/deep/{i:03}.jpg": encode(i) for i in range(24)} | {
    "a/x.PNG": encode(100, "PNG"),
    "a/x.webp": encode(101, "WEBP", lossless=True),
    "v1.2/photo.final.jpeg": encode(102),
    "ü/" + "long" * 30 + ".jpg": encode(103),
    "png_in_disguise.jpg": encode(104, "PNG"),
}
OTHERS = {"notes.txt": b"hello", "b/labels.txt": b"x", "README": b"", "anim.gif": b"GIF89a"}
BAD = {
    "bad/cut.jpg": (encode(1, size=(90, 90))[:-400], "truncated"),
    "bad/cut.png": (encode(2, "PNG")[:-300], "truncated"),
    "bad/cut.webp": (encode(2, "WEBP")[:-300], "truncated"),
    "bad/empty.jpg": (b"", "truncated"),
    "bad/html.jpg": (b"<html>404</html>", "unreadable"),
    "bad/huge.png": (huge_png(), "decompression bomb"),
    "zz/again.jpg": (GOOD["a/deep/000.jpg"], "duplicate"),
}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in reversed(files.items()):
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", GOOD)


def test_folder_zip_and_tar_give_the_same_bytes(tmp_path: Path) -> None:
    files = GOOD | OTHERS | {name: content for name, (content, _) in BAD.items()}
    sources = [
        write_folder(tmp_path / "photos", files),
        write_zip(tmp_path / "photos.zip", files),
        write_tar(tmp_path / "photos.tar", files),
    ]
    for number, source in enumerate(sources):
        assert main([str(source), str(tmp_path / f"out{number}"), SIZE]) == 0
    first, *rest = (snapshot(tmp_path / f"out{number}") for number in range(3))
    assert len(first) > 3
    assert rest == [first, first]


def test_every_image_keeps_its_bytes_under_a_key_of_its_path(photos: Path, tmp_path: Path) -> None:
    assert main([str(photos), str(tmp_path / "out"), SIZE]) == 0
    found, keys = [], []
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                found.append(tar.extractfile(member).read())
                keys.append(member.name)
    assert sorted(found) == sorted(GOOD.values())
    assert keys == sorted(keys)
    assert {"a/x.png", "a/x_2.webp", "v1_2/photo_final.jpg", "b/deep/001.jpg"} <= set(keys)
    assert "png_in_disguise.png" in keys


def test_the_manifest_says_what_is_there(photos: Path, tmp_path: Path) -> None:
    write_folder(photos, OTHERS)
    main([str(photos), str(tmp_path / "out"), SIZE])
    manifest = manifest_of(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard["name"] for shard in manifest["shards"]] == [path.name for path in shards]
    for shard, path in zip(manifest["shards"], shards, strict=True):
        assert shard["bytes"] == path.stat().st_size <= 20480
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        with tarfile.open(path) as tar:
            assert shard["samples"] == len(tar.getmembers())
    assert manifest["samples"] == len(GOOD) == sum(s["samples"] for s in manifest["shards"])
    assert manifest["bytes"] == sum(path.stat().st_size for path in shards)
    assert manifest["sizes"] == [{"height": 16, "width": 32, "images": len(GOOD)}]
    assert manifest["ignored"] == {"(none)": 1, ".gif": 1, ".txt": 2}
    assert manifest["complete"]
    assert set(snapshot(tmp_path / "out")) == {"manifest.json"} | {path.name for path in shards}


def test_bad_images_are_left_out_counted_and_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(photos, {name: content for name, (content, _) in BAD.items()})
    (photos / "bad/link.jpg").symlink_to("nowhere")
    assert main([str(photos), str(tmp_path / "out")]) == 0
    manifest = manifest_of(tmp_path / "out")
    faults = {entry["name"]: entry["fault"] for entry in manifest["left_out"]}
    expected = {name: fault for name, (_, fault) in BAD.items()}
    assert faults == expected | {"bad/link.jpg": "unreadable"}
    assert manifest["samples"] == len(GOOD)
    assert manifest["left_out_counts"] == {
        "decompression bomb": 1,
        "duplicate": 1,
        "truncated": 4,
        "unreadable": 2,
    }
    details = {entry["name"]: entry["detail"] for entry in manifest["left_out"]}
    assert details["zz/again.jpg"] == "the same bytes as 'a/deep/000.jpg'"
    said = capsys.readouterr().out
    assert "left out 8 (1 decompression bomb, 1 duplicate, 4 truncated, 2 unreadable)" in said
    assert "bad/cut.jpg: truncated, OSError: image file is truncated" in said


def test_a_damaged_zip_member_costs_one_image(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "s.zip", {"good.jpg": encode(0), "member.jpg": encode(1)})
    content = bytearray(source.read_bytes())
    content[200] ^= 0xFF
    source.write_bytes(content)
    assert main([str(source), str(tmp_path / "out")]) == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["samples"] == 1
    assert [entry["name"] for entry in manifest["left_out"]] == ["member.jpg"]
    assert "Bad CRC-32" in manifest["left_out"][0]["detail"]


def test_of_two_tar_members_of_one_name_the_last_is_used_and_links_are_left_out(
    tmp_path: Path,
) -> None:
    source = tmp_path / "s.tar"
    with tarfile.open(source, "w") as tar:
        for seed in (1, 2):
            member = tarfile.TarInfo("a.jpg")
            member.size = len(encode(seed))
            tar.addfile(member, io.BytesIO(encode(seed)))
        member = tarfile.TarInfo("b.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    assert main([str(source), str(tmp_path / "out")]) == 0
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        assert [tar.extractfile(m).read() for m in tar] == [encode(2)]
    details = {e["name"]: e["detail"] for e in manifest_of(tmp_path / "out")["left_out"]}
    assert details == {
        "a.jpg": "a later member of the archive has the same name",
        "b.jpg": "a link or special file inside the archive",
    }


def test_a_damaged_tar_header_is_named_and_the_images_behind_it_are_kept(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "s.tar", {f"{i}.jpg": encode(i) for i in range(4)})
    with tarfile.open(source) as tar:
        second = tar.getmembers()[1]
    content = bytearray(source.read_bytes())
    content[second.offset + 148] ^= 0xFF
    source.write_bytes(content)
    assert main([str(source), str(tmp_path / "out")]) == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["samples"] == 3
    assert [entry["fault"] for entry in manifest["left_out"]] == ["unreadable"]
    assert manifest["left_out"][0]["name"] == "s.tar"
    assert "belong to no readable member" in manifest["left_out"][0]["detail"]


def test_a_truncated_tar_gives_the_images_in_front(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "s.tar", {f"{i}.jpg": encode(i) for i in range(4)})
    with tarfile.open(source) as tar:
        last = tar.getmembers()[-1]
    os.truncate(source, last.offset_data + 700)
    assert main([str(source), str(tmp_path / "out")]) == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["samples"] == 3
    assert "the file ends inside the member" in str(manifest["left_out"])


def test_folder_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "s", {"here/1.jpg": encode(1)})
    write_folder(tmp_path / "far", {"2.jpg": encode(2)})
    (source / "there").symlink_to(tmp_path / "far")
    (source / "here/up").symlink_to(source)
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert manifest_of(tmp_path / "out")["samples"] == 2


def test_keys_are_unique_printable_and_without_dots() -> None:
    names = ["a.b.jpg", "a_b.jpg", "a_b.png", "../up.jpg", "new\nline/1.jpg", "x\udcff.jpg"]
    keys = ["a_b", "a_b_2", "a_b_3", "__/up", "new_line/1", "x�"]
    assert unique_keys(names) == keys


def _run_until(condition, arguments: list[str]) -> None:
    """Starts the command and kills it as soon as the condition holds."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


@pytest.mark.process
def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    files = {f"{i:03}.png": encode(i, "PNG", (150, 120)) for i in range(200)}
    files |= {"050copy.png": files["007.png"], "060cut.png": files["060.png"][:999]}
    files |= {"150copy.png": files["007.png"]}
    source = write_folder(tmp_path / "s", files)
    arguments = [str(source), str(tmp_path / "out"), "--target-size=200KB", "--max-side=140"]
    shard = tmp_path / "out/000003.tar"
    _run_until(shard.exists, arguments)
    killed = manifest_of(tmp_path / "out")
    assert not killed["complete"]
    assert 0 < killed["samples"] < 200
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            assert tar.getmembers()
    with pytest.raises(DataError, match="data.write_shards has not finished here; run it again"):
        load_index([str(shard)], ["s"], max_bad_share=0.0)
    assert main(arguments) == 0
    arguments[1] = str(tmp_path / "whole")
    assert main(arguments) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert manifest_of(tmp_path / "out")["left_out_counts"] == {"duplicate": 2, "truncated": 1}


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("step", range(1, 14, 3))
def test_stopped_at_any_write_to_the_disk_it_continues_to_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    write_folder(photos, {name: content for name, (content, _) in BAD.items()})
    left = [step]
    real = os.fsync

    def fsync(file: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise _Stop
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(_Stop):
            main([str(photos), str(tmp_path / "out"), SIZE])
    assert main([str(photos), str(tmp_path / "out"), SIZE]) == 0
    assert main([str(photos), str(tmp_path / "whole"), SIZE]) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_a_finished_folder_is_left_as_it_is(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(photos), str(out), SIZE]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([str(photos), str(out), SIZE]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_only_images_above_max_side_are_encoded_again(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    small = encode(1, size=(64, 48))
    files = {"big.jpg": encode(2, size=(100, 200), exif=turned), "small.jpg": small}
    source = write_folder(tmp_path / "s", files)
    assert main([str(source), str(tmp_path / "out"), "--max-side", "64", "--quality", "80"]) == 0
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        big, kept = (tar.extractfile(name).read() for name in ("big.jpg", "small.jpg"))
    assert kept == small
    with Image.open(io.BytesIO(big)) as image:
        assert image.size == (64, 32)  # displayed as 200 x 100
        assert 0x0112 not in image.getexif()


def test_a_shrunk_image_is_the_antialiased_one() -> None:
    ramp = np.linspace(0, 255, 256).round().astype(np.uint8)
    pixels = np.broadcast_to(ramp[None, :, None], (128, 256, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    sample = take_image(buffer.getvalue(), max_side=64, quality=95)
    assert isinstance(sample, Sample)
    with Image.open(io.BytesIO(sample.data)) as image:
        small = np.asarray(image, np.float64)
    means = pixels.astype(np.float64).reshape(32, 4, 64, 4, 3).mean((1, 3))
    assert (sample.height, sample.width, sample.extension) == (32, 64, "jpg")
    assert np.abs(small - means)[:, 2:-2].max() < 3


def test_an_image_between_our_limit_and_pillows_is_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.intake.MAX_PIXELS", 40 * 30 - 1)
    taken = take_image(encode(1), max_side=None, quality=95)
    assert taken == LeftOut("decompression bomb", "40 x 30 pixels; at most 1199 are allowed")


def test_the_stream_reads_what_was_written(photos: Path, tmp_path: Path) -> None:
    assert main([str(photos), str(tmp_path / "out"), SIZE]) == 0
    config = DataConfig.model_validate(
        {
            "sources": [{"shards": str(tmp_path / "out")}],
            "workers": 0,
            "max_bad_share": 0.0,
            "verify_checksums": True,
        }
    )
    stream = TrainStream(
        config, fixed_layout(resolution=(16, 16), batch_size=len(GOOD), micro_batch_size=1)
    )
    batches = stream.batches()
    keys = {next(batches).keys[0].split("/", 1)[1] for _ in GOOD}
    assert keys == set(unique_keys(sorted(GOOD)))


def test_a_changed_shard_is_refused_by_its_checksum(photos: Path, tmp_path: Path) -> None:
    assert main([str(photos), str(tmp_path / "out"), SIZE]) == 0
    shard = tmp_path / "out/000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="its SHA-256 differs from its manifest's"):
        load_index([str(shard)], ["s"], max_bad_share=0.0, verify_checksums=True)


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one message of a command that the user got wrong."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_another_source_or_other_options_are_refused_with_the_reason(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([str(photos), str(out), SIZE])
    before = snapshot(out)
    capsys.readouterr()
    message = _error(capsys, photos, out, "--target-size", "1MB")
    assert "was begun with target_size=20480, this run has 1000000" in message
    assert "begun with max_side=None, this run has 9" in _error(
        capsys, photos, out, SIZE, "--max-side", 9
    )
    write_folder(photos, {"new.jpg": encode(7)})
    message = _error(capsys, photos, out, SIZE)
    assert "from a source of 29 images, this one has 30 or other names and sizes" in message
    assert snapshot(out) == before


def test_a_folder_that_is_not_ours_stays_untouched(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_folder(tmp_path / "out", {"000000.tar": b"precious"})
    assert "contains '000000.tar' but no manifest.json" in _error(capsys, photos, out)
    assert snapshot(out) == {"000000.tar": hashlib.sha256(b"precious").hexdigest()}
    write_folder(out, {"manifest.json": b"[]"})
    assert "not a manifest of data.write_shards" in _error(capsys, photos, out)


def test_a_missing_or_changed_shard_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(photos), str(tmp_path / "out"), SIZE])
    capsys.readouterr()
    (tmp_path / "out/000001.tar").unlink()
    assert "000001.tar' is missing or was changed" in _error(capsys, photos, tmp_path / "out", SIZE)


def test_sources_that_cannot_work_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert f"(did you mean '{photos.name}'?)" in _error(capsys, tmp_path / "fotos", out)
    write_folder(tmp_path / "text", OTHERS)
    message = _error(capsys, tmp_path / "text", out)
    assert "contains no image (jpg, jpeg, png, webp); there are 1 (none), 1 .gif, 2 .txt" in message
    (tmp_path / "s.tar.gz").write_bytes(b"\x1f\x8b\x08")
    assert "is compressed (gzip)" in _error(capsys, tmp_path / "s.tar.gz", out)
    (tmp_path / "s.zip").write_bytes(b"PK\3\4nothing")
    assert "cannot be read as a zip" in _error(capsys, tmp_path / "s.zip", out)
    (tmp_path / "s.doc").write_bytes(b"no archive" * 100)
    assert "is not a folder, zip or readable tar" in _error(capsys, tmp_path / "s.doc", out)
    assert "lies inside the source" in _error(capsys, photos, photos / "shards")
    assert not out.exists()
    write_folder(tmp_path / "bad", {"1.jpg": b"no image"})
    message = _error(capsys, tmp_path / "bad", out)
    assert "none of 1 images can be used; the first is '1.jpg': unreadable" in message
    (tmp_path / "file").touch()
    assert _error(capsys, photos, tmp_path / "file/out").endswith("file/out: Not a directory\n")


def test_a_source_that_vanishes_stops_the_run_instead_of_shrinking_it(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = data.shard_writer._begin

    def begin_and_lose(*arguments):
        shutil.move(photos / "b", tmp_path / "elsewhere")
        return begin(*arguments)

    monkeypatch.setattr("data.shard_writer._begin", begin_and_lose)
    message = _error(capsys, photos, tmp_path / "out", SIZE)
    assert "'b/deep/001.jpg' of the source cannot be read any more: No such file" in message
    assert not manifest_of(tmp_path / "out")["complete"]


def test_a_full_disk_gives_one_message_and_leaves_no_part(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # a write fails in earnest
    try:
        message = _error(capsys, photos, tmp_path / "out", "--target-size=60000")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large; the same command continues" in message
    assert set(snapshot(tmp_path / "out")) == {"manifest.json"}
    assert main([str(photos), str(tmp_path / "out"), "--target-size=60000"]) == 0


def test_two_runs_into_one_folder_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.journal").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = _error(capsys, photos, tmp_path / "out")
    assert "another data.write_shards is writing into" in message


def test_an_interrupt_ends_with_a_message(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.shard_file.publish", interrupt)
    assert main([str(photos), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "write_shards: interrupted; the same command continues\n"
    assert set(snapshot(tmp_path / "out")) == {"manifest.json"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--target-size", "25Q"], "'25Q' is not a size; write 500000, 64MB or 1GiB"),
        (["--target-size", "0"], "'0' is not a size"),
        (["--max-side", "0"], "'0' is not a whole number from 1 to 65535"),
        (["--quality", "101"], "'101' is not a whole number from 1 to 100"),
    ],
)
def test_wrong_options_are_refused(
    option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["in", "out", *option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_quality_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--quality has no effect without --max-side" in _error(
        capsys, "in", "out", "--quality", 90
    )


@pytest.mark.process
def test_help_is_quick_and_names_every_option() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['x', '--help']\n"
        "try: runpy.run_module('data.write_shards', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("SOURCE", "OUT", "--target-size", "256MB", "--max-side", "--quality"):
        assert word in done.stdout
    assert done.stderr == "False\n"
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m data.write_shards")
