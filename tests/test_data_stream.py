"""The indexed stream: one order and the same pixels for every number of ranks and workers."""

import hashlib
import io
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.errors import DataError
from data.layout import fixed_layout
from data.stream import State, TrainStream, merge_states
from tests.tiny_run import DEADLOCK_S

COUNTS = (5, 9, 3, 7)  # 24 samples: three global batches of 8 are an epoch
Steps = list[list[tuple[str, str]]]


def _jpeg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, count in enumerate(COUNTS):
        members = {f"{i:04}.jpg": _jpeg(rng) for i in range(count)}
        write_tar(folder / f"{number:03}.tar", members)
    return folder


def _config(*folders: Path, **options: object) -> DataConfig:
    sources = [{"shards": str(folder)} for folder in folders]
    fields = {"sources": sources, "workers": 0, "shuffle_window": 2, **options}
    return DataConfig.model_validate(fields)


def _run(
    config: DataConfig, steps: int, *, world: int = 1, start: State | None = None
) -> tuple[Steps, State]:
    """The global batches as sorted (key, pixel hash), read by `world` ranks in turn."""
    batches: Steps = [[] for _ in range(steps)]
    states = []
    layout = fixed_layout(resolution=(8, 12), batch_size=8, micro_batch_size=2, ranks=world)
    for rank in range(world):
        stream = TrainStream(config, layout, rank=rank, seed=3)
        if start is not None:
            stream.restore(start)
        micro = stream.batches()
        for step in range(steps):
            for _ in layout.slices(rank, step, 0):
                batch = next(micro)
                hashes = [hashlib.md5(i.numpy().tobytes()).hexdigest() for i in batch.images]
                batches[step] += zip(batch.keys, hashes, strict=True)
        states.append(stream.state())
    return [sorted(batch) for batch in batches], merge_states(states)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_change_neither_samples_nor_pixels(
    shards: Path, world: int, workers: int
) -> None:
    whole, _ = _run(_config(shards), 5)
    assert _run(_config(shards, workers=workers), 5, world=world)[0] == whole


@pytest.mark.parametrize("done", [1, 3, 4])
@pytest.mark.parametrize("world", [1, 4])
def test_a_resumed_run_yields_what_an_uninterrupted_one_would(
    shards: Path, done: int, world: int
) -> None:
    whole, _ = _run(_config(shards), 6)
    _, state = _run(_config(shards), done, world=2)
    assert state["position"] == {"step": done, "samples": 8 * done}
    assert _run(_config(shards), 6 - done, world=world, start=state)[0] == whole[done:]


def test_an_epoch_holds_each_sample_once_and_the_next_has_another_order(shards: Path) -> None:
    batches, _ = _run(_config(shards), 6)
    first, second = ([[k for k, _ in b] for b in half] for half in (batches[:3], batches[3:]))
    everything = {f"{s:03}.tar/{i:04}.jpg"[:-4] for s, n in enumerate(COUNTS) for i in range(n)}
    for epoch in (first, second):
        assert Counter(k for b in epoch for k in b) == Counter(everything)
    assert first != second


def _with_crops(shards: Path, **options: object) -> DataConfig:
    return _config(shards, **options, sources=[{"shards": str(shards), "crops": 2}])


def _crops(config: DataConfig, steps: int) -> list[set[tuple[str, str]]]:
    """The (key, pixel hash) of every epoch of three steps."""
    batches, _ = _run(config, steps)
    return [set().union(*batches[i : i + 3]) for i in range(0, steps, 3)]


def test_with_crops_the_epochs_take_turns_and_all_are_seen_when_the_stream_says_so(
    shards: Path, tmp_path: Path
) -> None:
    config = _with_crops(shards)
    epochs = _crops(config, 15)
    assert epochs[0] == epochs[2] == epochs[4]
    assert epochs[1] == epochs[3]
    assert not epochs[0] & epochs[1]
    assert _crops(_config(shards), 3) == epochs[:1]  # the first epoch's are those of no limit
    layout = fixed_layout(resolution=(8, 12), batch_size=8, micro_batch_size=8)
    assert TrainStream(config, layout).steps_of_all_crops == 6
    assert TrainStream(_config(shards), layout).steps_of_all_crops is None
    assert TrainStream(_config(shards, augmentation="none"), layout).steps_of_all_crops == 3


