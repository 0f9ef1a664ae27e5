"""Streaming mode: the same batches for any ranks and workers, exact resume, defects that count."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import lanes
from data.batch import BadSample
from data.config import DataConfig
from data.errors import DataError
from data.layout import fixed_layout
from data.stream import State, TrainStream, merge_states
from data.tar_stream import StreamedImage, read_shard

SHARDS, PER_SHARD = 8, 4  # 4 lanes of 2 shards: 32 samples, four global batches of 8 are an epoch
Steps = list[list[tuple[str, str]]]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_CHUNK_UNIT", 1)


def _jpeg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        members = {f"{i:04}.jpg": _jpeg(rng) for i in range(PER_SHARD)}
        (tmp_path / f"{number:03}.tar").write_bytes(_tar(members))
    return tmp_path


def _config(*shards: str | list[str], **options: object) -> DataConfig:
    sources = [{"shards": one} for one in shards]
    fields = {"sources": sources, "workers": 0, "lanes": 4, "shuffle_window": 3, **options}
    return DataConfig.model_validate(fields)


def _files(folder: Path) -> str:
    return f"file://{folder}/{{000..{SHARDS - 1:03}}}.tar"


def _stream(config: DataConfig, rank: int = 0, world: int = 1, seed: int = 3) -> TrainStream:
    layout = fixed_layout(resolution=(8, 12), batch_size=8, micro_batch_size=2, ranks=world)
    return TrainStream(config, layout, rank=rank, seed=seed)


def _run(
    config: DataConfig, steps: int, *, world: int = 1, start: State | None = None
) -> tuple[list[Steps], State]:
    """Each rank's batches of an optimiser step as (key, pixel hash) in order, and the state."""
    ranks, states = [], []
    for rank in range(world):
        stream = _stream(config, rank, world)
        if start is not None:
            stream.restore(start)
        micro, batches = stream.batches(), []
        for _ in range(steps):
            samples: list[tuple[str, str]] = []
            for batch in (next(micro) for _ in range(8 // 2 // world)):
                hashes = [hashlib.md5(i.numpy().tobytes()).hexdigest() for i in batch.images]
                samples += zip(batch.keys, hashes, strict=True)
            batches.append(samples)
        ranks.append(batches)
        states.append(stream.state())
    return ranks, json.loads(json.dumps(merge_states(states)))


def _together(ranks: list[Steps]) -> Steps:
    return [sorted(chain(*step)) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_change_neither_samples_nor_pixels(
    folder: Path, world: int, workers: int
) -> None:
    whole = _run(_config(_files(folder)), 6)[0]
    ranks = _run(_config(_files(folder), workers=workers), 6, world=world)[0]
    assert _together(ranks) == _together(whole)


def test_workers_do_not_change_the_order_of_samples_in_a_batch(folder: Path) -> None:
    whole = _run(_config(_files(folder)), 3, world=2)[0]
    assert _run(_config(_files(folder), workers=2), 3, world=2)[0] == whole


@pytest.mark.parametrize("done", range(1, 6))
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (1, 2)])
def test_a_resumed_run_yields_what_an_uninterrupted_one_would(
    folder: Path, done: int, world: int, workers: int
) -> None:
    config = _config(_files(folder), workers=workers)
    whole = _run(config, 7, world=world)[0]
    _, state = _run(config, done, world=world)
    rest = _run(config, 7 - done, world=world, start=state)[0]
    assert rest == [batches[done:] for batches in whole]


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_another_number_of_ranks_and_workers_resumes_exactly(folder: Path, window: int) -> None:
    config = _config(_files(folder), shuffle_window=window)
    whole = _together(_run(config, 7)[0])
    _, state = _run(config, 3, world=2)
    for world in (1, 4):
        rest = _run(config, 4, world=world, start=state)[0]
        assert _together(rest) == whole[3:]


def test_a_source_of_one_shard_resumes_at_the_border_of_its_epoch(folder: Path) -> None:
    urls = [f"file://{folder}/000.tar"]
    config = _config(urls, lanes=1, shuffle_window=PER_SHARD)
    whole = _run(config, 6)[0][0]
    for done in range(1, 5):
        state = _run(config, done)[1]
        assert _run(config, 6 - done, start=state)[0][0] == whole[done:]


def test_an_epoch_holds_each_sample_once_and_the_next_has_another_order(folder: Path) -> None:
    batches = _together(_run(_config(_files(folder)), 8)[0])
    first, second = ([[k for k, _ in b] for b in half] for half in (batches[:4], batches[4:]))
    everything = {f"{s:03}.tar/{i:04}" for s in range(SHARDS) for i in range(PER_SHARD)}
    for epoch in (first, second):
        assert Counter(chain(*epoch)) == Counter(everything)
    assert first != second


def test_a_chunk_mixes_its_samples(folder: Path) -> None:
    config = _config(_files(folder), lanes=1, shuffle_window=16)
    keys = [key for batch in _run(config, 4)[0][0] for key, _ in batch]
    shards = [key.split("/")[0] for key in keys]
    for half in (shards[:16], shards[16:]):
        assert len(set(half)) == 4
        assert half != sorted(half, key=half.index)  # not one shard behind the other


def test_uneven_shards_are_dealt_evenly_over_epochs(folder: Path) -> None:
    config = _config(f"file://{folder}/{{000..004}}.tar", lanes=2, shuffle_window=100)
    steps = 5 * PER_SHARD * 2 // 8  # two epochs of 20 samples, 5 shards for each lane
    keys = [key for batch in _run(config, steps)[0][0] for key, _ in batch]
    assert Counter(Counter(keys).values()) == {2: 20}


def test_sources_are_mixed_by_weight(folder: Path) -> None:
    sources = [
        {"shards": f"file://{folder}/{{000..003}}.tar", "weight": 3},
        {"shards": f"{folder}/00[4-7].tar"},
    ]
    config = DataConfig.model_validate({"sources": sources, "workers": 0, "lanes": 4})
    keys = [key for batch in _run(config, 128)[0][0] for key, _ in batch]
    assert sum(key < "004" for key in keys) == 768  # of 1024


@pytest.mark.process
def test_pipes_are_refused_and_run_only_where_allowed(folder: Path) -> None:
    pipes = [f"pipe:cat {folder}/{number:03}.tar" for number in range(SHARDS)]
    with pytest.raises(DataError, match="is a shell command; set data.allow_pipe=true"):
        _stream(_config(pipes))
    (first,) = read_shard(pipes[0], "x")
    assert isinstance(first, BadSample)
    assert "cannot be opened" in first.reason
    piped = _run(_config(pipes, allow_pipe=True, workers=2), 4)[0]
    files = _run(_config(_files(folder)), 4)[0]
    assert [h for b in _together(piped) for _, h in b] == [
        h for b in _together(files) for _, h in b
    ]


def test_a_url_is_not_rewritten_into_a_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"https://=pipe:touch {folder}/ran; ")
    (only,) = read_shard("https://nowhere.invalid/a.tar", "a.tar")
    assert isinstance(only, BadSample)
    assert not (folder / "ran").exists()


