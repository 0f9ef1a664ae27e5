"""Names of any bytes, script and length: shown, stored and used as names of files."""

import io
import json
import logging
import sys
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import TypeAdapter

from data.bad import check_share, describe, log_bad
from data.batch import BadSample
from data.config import DataConfig
from data.errors import DataError
from data.files import read_json_lines, write_json_lines
from data.gather import open_images
from data.images import load_images
from data.index import load_index
from data.labelled.captions import CaptionData
from data.labelled.class_folders import ClassFolders
from data.layout import fixed_layout
from data.shard_file import unique_keys
from data.stream import TrainStream
from data.tar_stream import read_shard
from data.text import as_file_name, as_path, print_anything, printable, shown
from data.write_shards import main as write_shards
from distill.runtime.command import command

NAMES = {
    "plain": "cat",
    "a byte": "caf\udce9",
    "half a character": "\ud83d",
    "a line break": "a\nb\r\u2028c\x85d",
    "a tab": "a\tb",
    "commands of a terminal": "\x1b[2J\x1b]0;owned\x07\x9b31m",
    "markup": "[red]x[/] [/bold] [link=http://x]y[/link]",
    "formats": "%s %d {0} {x!r} $HOME",
    "a page": "<script>alert(1)</script>&amp;\"'",
    "a formula": r"$\frac$ a$b$c _x^y",
    "from the right": "\u202egpj.exe \u2066x\u2069 \u05d0\u05d1",
    "long": "n" * 4000,
    "emoji": "\U0001f469\u200d\U0001f52c \U0001f3f3\ufe0f",
    "scripts": "猫 кот قط 고양이",
    "a mark": "\ufeffcat",
    "a backslash": "a\\",
    "null": "a\0b",
    "nothing": "",
    "dots": "..",
    "a slash": "a/b",
}


def harmless(text: str) -> bool:
    """Whether text has no controls, no other direction, and only whole characters."""
    text.encode()
    return all(
        unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")
        and c not in "\u202e\u2066\u2069\ufeff"
        for c in text
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_shown_name_is_one_harmless_line(name: str) -> None:
    text = shown(NAMES[name])
    assert harmless(text)
    assert len(text) <= 200
    assert harmless(shown(NAMES[name], 20))
    assert len(shown(NAMES[name], 20)) <= 20
    assert harmless(printable(NAMES[name]).replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize("name", ["plain", "emoji", "scripts", "markup", "a page"])
def test_harmless_names_are_shown_as_they_are(name: str) -> None:
    assert shown(NAMES[name]) == printable(NAMES[name]) == NAMES[name]


def test_what_is_escaped_can_be_told_from_its_escape() -> None:
    assert shown("caf\udce9") == "caf\\xe9"
    assert shown("a\nb\x1b\u202e\ud83d") == "a\\x0ab\\x1b\\u202e\\ud83d"
    assert printable("two\nlines\tand\r\x1b") == "two\nlines\tand\\x0d\\x1b"
    assert shown("a" * 150 + "b" * 150) == "a" * 99 + "..." + "b" * 98


@pytest.mark.parametrize("name", NAMES)
def test_every_name_gives_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    text = as_file_name(NAMES[name])
    (tmp_path / f"{text}.safetensors.12345.tmp").touch()
    assert len(list(tmp_path.iterdir())) == 1
    folder = tmp_path / "x" / as_path(NAMES[name])
    folder.mkdir(parents=True)
    assert folder.resolve().is_relative_to(tmp_path / "x")
    if name in ("plain", "a byte", "emoji", "scripts", "formats"):
        assert text == NAMES[name]
    assert len({as_file_name(each) for each in NAMES.values()}) == len(NAMES)


ENCODINGS = pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])