def test_the_crops_of_a_sample_do_not_depend_on_bad_ones_around_it(shards: Path) -> None:
    """A cache of all crops must hold that of a sample that stands in for a bad one."""
    rng = np.random.default_rng(1)
    members = {f"{i}.jpg": _jpeg(rng)[: 300 if i % 2 else None] for i in range(8)}
    write_tar(shards / "000.tar", members)
    config = _with_crops(shards, max_bad_share=0.5)
    seen: dict[str, set[str]] = {}
    for key, pixels in (pair for step in _run(config, 40)[0] for pair in step):
        seen.setdefault(key, set()).add(pixels)
    assert max(map(len, seen.values())) == 2


@pytest.mark.process
def test_a_spawned_worker_reads_the_same_pixels(shards: Path, tmp_path: Path) -> None:
    config = _config(shards, workers=1, worker_start="spawn", index_dir=tmp_path / "index")
    assert _run(config, 1)[0] == _run(_config(shards), 1)[0]


# Reads from a source that does not answer, as a slow network does.
HANGS = """
import sys, time
from data.config import DataConfig
from data.feed import load_in_workers
from torch.utils.data import Dataset

class Slow(Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, number):
        if number > 1:
            time.sleep(float(sys.argv[1]))
        return number

config = DataConfig(sources=[{"shards": "."}], workers=1, prefetch=2)
batches = load_in_workers(Slow(), config)
print(next(batches))
kept = batches, batches._workers  # a name of the module, which outlives all functions
"""


@pytest.mark.process
@pytest.mark.parametrize("seconds", ["0", "1000"])
def test_workers_end_with_a_process_that_still_has_them(seconds: str) -> None:
    """They leave SIGTERM to it, by which torch and multiprocessing would end them."""
    command = [sys.executable, "-c", HANGS, seconds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLOCK_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_workers_leave_the_global_random_state_alone(shards: Path) -> None:
    before = torch.random.get_rng_state()
    _run(_config(shards, workers=1), 1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_or_window_is_refused_with_what_differs(shards: Path) -> None:
    _, state = _run(_config(shards), 1)
    with pytest.raises(DataError, match="data shuffle_window was 2 and is now 3"):
        _run(_config(shards, shuffle_window=3), 1, start=state)


def test_a_bad_image_is_replaced_alike_on_every_rank_and_named(shards: Path) -> None:
    rng = np.random.default_rng(1)
    write_tar(shards / "000.tar", {"good.jpg": _jpeg(rng), "cut.jpg": _jpeg(rng)[:300]})
    whole, _ = _run(_config(shards), 5)
    assert _run(_config(shards, workers=1), 5, world=2)[0] == whole
    assert all(len(batch) == 8 for batch in whole)
    stream = TrainStream(
        _config(shards), fixed_layout(resolution=(8, 12), batch_size=4, micro_batch_size=4)
    )
    batches = stream.batches()
    for _ in range(6):
        assert "000.tar/cut" not in next(batches).keys
    assert [b[:2] for b in stream.bad] == [("000.tar", "cut")]


def test_more_bad_images_than_tolerated_stop_the_run_with_names(shards: Path) -> None:
    write_tar(shards / "000.tar", {f"{i}.jpg": b"<html>" for i in range(5)})
    with pytest.raises(
        DataError,
        match=r"of \d+ samples are bad.*max_bad_share=0.001(.|\n)*not a JPEG, PNG or",
    ):
        _run(_config(shards), 6)


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size 8 is not a multiple of micro_batch_size 2 x 3"):
        fixed_layout(resolution=(8, 8), batch_size=8, micro_batch_size=2, ranks=3)


def test_what_the_index_finds_bad_is_named_by_the_first_rank_only(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(shards / "004.tar", {"0000.jpg": b""})
    with caplog.at_level("WARNING"):
        _run(_config(shards, max_bad_share=0.1), 1, world=4)
    assert caplog.messages == [
        "1 of 25 samples are bad; the first:\n  004.tar/0000: an image of 0 bytes"
    ]
