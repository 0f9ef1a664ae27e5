"""Every mode and type of files with values of pixels: read right, or refused by name."""

import io
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data.errors import DataError
from data.labelled.depth_files import read_depth, read_normals
from data.labelled.files import read_rgb, read_size
from data.labelled.multitask import PascalContextLayout
from data.labelled.pascal_context import read_voc_classes
from data.labelled.pixel_values import read_colours, read_indices, read_levels, read_steps
from data.labelled.posed import FrameFiles, ScanNet, SevenScenes
from data.labelled.segmentation_files import from_colours, renumbered

VALUES = np.array([[0, 1, 2], [3, 1, 0]], np.uint8)
TWO = np.array([[0, 1, 1], [0, 1, 0]], np.uint8)


def _png(depth: int, colour: int, rows: list[bytes], *chunks: bytes) -> bytes:
    """A PNG of 3 x 2 pixels with any number of bits, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 3, 2, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _id(value: Any) -> str | None:
    return f"{len(value)} bytes" if isinstance(value, bytes) else None


def _saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _palette(values: np.ndarray, **options: Any) -> bytes:
    image = Image.fromarray(values, mode="P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0, 9, 9, 9] + [0] * 756)
    return _saved(image, **options)


def _stacked(values: np.ndarray, mode: str, *more: int) -> Image.Image:
    bands = [values] * (len(Image.new(mode, (1, 1)).getbands()) - len(more))
    return Image.merge(
        mode,
        [Image.fromarray(b) for b in bands] + [Image.new("L", (3, 2), value) for value in more],
    )


def _pages(format: str) -> bytes:
    pages = [Image.fromarray(VALUES), Image.fromarray(VALUES + 1)]
    return _saved(pages[0], format, save_all=True, append_images=pages[1:])


def _in_mode(mode: str, format: str = "TIFF") -> bytes:
    return _saved(Image.new("RGB", (3, 2), (1, 2, 3)).convert(mode), format)


def _tiff16(order: str) -> bytes:
    """A TIFF of 16 bits in either order of bytes."""
    mode = {"<": "I;16", ">": "I;16B"}[order]
    image = Image.frombytes(mode, (3, 2), VALUES.astype(f"{order}u2").tobytes())
    return _saved(image, "TIFF")


def _lab() -> bytes:
    return _saved(Image.new("LAB", (3, 2)), "TIFF")


BITS = {1: [b"\x60", b"\x40"], 2: [b"\x18", b"\xd0"], 4: [b"\x01\x20", b"\x31\x00"]}

# Of each file the class numbers, or a part of the refusal.
LABELS: dict[str, tuple[bytes, np.ndarray | str]] = {
    "L": (_saved(Image.fromarray(VALUES)), VALUES),
    "1": (_saved(Image.fromarray(TWO * 255).convert("1")), TWO),
    "grey of 1 bit": (_png(1, 0, BITS[1]), TWO),
    "grey of 2 bits": (_png(2, 0, BITS[2]), VALUES),
    "grey of 4 bits": (_png(4, 0, BITS[4]), VALUES),
    "P": (_palette(VALUES), VALUES),
    "P of 2 bits": (_palette(VALUES, bits=2), VALUES),
    "P with transparency": (_palette(VALUES, transparency=0), VALUES),
    "P with transparencies": (_palette(VALUES, transparency=bytes([0, 128, 255, 9])), VALUES),
    "L with transparency": (_saved(Image.fromarray(VALUES), transparency=1), VALUES),
    "LA": (_saved(_stacked(VALUES, "LA", 255)), VALUES),
    "LA, transparent": (_saved(_stacked(VALUES, "LA", 7)), "parts are transparent (mode LA)"),
    "RGB, equal": (_saved(_stacked(VALUES, "RGB")), VALUES),
    "RGB": (_in_mode("RGB", "PNG"), "expected one channel of class numbers, got 3 (mode RGB)"),
    "RGBA, equal": (_saved(_stacked(VALUES, "RGBA", 255)), VALUES),
    "RGBA, transparent": (_saved(_stacked(VALUES, "RGBA", 0)), "transparent (mode RGBA)"),
    "RGB of 16 bits": (_png(16, 2, [bytes(18)] * 2), "got 3 (mode RGB of 16 bits)"),
    "LA of 16 bits": (_png(16, 4, [bytes(12)] * 2), "of 16 bits)"),
    "I;16": (_saved(Image.fromarray(VALUES.astype(np.uint16))), VALUES),
    "I;16, TIFF": (_tiff16("<"), VALUES),
    "I;16B, TIFF": (_tiff16(">"), VALUES),
    "I": (_saved(Image.fromarray(VALUES.astype(np.int32)), "TIFF"), VALUES),
    "F, whole": (_saved(Image.fromarray(VALUES.astype(np.float32)), "TIFF"), VALUES),
    "F": (_saved(Image.fromarray(VALUES / np.float32(2)), "TIFF"), "whole numbers, got fractions"),
    "F, not finite": (_saved(Image.new("F", (3, 2), float("nan")), "TIFF"), "got fractions"),
    "CMYK": (_in_mode("CMYK"), "expected one channel of class numbers, got 4 (mode CMYK)"),
    "YCbCr": (_in_mode("YCbCr"), "got 3 (mode YCbCr)"),
    "LAB": (_lab(), "got 3 (mode LAB)"),
    "TIFF, compressed": (_saved(Image.fromarray(VALUES), "TIFF", compression="tiff_lzw"), VALUES),
    "TIFF, JPEG": (_saved(Image.fromarray(VALUES), "TIFF", compression="jpeg"), "JPEG compression"),
    "TIFF, 0 is white": (
        _saved(Image.fromarray(VALUES), "TIFF", tiffinfo={262: 0}),
        "a TIFF in which 0 is white",
    ),
    "two pages": (_pages("TIFF"), "2 pages or frames, expected one"),
    "animated": (_pages("PNG"), "2 pages or frames, expected one"),
    "JPEG": (
        _saved(Image.fromarray(VALUES), "JPEG"),
        "PNG or TIFF but a JPEG image, which changes",
    ),
    "GIF": (_saved(Image.fromarray(VALUES), "GIF"), "not a PNG or TIFF but a GIF image"),
    "BMP": (_saved(Image.fromarray(VALUES), "BMP"), "not a PNG or TIFF but a BMP image"),
    "WebP": (_saved(Image.fromarray(VALUES), "WEBP"), "not a PNG or TIFF"),
    "the head of a PNG": (b"\x89PNG", "a PNG image that is damaged"),
    "cut off": (_saved(Image.fromarray(VALUES))[:50], "the label map '"),
    "a wrong chunk": (_saved(Image.fromarray(VALUES)).replace(b"IDAT", b"ID\0T"), "label map '"),
    "empty": (b"", "not a PNG or TIFF"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
}


@pytest.mark.parametrize("name", LABELS)
def test_label_maps_of_every_mode(tmp_path: Path, name: str) -> None:
    content, due = LABELS[name]
    path = tmp_path / "labels.png"
    path.write_bytes(content)
    if isinstance(due, str):
        with pytest.raises(DataError) as caught:
            read_indices(path)
        assert due in str(caught.value)
        assert str(path) in str(caught.value)
    else:
        values = read_indices(path)
        assert values.tolist() == due.tolist()
        assert values.dtype.kind in "iu"
        assert renumbered(values, {n: n for n in range(4)}, path).tolist() == due.tolist()


def test_a_label_map_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "frame-1.png").touch()
    with pytest.raises(DataError, match=r"frame-2.png': there is no such file \(did you mean"):
        read_indices(tmp_path / "frame-2.png")


COLOURS = np.array([[[10, 20, 30], [200, 100, 50], [0, 0, 0]]] * 2, np.uint8)
INDICES = np.array([[0, 1, 2]] * 2, np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        _saved(Image.fromarray(COLOURS)),
        _saved(Image.fromarray(COLOURS), transparency=(0, 0, 0)),
        _saved(Image.fromarray(np.dstack([COLOURS, [[0, 128, 255]] * 2]).astype(np.uint8))),
        _saved(Image.fromarray(np.dstack([COLOURS, [[0, 0, 0]] * 2]).astype(np.uint8)), "TIFF"),
        _palette(INDICES),
        _palette(INDICES, transparency=2),
        _palette(INDICES, transparency=bytes([0, 128, 255])),
    ],
    ids=_id,
)
def test_colours_of_label_maps_do_not_depend_on_transparency_or_palettes(
    tmp_path: Path, content: bytes
) -> None:
    """White behind a transparent class would make it another colour, which is ignored."""
    path = tmp_path / "labels.png"
    path.write_bytes(content)
    assert read_colours(path).tolist() == COLOURS.tolist()
    colours = [(10, 20, 30), (200, 100, 50), (0, 0, 0)]
    assert from_colours(path, colours).tolist() == INDICES.tolist()


@pytest.mark.parametrize(
    "content, message",
    [
        (_saved(Image.fromarray(COLOURS), "JPEG"), "a JPEG image, which changes values"),
        (_in_mode("CMYK"), r"expected RGB colours of 8 bits, got 4 \(mode CMYK\)"),
        (_in_mode("YCbCr"), r"mode YCbCr"),
        (_lab(), r"mode LAB"),
        (_png(16, 2, [bytes(18)] * 2), r"mode RGB of 16 bits"),
        (_saved(Image.fromarray(VALUES.astype(np.uint16))), r"mode I;16"),
        (_saved(Image.new("F", (3, 2)), "TIFF"), r"mode F"),
    ],
    ids=_id,
)
def test_other_colours_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "labels.png").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_colours(tmp_path / "labels.png")


WHITE = TWO * 255


@pytest.mark.parametrize(
    "content",
    [
        _saved(Image.fromarray(WHITE)),
        _saved(Image.fromarray(WHITE).convert("1")),
        _png(1, 0, BITS[1]),
        _saved(_stacked(WHITE, "RGB")),
        _saved(_stacked(WHITE, "LA", 255)),
        _saved(Image.fromarray(TWO.astype(np.uint16) * 65535)),
        _saved(Image.fromarray(WHITE).convert("P")),
    ],
    ids=_id,
)
def test_masks_are_levels_of_grey_in_any_mode(tmp_path: Path, content: bytes) -> None:
    """An index or a bit is no level: a mask of one bit would have no salient pixel."""
    (tmp_path / "mask.png").write_bytes(content)
    assert read_levels(tmp_path / "mask.png").tolist() == WHITE.tolist()


def test_a_mask_whose_palette_is_upside_down_is_read_by_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(1 - TWO, mode="P")
    image.putpalette([255] * 3 + [0] * 765)
    image.save(tmp_path / "mask.png")
    assert read_levels(tmp_path / "mask.png").tolist() == WHITE.tolist()


def test_a_mask_of_colours_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match="expected grey levels, got colours"):
        read_levels(tmp_path / "mask.png", "saliency")


DEPTH = np.array([[0, 500, 1000], [2000, 3000, 40]])


def _npy(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, depth=DEPTH)
    return buffer.getvalue()


def _huge() -> bytes:
    """The header of an array that no machine holds."""
    whole = _npy(np.zeros((1, 1)))
    return whole.replace(b"(1, 1)", b"(9999999, 99999999)").replace(b" " * 13, b"", 1)


DEPTHS: dict[str, tuple[str, bytes, np.ndarray | str]] = {
    "I;16": ("d.png", _saved(Image.fromarray(DEPTH.astype(np.uint16))), DEPTH),
    "I;16, an upper-case name": ("d.PNG", _saved(Image.fromarray(DEPTH.astype(np.uint16))), DEPTH),
    "L": ("d.png", _saved(Image.fromarray((DEPTH // 20).astype(np.uint8))), DEPTH // 20),
    "grey of 4 bits": ("d.png", _png(4, 0, BITS[4]), VALUES),
    "grey of 2 bits": ("d.png", _png(2, 0, BITS[2]), VALUES),
    "RGB, equal": ("d.png", _saved(_stacked(VALUES, "RGB")), VALUES),
    "RGB": ("d.png", _in_mode("RGB", "PNG"), "expected one channel of depth, got 3 (mode RGB)"),
    "1": ("d.png", _png(1, 0, BITS[1]), "expected grey levels of depth, got one bit"),
    "P": ("d.png", _palette(VALUES), "got a palette of colours (mode P)"),
    "JPEG": ("d.png", _saved(Image.fromarray(VALUES), "JPEG"), "a JPEG image, which changes"),
    "I": ("d.tif", _saved(Image.fromarray(DEPTH.astype(np.int32)), "TIFF"), DEPTH),
    "I;16B": (
        "d.tif",
        _saved(Image.frombytes("I;16B", (3, 2), DEPTH.astype(">u2").tobytes()), "TIFF"),
        DEPTH,
    ),
    "F": ("d.tiff", _saved(Image.fromarray(DEPTH.astype(np.float32)), "TIFF"), DEPTH),
    "two pages": ("d.tif", _pages("TIFF"), "2 pages or frames"),
    **{
        f".npy, {kind}": ("d.npy", _npy(DEPTH.astype(kind)), DEPTH)
        for kind in ("u2", ">u2", "i4", ">i8", "u8", "f4", ">f4", "f8", "g")
    },
    ".npy, f2": ("d.npy", _npy(DEPTH.astype("f2")), DEPTH),
    ".npy, i1": ("d.npy", _npy((DEPTH // 50).astype("i1")), DEPTH // 50),
    ".npy, in columns": ("d.npy", _npy(np.asfortranarray(DEPTH)), DEPTH),
    ".npy, channel last": ("d.npy", _npy(DEPTH[..., None]), DEPTH),
    ".npy, channel first": ("d.npy", _npy(DEPTH[None]), DEPTH),
    ".npy, two channels": ("d.npy", _npy(np.stack([DEPTH] * 2)), "shape (H, W), got (2, 2, 3)"),
    ".npy, one value": ("d.npy", _npy(np.float32(3)), "expected shape (H, W), got ()"),
    ".npy, a row": ("d.npy", _npy(DEPTH[0]), "expected shape (H, W), got (3,)"),
    ".npy, no values": ("d.npy", _npy(np.zeros((0, 4))), "no values, its shape is (0, 4)"),
    ".npy, bool": ("d.npy", _npy(DEPTH > 0), "expected real numbers, got bool"),
    ".npy, complex": ("d.npy", _npy(DEPTH.astype(complex)), "expected real numbers, got complex"),
    ".npy, text": ("d.npy", _npy(DEPTH.astype(str)), "expected real numbers, got <U"),
    ".npy, dates": ("d.npy", _npy(DEPTH.astype("M8[s]")), "expected real numbers, got datetime"),
    ".npy, fields": (
        "d.npy",
        _npy(np.zeros((2, 3), [("z", "f4"), ("c", "f4")])),
        "expected real numbers, got several fields",
    ),
    ".npy, objects": ("d.npy", _npy(DEPTH.astype(object), allow_pickle=True), "Object arrays"),
    ".npy, pickled": ("d.npy", pickle.dumps(DEPTH), "pickled Python objects, which are not read"),
    ".npy, an .npz": ("d.npy", _npz(), "an `.npz` of several arrays"),
    ".npy, empty": ("d.npy", b"", "an empty file"),
    ".npy, cut off": ("d.npy", _npy(DEPTH)[:-8], "the depth '"),
    ".npy, a cut header": ("d.npy", _npy(DEPTH)[:40], "the depth '"),
    ".npy, too large": ("d.npy", _huge(), "the depth '"),
    ".npy, a PNG": ("d.npy", _in_mode("L", "PNG"), "not a NumPy array but a PNG image"),
    ".png, an array": ("d.png", _npy(DEPTH), DEPTH),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_of_every_mode_and_type(tmp_path: Path, name: str) -> None:
    file, content, due = DEPTHS[name]
    path = tmp_path / file
    path.write_bytes(content)
    if isinstance(due, str):
        with pytest.raises(DataError) as caught:
            read_depth(path, 0.001)
        assert due in str(caught.value)
        assert str(path) in str(caught.value)
    else:
        metres = read_depth(path, 0.001)
        assert metres.dtype == np.float32
        np.testing.assert_array_equal(metres, (due * 0.001).astype(np.float32))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("file", ["d.npy", "d.tif"])
def test_depth_that_is_none_is_unknown(tmp_path: Path, file: str) -> None:
    values = np.array([[np.nan, np.inf, -np.inf], [-1, 3e38, 2]], np.float32)
    content = _npy(values) if file == "d.npy" else _saved(Image.fromarray(values), "TIFF")
    (tmp_path / file).write_bytes(content)
    assert read_depth(tmp_path / file, 10.0).tolist() == [[0, 0, 0], [0, 0, 20]]


def test_all_depth_unknown_is_read(tmp_path: Path) -> None:
    Image.new("I;16", (3, 2)).save(tmp_path / "d.png")
    assert not read_depth(tmp_path / "d.png", 0.001).any()


UP = np.array([[[127, 127, 255], [255, 127, 127], [0, 0, 0]]] * 2, np.uint8)


@pytest.mark.parametrize(
    "file, content",
    [
        ("n.png", _saved(Image.fromarray(UP))),
        ("n.PNG", _saved(Image.fromarray(UP))),
        ("n.tif", _saved(Image.fromarray(UP), "TIFF")),
        ("n.png", _saved(Image.fromarray(np.dstack([UP, UP[..., 0] // 2])))),
        ("n.npy", _npy(np.array([[[0, 0, 1], [1, 0, 0], [0, 0, 0]]] * 2, np.float64))),
        ("n.npy", _npy(np.array([[[0, 0, 1], [1, 0, 0], [0, 0, 0]]] * 2, ">f4"))),
        ("n.npy", _npy(np.array([[[0, 0, 1], [1, 0, 0], [0, 0, 0]]] * 2, np.int8))),
        ("n.npy", _npy(np.array([[[0, 0, 1], [1, 0, 0], [np.nan] * 3]] * 2, np.float32))),
    ],
    ids=_id,
)
def test_normals_of_every_type(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    due = np.array([[[0, 0, 1], [1, 0, 0], [0, 0, 0]]] * 2)
    np.testing.assert_allclose(read_normals(tmp_path / file), due, atol=0.01)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("n.npy", _npy(UP), "expected vectors of length 1, got uint8 up to 255"),
        ("n.npy", _npy(UP > 1), "expected real numbers, got bool"),
        ("n.npy", _npy(np.zeros((3, 2, 2))), r"expected shape \(H, W, 3\), got \(3, 2, 2\)"),
        ("n.png", _saved(Image.fromarray(VALUES)), "expected RGB colours of 8 bits, got 1"),
        ("n.png", _palette(VALUES), r"mode P\)"),
        ("n.png", _saved(Image.fromarray(UP), "JPEG"), "a JPEG image, which changes values"),
        ("n.tif", _in_mode("YCbCr"), "mode YCbCr"),
    ],
    ids=_id,
)
def test_other_normals_are_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_normals(tmp_path / file)


@pytest.mark.parametrize("read", [read_rgb, read_size, read_indices, read_colours, read_steps])
@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(99), b"\xff\xd8\xff\xe0", b"MM\0*\0\0\0\x08\xff"]
)
def test_what_is_no_image_is_one_message_with_its_name(
    tmp_path: Path, read: Callable[[Path], Any], content: bytes
) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"'.*a\.png'"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_those_stored_whatever_the_orientation(
    tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_size(tmp_path / "a.jpg") == read_rgb(tmp_path / "a.jpg").shape[:2] == (4, 8)


@pytest.mark.parametrize(
    "labels",
    [
        np.full((2, 3), -1, np.int16),
        np.full((2, 3), 460, np.uint16),
        np.full((2, 3), 0.5),
        np.full((2, 3), np.nan),
        np.full((2, 3), 1 + 1j),
        np.zeros((2, 3, 2)),
    ],
    ids=str,
)
def test_maps_of_matlab_hold_numbers_of_classes(tmp_path: Path, labels: np.ndarray) -> None:
    """Minus one would be the last class."""
    savemat(tmp_path / "a.mat", {"LabelMap": labels})
    with pytest.raises(DataError, match="expected a LabelMap of classes 0 to 459"):
        read_voc_classes(tmp_path / "a.mat")


@pytest.mark.parametrize(
    "values, message",
    [
        (np.full((2, 3), 21, np.uint8), "expected 0 to 20 or 255, got 21"),
        (np.full((2, 3), 256, np.uint16), "expected 0 to 20 or 255, got 256"),
    ],
)
def test_classes_of_several_tasks_do_not_wrap_round(
    tmp_path: Path, values: np.ndarray, message: str
) -> None:
    """256 in 8 bits is the background."""
    (tmp_path / "semseg/VOC12").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "semseg/VOC12/a.png")
    layout = PascalContextLayout(kind="pascal_context", root=tmp_path)
    with pytest.raises(DataError, match=message):
        layout._semseg("a")


@pytest.mark.parametrize(
    "content, message",
    [
        (_saved(Image.new("F", (3, 2), 1.5), "TIFF"), "whole numbers of 16 bits, got float32"),
        (_palette(VALUES), "a palette of colours"),
        (_png(1, 0, BITS[1]), "got one bit"),
    ],
)
def test_depth_of_posed_frames_is_in_whole_millimetres(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "frame-0.depth.png"
    path.write_bytes(content)
    picture = tmp_path / "frame-0.color.png"
    Image.new("RGB", (3, 2)).save(picture)
    layout = SevenScenes(kind="seven_scenes", root=tmp_path)
    with pytest.raises(DataError, match=message):
        layout.load(FrameFiles(picture, path, np.eye(4), 500.0))


@pytest.mark.parametrize(
    "names, matrix, message",
    [
        (np.zeros((1, 3), int), np.eye(3), r"`name`: expected whole numbers \(N, 4\)"),
        (np.zeros((1, 4)), np.eye(3), r"got float64 \(1, 4\)"),
        (np.zeros((1, 4), int), np.eye(2), r"expected 3 x 3 finite numbers, got float64 \(2, 2\)"),
        (np.zeros((1, 4), int), np.full((3, 3), np.nan), "expected 3 x 3 finite numbers"),
        (np.zeros((1, 4), int), np.eye(3) > 0, "got bool"),
    ],
)
def test_lists_of_posed_frames_are_checked(
    tmp_path: Path, names: np.ndarray, matrix: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "test.npz", name=names)
    np.savez(tmp_path / "intrinsics.npz", scene0000_00=matrix)
    with pytest.raises(DataError, match=message):
        ScanNet(kind="scannet", root=tmp_path).pairs()