class Screen:
    """stdout and stderr in an encoding, strict as Python opens stdout."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self._streams = []
        for name in ("stdout", "stderr"):
            self._streams.append(io.TextIOWrapper(io.BytesIO(), encoding, errors="strict"))
            monkeypatch.setattr(sys, name, self._streams[-1])

    def read(self) -> str:
        """What was written so far, to stdout first."""
        text = ""
        for stream in self._streams:
            stream.flush()
            stream.seek(0)
            text += stream.read()
        return text


@ENCODINGS
def test_anything_can_be_printed_in_any_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    screen = Screen(monkeypatch, encoding)
    print_anything()
    for name in NAMES.values():
        print(name)
        print(name, file=sys.stderr)
    assert screen.read().count("cat") == 4


@ENCODINGS
@pytest.mark.parametrize("name", NAMES)
def test_the_message_of_a_command_is_printed_whatever_it_names(
    monkeypatch: pytest.MonkeyPatch, encoding: str, name: str
) -> None:
    screen = Screen(monkeypatch, encoding)

    @command
    def main() -> None:
        raise DataError(f"the image '{NAMES[name]}' is\nunreadable")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    text = screen.read()
    assert text.startswith("error: the image '")
    assert text.endswith("' is\nunreadable\n")
    assert harmless(text.replace("\n", "").replace("\t", ""))


FILES = [
    name.replace("/", "_").replace("\0", "")[:200]
    for key, name in NAMES.items()
    if key not in ("half a character", "nothing", "dots", "null")
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images, text files and damaged images of every name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(FILES):
        Image.new("RGB", (8, 8), (12 * number, 0, 0)).save(folder / f"{name}.jpg")
        (folder / f"{name}.jpeg").write_bytes(b"damaged")
        (folder / f"{name}.gif").touch()
        (folder / f"x.{name[:100]}").touch()
    return folder


@ENCODINGS
def test_shards_of_files_of_any_names(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Written, reported, indexed, streamed and evaluated, in any encoding of the screen."""
    screen = Screen(monkeypatch, encoding)
    out = tmp_path / "out"
    assert write_shards([str(photos), str(out)]) == 0
    assert f"{len(FILES)} images in 1 shards" in screen.read()
    assert harmless(screen.read().replace("\n", ""))
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["left_out_counts"] == {"unreadable": len(FILES)}
    named = {entry["name"] for entry in manifest["left_out"]}
    assert named == {f"{name}.jpeg" for name in FILES}
    shard = str(out / "000000.tar")
    index = load_index([shard], ["0.tar"], max_bad_share=0.0, directory=tmp_path / "cache")
    assert len({index.key(number) for number in range(len(index))}) == len(FILES)
    again = load_index([shard], ["0.tar"], max_bad_share=0.0, directory=tmp_path / "cache")
    assert again.digest == index.digest
    assert len(list(read_shard(f"file://{shard}", "0.tar"))) == len(FILES)
    assert len(load_images(out, (8, 8))[1]) == len(FILES)


def test_members_of_any_names_are_trained_on(tmp_path: Path) -> None:
    """In a shard that others wrote, whose own name is not UTF-8 either."""
    path = tmp_path / "caf\udce9\n.tar"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    names = [name for name in NAMES.values() if name not in ("", "..", "\ud83d")]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(f"{name.replace('.', '_')}.jpg".replace("\0", "0"))
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    layout = fixed_layout(resolution=(8, 8), batch_size=8, micro_batch_size=8)
    for shard in (str(path), f"file://{tmp_path}/caf%E9%0A.tar"):
        config = DataConfig.model_validate(
            {"sources": [{"shards": shard}], "workers": 0, "lanes": 1, "max_bad_share": 0.0}
        )
        stream = TrainStream(config, layout, index_dir=tmp_path / "cache")
        assert len(next(stream.batches()).keys) == 8
        json.dumps(stream.state())


def test_bad_samples_of_any_names_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    bad = [BadSample(name, name, f"not '{name}'") for name in NAMES.values()]
    for sample in bad:
        assert harmless(describe(sample))
    log_bad(bad, len(bad))
    for record in caplog.records:
        assert harmless(logging.Formatter("%(message)s").format(record).replace("\n", ""))
    with pytest.raises(DataError, match="20 of 20 samples are bad") as caught:
        check_share(len(bad), len(bad), 0.0, bad)
    assert harmless(str(caught.value).replace("\n", ""))


def test_what_is_left_out_is_reported_whatever_its_name(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_images(photos) as files:
        files.readable(photos)
    assert len(caplog.records) == 1
    assert harmless(caplog.records[0].getMessage())
    assert len(caplog.records[0].getMessage()) < 10_000


def test_classes_of_any_names_keep_their_numbers(tmp_path: Path) -> None:
    for number, name in enumerate(FILES):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{name[:100]}.jpg")
    with ClassFolders(root=tmp_path).open("train") as images:
        assert sorted(images.classes) == sorted(FILES)
        assert images.labels == list(range(len(FILES)))


def test_a_set_in_a_folder_of_any_name_has_an_identity() -> None:
    """By which its features are kept."""
    layout = ClassFolders(root=Path("caf\udce9"))
    assert json.loads(layout.model_dump_json())["root"] == "caf\\udce9"
    assert layout.model_dump(mode="json")["root"] == "caf\\udce9"
    plain = ClassFolders(root=Path("größe"))
    assert json.loads(plain.model_dump_json())["root"] == "größe"


def test_lines_of_json_hold_any_names(tmp_path: Path) -> None:
    rows = [{"model": name, name: 1.0} for name in NAMES.values()]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows


def test_keys_are_made_of_any_names() -> None:
    keys = unique_keys([f"{name}.jpg" for name in NAMES.values() if name != "\ud83d"])
    assert len(set(keys)) == len(NAMES) - 1
    for key in keys:
        key.encode()
        assert not set(key) & set("\n\x1b")


def test_captions_hold_whole_characters(tmp_path: Path) -> None:
    """A tokenizer takes no half of one."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "val2017/a.jpg")
    captions = [{"image_id": 1, "caption": text} for text in ("a \ud83d", "\U0001f469\u200d")]
    facts = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": captions}
    (tmp_path / "annotations/captions_val2017.json").write_text(json.dumps(facts))
    adapter: TypeAdapter[Any] = TypeAdapter(CaptionData)
    read = adapter.validate_python({"kind": "coco_captions", "root": tmp_path}).load()
    assert read.captions == [["a \ufffd\ufffd\ufffd", "\U0001f469\u200d"]]
