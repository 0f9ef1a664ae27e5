"""Which shards a recipe names, and the names by which keys know them."""

from pathlib import Path

import pytest

from data.errors import DataError
from data.shards import is_url, list_shards, unique_names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("train-002.tar", "train-000.tar", "train-001.tar", "val-000.tar", "manifest.json"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.tar").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_stands_for_its_tar_files_sorted(folder: Path) -> None:
    names = ["train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar"]
    assert list_shards([str(folder)]) == [str(folder / name) for name in names]


def test_a_glob_stands_for_its_matches_sorted_and_goes_deep_on_request(folder: Path) -> None:
    assert list_shards(["train-*.tar"]) == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert "sub/deep.tar" in list_shards(["**/*.tar"])


def test_braces_stand_for_a_range_in_its_order(folder: Path) -> None:
    assert list_shards(["train-{000..002}.tar"]) == [f"train-00{i}.tar" for i in range(3)]
    assert list_shards(["{val,train}-000.tar"]) == ["val-000.tar", "train-000.tar"]


def test_patterns_keep_the_order_in_which_they_are_named(folder: Path) -> None:
    assert list_shards(["val-000.tar", "train-00[01].tar"]) == [
        "val-000.tar",
        "train-000.tar",
        "train-001.tar",
    ]


def test_a_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert list_shards(["~/val-000.tar"]) == [str(folder / "val-000.tar")]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(folder: Path) -> None:
    (folder / "a[1].tar").touch()
    assert list_shards(["a[1].tar"]) == ["a[1].tar"]


def test_a_missing_shard_is_refused_with_the_closest_name(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"nothing matches 'trian-000.tar' \(did you mean 'train-000.tar'\?\)"
    ):
        list_shards(["trian-000.tar"])
    with pytest.raises(DataError, match=r"nothing matches 'train-003.tar'"):
        list_shards(["train-{000..003}.tar"])
    with pytest.raises(DataError, match=r"nothing matches '/no/such/folder/\*.tar'$"):
        list_shards(["/no/such/folder/*.tar"])


def test_a_folder_without_shards_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder 'empty' holds no \*.tar file"):
        list_shards(["empty"])


def test_unbalanced_braces_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"'train-\{000..002.tar': Unbalanced braces"):
        list_shards(["train-{000..002.tar"])


@pytest.mark.parametrize("again", ["train-000.tar", "./train-000.tar", "sub/../train-000.tar", "/"])
def test_a_shard_named_twice_is_refused_however_it_is_written(folder: Path, again: str) -> None:
    second = str(folder / "train-000.tar") if again == "/" else again
    with pytest.raises(DataError, match="train-000.tar' is named twice"):
        list_shards(["train-00*.tar", second])


@pytest.mark.parametrize(
    "pattern", ["pipe:touch marker", "{pipe:touch marker,val-000.tar}", "PIPE://x"]
)
def test_a_shell_command_is_refused_unless_allowed(folder: Path, pattern: str) -> None:
    with pytest.raises(
        DataError, match="is a shell command; set data.allow_pipe=true if you trust"
    ):
        list_shards([pattern])
    assert is_url(list_shards([pattern], allow_pipe=True)[0])
    assert not (folder / "marker").exists()


def test_urls_pass_unchecked_and_their_braces_expand(folder: Path) -> None:
    assert list_shards(["https://host/a-{0..1}.tar", "s3://bucket/b*.tar"]) == [
        "https://host/a-0.tar",
        "https://host/a-1.tar",
        "s3://bucket/b*.tar",
    ]


@pytest.mark.parametrize(
    ("shard", "url"),
    [
        ("https://host/a.tar", True),
        ("s3://bucket/a.tar", True),
        ("gs://bucket/a.tar", True),
        ("file:/a.tar", True),
        ("pipe:cat a.tar", True),
        ("/data/a.tar", False),
        ("data/a:b.tar", False),
        ("a.tar", False),
    ],
)
def test_what_has_a_scheme_is_a_url(shard: str, url: bool) -> None:
    assert is_url(shard) == url


def test_names_are_the_shortest_ends_of_paths_that_differ() -> None:
    assert unique_names(["/a/x.tar", "/a/y.tar"]) == ["x.tar", "y.tar"]
    assert unique_names(["/a/x.tar", "/b/x.tar", "/b/y.tar"]) == ["a/x.tar", "b/x.tar", "b/y.tar"]
    assert unique_names(["https://h/a/x.tar", "/b/x.tar"]) == ["a/x.tar", "b/x.tar"]


def test_a_shard_of_two_sources_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="'a.tar' belongs to two sources; list it once"):
        unique_names([str(folder / "a.tar"), "b.tar", "a.tar"])
