"""Names as text that is safe to show: any bytes, any script, any length, on any terminal.

A file name may hold bytes that are not UTF-8 (lone surrogates in Python), line breaks, commands of
a terminal, or marks that turn the direction of the text after it.
"""

import hashlib
import io
import re
import sys
from pathlib import PurePath

_LONGEST = 200  # characters of a name in a message

# Controls (C0, C1), marks that change the direction or the line, the byte order mark, surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff]"
)
_FILE_NAME = re.compile("(?!\\.{1,2}$)[^/\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]+")
_LONGEST_FILE_NAME = 120  # bytes; file systems allow 255, and files beside it have longer names


def shown(name: object, longest: int = _LONGEST) -> str:
    """A name as one line of at most `longest` characters; what is unsafe is written as `\\x1b`.

    Bytes that are not UTF-8 are written as `\\xe9`. A long name keeps its beginning and its end.
    """
    text = str(name)
    if len(text) > longest:
        tail = (longest - 3) // 2
        text = f"{text[: longest - 3 - tail]}...{text[-tail:]}"
    text = _UNSAFE.sub(_escape, text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def printable(message: object) -> str:
    """A message of several lines, in which everything unsafe but breaks and tabs is escaped."""
    return _UNSAFE.sub(
        lambda found: found[0] if found[0] in "\n\t" else _escape(found), str(message)
    )


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def as_file_name(name: str) -> str:
    """The name itself where it can be a file's; else a similar one that can, different for each."""
    if _FILE_NAME.fullmatch(name) and len(_bytes(name)) <= _LONGEST_FILE_NAME:
        return name
    digest = hashlib.sha256(_bytes(name)).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:80]}-{digest}"


def as_path(name: str) -> PurePath:
    """A relative path for a name, in which slashes separate folders; see `as_file_name`."""
    return PurePath(*map(as_file_name, name.split("/")))


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def print_anything() -> None:
    """From now on stdout and stderr write characters that their encoding lacks as escapes.

    By default such a character ends the program, after its work and before it is reported.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
