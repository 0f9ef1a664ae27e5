"""Steps of several sub-batches: the order of the samples does not depend on who reads them."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.errors import DataError
from data.layout import Slice, StepLayout, SubBatch
from data.stream import State, TrainStream, merge_states
from tests.test_data_stream import write_tar

SHARDS, PER_SHARD = 4, 6
SMALL, LARGE = (8, 12), (16, 8)
HALF = Fraction(1, 2)
Sample = tuple[str, bytes]


def _parts(step: int, ranks: int) -> list[SubBatch]:
    """Eight small images, or four in every third step; four large ones; a half of the ranks each.

    A single rank has both parts.
    """
    low, high = (
        (range(1), range(1)) if ranks == 1 else (range(ranks // 2), range(ranks // 2, ranks))
    )
    size = 4 if step % 3 == 2 else 8
    return [
        SubBatch(
            resolution=SMALL,
            batch_size=size,
            micro_batch_size=size // 2 // len(low),
            ranks=low,
            lanes=(Fraction(0), HALF),
        ),
        SubBatch(
            resolution=LARGE,
            batch_size=4,
            micro_batch_size=2 // len(high),
            ranks=high,
            lanes=(HALF, Fraction(1)),
        ),
    ]


def layout(ranks: int) -> StepLayout:
    every = [part for step in range(3) for part in _parts(step, ranks)]
    return StepLayout(lambda step: _parts(step, ranks), every, {"parts": "of this test"})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        members = {}
        for i in range(PER_SHARD):
            pixels = rng.integers(0, 256, (20, 26, 3), dtype=np.uint8)
            path = tmp_path / "one.jpg"
            Image.fromarray(pixels).save(path)
            members[f"{i:04}.jpg"] = path.read_bytes()
        write_tar(tmp_path / f"{number:03}.tar", members)
    return tmp_path


def _indexed(folder: Path, workers: int = 0) -> DataConfig:
    source = {"shards": str(folder / "*.tar")}
    return DataConfig.model_validate({"sources": [source], "workers": workers})


def _lanes(folder: Path, workers: int = 0) -> DataConfig:
    source = {"shards": f"file://{folder}/{{000..{SHARDS - 1:03}}}.tar"}
    return DataConfig.model_validate({"sources": [source], "workers": workers, "lanes": 4})


MODES = pytest.mark.parametrize("mode", [_indexed, _lanes])
Mode = Callable[..., DataConfig]


def _run(
    config: DataConfig, steps: range, ranks: int, start: State | None = None
) -> tuple[list[dict[tuple[int, int], list[Sample]]], State]:
    """For each step, the sorted samples of each size, read by `ranks` ranks in turn."""
    found: list[dict[tuple[int, int], list[Sample]]] = [{} for _ in steps]
    states = []
    for rank in range(ranks):
        stream = TrainStream(config, layout(ranks), rank=rank, seed=3)
        if start is not None:
            stream.restore(start)
        batches = stream.batches()
        for place, step in enumerate(steps):
            for due in layout(ranks).slices(rank, step, 0):
                images, keys, _ = next(batches)
                assert images.shape == (due.size, 3, *due.resolution)
                samples = [image.numpy().tobytes() for image in images]
                found[place].setdefault(due.resolution, []).extend(zip(keys, samples, strict=True))
        states.append(stream.state())
    for step_samples in found:
        for samples_of_size in step_samples.values():
            samples_of_size.sort()
    return found, merge_states(states)


def _sizes(found: Sequence[dict[tuple[int, int], list[Sample]]]) -> list[tuple[int, int]]:
    return [(len(step[SMALL]), len(step[LARGE])) for step in found]


@MODES
@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 0), (2, 1), (1, 2)])
def test_each_part_holds_the_same_samples_and_pixels_whoever_reads_it(
    shards: Path, mode: Mode, ranks: int, workers: int
) -> None:
    alone, _ = _run(mode(shards), range(5), 1)
    assert _sizes(alone) == [(8, 4), (8, 4), (4, 4), (8, 4), (8, 4)]
    assert _run(mode(shards, workers), range(5), ranks)[0] == alone


@MODES
@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_a_resumed_run_goes_on_with_other_ranks_and_loses_or_repeats_no_sample(
    shards: Path, mode: Mode, done: int, before: int, after: int
) -> None:
    whole, _ = _run(mode(shards), range(6), 1)
    first, state = _run(mode(shards), range(done), before)
    assert state["position"]["step"] == done
    rest, _ = _run(mode(shards), range(done, 6), after, state)
    assert first + rest == whole


def test_an_epoch_of_several_parts_holds_each_sample_once(shards: Path) -> None:
    """Twenty-four images: two steps of 12."""
    found, _ = _run(_indexed(shards), range(2), 2)
    keys = [key for step in found for samples in step.values() for key, _ in samples]
    assert len(set(keys)) == len(keys) == SHARDS * PER_SHARD


def test_slices_follow_each_other_through_parts_ranks_and_micro_batches() -> None:
    first = SubBatch(resolution=SMALL, batch_size=8, micro_batch_size=2, ranks=range(2))
    second = SubBatch(resolution=LARGE, batch_size=3, micro_batch_size=3, ranks=range(1, 2))
    parts = StepLayout(lambda step: [first, second], [first, second], {})
    assert list(parts.slices(0, 0, 100)) == [Slice(100, 2, SMALL), Slice(104, 2, SMALL)]
    assert list(parts.slices(1, 0, 100)) == [
        *(Slice(102, 2, SMALL), Slice(106, 2, SMALL)),
        Slice(108, 3, LARGE),
    ]
    assert parts.num_samples(0) == 11


def test_lanes_that_do_not_divide_among_arms_are_refused(shards: Path) -> None:
    config = _lanes(shards).model_copy(update={"lanes": 3})
    message = "lanes=3, of which one arm reads 1/2, must be .*; use 2, 4"
    with pytest.raises(DataError, match=message):
        TrainStream(config, layout(2), rank=0)
