"""Recognises a file by its first bytes, to say what it is where something else was expected."""

LFS = "a Git LFS pointer in place of the file; fetch it with `git lfs pull`"

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_KINDS = {
    b"version https://git-lfs": LFS,
    b"PK\x03\x04": "a zip file; unpack it",
    b"7z\xbc\xaf": "a 7z file; unpack it",
    b"Rar!": "a RAR file; unpack it",
    b"GIF8": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"BM": "a BMP image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML file",
}


def describe_content(head: bytes) -> str:
    """What a file that begins with these bytes is, and what to do; empty if that is unknown."""
    for start, kind in COMPRESSED.items():
        if head.startswith(start):
            return f"compressed with {kind}; unpack it"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "an AVIF image"
    if head[4:11] == b"ftyphei":
        return "a HEIC image"
    return next((kind for start, kind in _KINDS.items() if head.startswith(start)), "")