def test_s3_and_unknown_schemes_are_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match="pipe:aws s3 cp s3://b/0.tar -.*data.allow_pipe=true"):
        _stream(_config("s3://b/{0..7}.tar"))
    with pytest.raises(DataError, match="nothing opens 'htps:'.*did you mean 'https'"):
        _stream(_config("htps://b/{0..7}.tar"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lanes": 3}, "data.lanes=3 must be .*divide batch_size 8.*; use 1, 2, 4$"),
        ({"lanes": 1, "workers": 2}, "multiple of 1 ranks x 2 workers.*; use 2, 4, 8$"),
        ({"lanes": 16}, "at most 8, the shards of the smallest source; use 2, 4, 8$"),
        ({"workers": 9}, "no number fits"),
    ],
)
def test_lanes_that_cannot_be_shared_out_are_refused(
    folder: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        _stream(_config(_files(folder), **options))


def test_a_state_of_one_rank_alone_is_refused_by_another_number_of_ranks(folder: Path) -> None:
    stream = _stream(_config(_files(folder)), 0, 2)
    batches = stream.batches()
    for _ in range(2):
        next(batches)
    other = _stream(_config(_files(folder)))
    other.restore(stream.state())
    with pytest.raises(DataError, match="no lane 1; store the result of merge_states"):
        next(other.batches())


def test_other_lanes_are_refused_with_what_differs(folder: Path) -> None:
    _, state = _run(_config(_files(folder)), 1)
    with pytest.raises(DataError, match="data lanes was 4 and is now 2"):
        _run(_config(_files(folder), lanes=2), 1, start=state)


def _whole() -> bytes:
    rng = np.random.default_rng(1)
    return _tar({f"{i}.jpg": _jpeg(rng) for i in range(3)})


def _flip_second_header(data: bytes) -> bytes:
    at = data.index(b"1.jpg")
    return data[:at] + b"?" + data[at + 1 :]


@pytest.mark.process
@pytest.mark.parametrize(
    "spoil, keys, reason",
    [
        (lambda d: d, ["0", "1", "2"], None),
        (lambda d: d[: d.index(b"2.jpg") + 700], ["0", "1"], "ends inside the member '2.jpg'"),
        (lambda d: d[: d.index(b"2.jpg")], ["0", "1"], "without an end-of-archive mark"),
        (_flip_second_header, ["0", "2"], "belong to no readable member"),
        (lambda d: b"<html>404</html>" * 99, [], "not a tar file; it begins with b'<html>404"),
        (lambda d: b"", [], "the stream is empty"),
        (lambda d: bytes(10240), [], "an archive without members"),
        (lambda d: d + d, ["0", "1", "2"], "a second image for the key"),
        (lambda d: _tar({"0.jpg": b"x", "1.txt": b"x"}), ["0"], "no image (jpg, jpeg, png, webp)"),
    ],
)
def test_a_damaged_stream_yields_what_is_whole_and_one_reason(
    tmp_path: Path, spoil: Callable[[bytes], bytes], keys: list[str], reason: str | None
) -> None:
    (tmp_path / "a.tar").write_bytes(spoil(_whole()))
    items = list(read_shard(f"pipe:cat {tmp_path}/a.tar", "a.tar", allow_pipe=True))
    assert [item.key for item in items if isinstance(item, StreamedImage)] == keys
    reasons = [item.reason for item in items if isinstance(item, BadSample)]
    if reason is None:
        assert reasons == []
    else:
        assert reason in reasons[0]


@pytest.mark.process
def test_a_command_that_fails_behind_its_data_is_counted_and_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(_whole())
    *images, last = read_shard(f"pipe:cat {tmp_path}/a.tar; exit 3", "a.tar", allow_pipe=True)
    assert [image.key for image in images] == ["0", "1", "2"]
    assert last == BadSample("a.tar", "", "its download or command ended with status 3")


def test_bad_samples_and_shards_are_passed_over_alike_on_every_rank(folder: Path) -> None:
    rng = np.random.default_rng(2)
    spoiled = {"a.jpg": _jpeg(rng), "b.jpg": b"no image", "c.txt": b"", "d.jpg": _jpeg(rng)}
    (folder / "002.tar").write_bytes(_tar(spoiled))
    (folder / "005.tar").write_bytes(b"<html>")
    config = _config(_files(folder), max_bad_share=0.5)
    whole = _together(_run(config, 9)[0])
    assert _together(_run(config.model_copy(update={"workers": 1}), 9, world=2)[0]) == whole
    _, state = _run(config, 4)
    assert _together(_run(config, 5, start=state)[0]) == whole[4:]
    stream = _stream(config)
    batches = stream.batches()
    for _ in range(9 * 4):
        next(batches)
    assert {b[:2] for b in stream.bad} == {("002.tar", "b"), ("002.tar", "c"), ("005.tar", "")}


@pytest.mark.parametrize("content", [b"<html>", _tar({"a.jpg": b"no image"}), _tar({"d/": b""})])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_any_image_ends_the_run(
    folder: Path, content: bytes, workers: int
) -> None:
    for number in range(SHARDS):
        (folder / f"{number:03}.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"sources\[0\]: no readable image in 8 consecutive"):
        _run(_config(_files(folder), workers=workers), 1)
