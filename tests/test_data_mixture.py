"""Mixtures: exact shares, endless sources of their own length, and the plan of each."""

import io
import tarfile
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.layout import fixed_layout
from data.mixture import Mixture
from data.plan import SourcePlan
from data.stream import TrainStream

WEIGHTS = [(1.0,), (1.0, 1.0), (3.0, 1.0), (0.7, 0.2, 0.1), (1e-3, 5.0), (1, 1, 1, 1, 1, 1, 1)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_source_is_always_less_than_one_sample_a_source_from_its_share(
    weights: tuple[float, ...],
) -> None:
    """At every border of a block; Fractions, so that no rounding blurs it."""
    mixture, counts = Mixture(weights, seed=0), Counter[int]()
    exact = [Fraction(str(weight)) for weight in weights]
    for position in range(8 * 1024):
        counts[mixture.locate(position)[0]] += 1
        if (position + 1) % 1024 == 0:
            for source, weight in enumerate(exact):
                fair = (position + 1) * weight / sum(exact)
                assert abs(counts[source] - fair) < len(weights)
            assert mixture.counts(position + 1) == [counts[i] for i in range(len(weights))]


def test_weights_that_divide_the_block_are_met_exactly() -> None:
    mixture = Mixture([5, 2, 1], seed=3)
    for block in range(5):
        places = range(1024 * block, 1024 * (block + 1))
        counts = Counter(mixture.locate(position)[0] for position in places)
        assert counts == {0: 640, 1: 256, 2: 128}


def test_shares_stay_exact_far_into_a_run() -> None:
    num = 1024 * 10**12
    counts = Mixture([0.1, 0.2, 0.7], seed=0).counts(num)
    assert sum(counts) == num
    for count, share in zip(
        counts, (Fraction(1, 10), Fraction(2, 10), Fraction(7, 10)), strict=True
    ):
        assert abs(count - num * share) < 3


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_source_is_read_in_its_own_order_without_gaps(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights, seed=1)
    ordinals: dict[int, list[int]] = {}
    for position in range(5000):
        source, ordinal = mixture.locate(position)
        ordinals.setdefault(source, []).append(ordinal)
    for source in ordinals.values():
        assert source == list(range(len(source)))


def test_a_position_is_found_alike_in_any_order_of_asking() -> None:
    places = list(range(0, 10_000, 7))
    forward = Mixture([2, 1], seed=5)
    first = [forward.locate(position) for position in places]
    backward = Mixture([2, 1], seed=5)
    assert [backward.locate(position) for position in reversed(places)] == first[::-1]


def test_no_slot_of_a_batch_belongs_to_one_source() -> None:
    """In 128 batches of 8 each slot sees both sources about equally (standard deviation 5.7)."""
    mixture = Mixture([1, 1], seed=2)
    of_slot = np.array([mixture.locate(p)[0] for p in range(1024)]).reshape(128, 8).sum(0)
    assert of_slot.min() > 64 - 25
    assert of_slot.max() < 64 + 25


def test_another_seed_gives_another_pattern_with_the_same_counts() -> None:
    mixtures = [Mixture([2, 1], seed) for seed in (0, 1)]
    patterns = [[m.locate(position)[0] for position in range(1024)] for m in mixtures]
    assert patterns[0] != patterns[1]
    assert Counter(patterns[0]) == Counter(patterns[1])


def _epoch(plan: SourcePlan, epoch: int) -> list[int]:
    places = [plan.locate(epoch * plan.num_samples + i) for i in range(plan.num_samples)]
    assert {place.epoch for place in places} == {epoch}
    return [int(place.window[place.slot]) for place in places]


@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("counts", [(5, 9, 3, 7), (0, 4, 0, 0, 2, 0), (1,), (0, 0, 6)])
def test_an_epoch_of_a_plan_holds_each_sample_once(counts: tuple[int, ...], window: int) -> None:
    plan = SourcePlan(np.array(counts), window=window, seed=0, source=0)
    for epoch in range(4):
        assert sorted(_epoch(plan, epoch)) == list(range(sum(counts)))


def test_a_window_holds_whole_shards_and_mixes_them() -> None:
    counts = np.full(6, 50)
    plan = SourcePlan(counts, window=2, seed=0, source=0)
    order = np.array(_epoch(plan, 0)).reshape(3, 100) // 50
    for window in order:
        assert len(set(window)) == 2
        assert 10 < np.count_nonzero(np.diff(window)) < 90  # 50 changes expected, deviation 5
    assert sorted({int(shard) for window in order for shard in window}) == list(range(6))


@pytest.mark.parametrize("counts", [(10,) * 4, (20,), (1,) * 20], ids=["both", "window", "shards"])
def test_epochs_sources_and_seeds_have_orders_of_their_own(counts: tuple[int, ...]) -> None:
    """Also where only the samples of a window can change places, or only the shards."""

    def order(seed: int, source: int, epoch: int) -> tuple[int, ...]:
        plan = SourcePlan(np.array(counts), window=1, seed=seed, source=source)
        return tuple(_epoch(plan, epoch))

    assert len({order(s, n, e) for s in range(2) for n in range(2) for e in range(2)}) == 8


def test_a_plan_answers_alike_in_any_order_of_asking() -> None:
    counts = np.array([5, 9, 3, 7, 2, 8])
    forward = SourcePlan(counts, window=1, seed=0, source=0)
    orders = [_epoch(forward, epoch) for epoch in range(3)]
    backward = SourcePlan(counts, window=1, seed=0, source=0)
    for ordinal in reversed(range(3 * int(counts.sum()))):
        place = backward.locate(ordinal)
        epoch, offset = divmod(ordinal, int(counts.sum()))
        assert place.window[place.slot] == orders[epoch][offset]


def _source(folder: Path, counts: tuple[int, ...]) -> Path:
    folder.mkdir()
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number:03}.tar", "w") as tar:
            for sample in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (sample, number, 0)).save(buffer, "PNG")
                info = tarfile.TarInfo(f"{sample:03}.png")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    return folder


def test_a_stream_mixes_sources_by_weight_and_each_has_its_own_epochs(tmp_path: Path) -> None:
    large = _source(tmp_path / "large", (30, 34, 32))
    small = _source(tmp_path / "small", (5, 3))
    config = DataConfig.model_validate(
        {
            "sources": [{"shards": str(large), "weight": 3}, {"shards": str(small), "weight": 1}],
            "workers": 0,
        }
    )
    stream = TrainStream(
        config, fixed_layout(resolution=(4, 4), batch_size=64, micro_batch_size=64), seed=1
    )
    assert stream.num_samples == 104
    batches = [batch.keys for batch in islice(stream.batches(), 16)]
    keys = [key for batch in batches for key in batch]
    of_large = [key for key in keys if key.startswith("large/")]
    of_small = [key for key in keys if key.startswith("small/")]
    assert (len(of_large), len(of_small)) == (768, 256)
    for source, size in ((of_large, 96), (of_small, 8)):
        epochs = [source[i : i + size] for i in range(0, len(source), size)]
        assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]
    shares = [sum(key.startswith("small/") for key in batch) for batch in batches]
    assert all(4 < share < 30 for share in shares)  # 16 expected, deviation 3.5


@pytest.mark.parametrize("weights", WEIGHTS)
def test_positions_for_some_samples_of_each_source_hold_them_and_few_more(
    weights: tuple[float, ...],
) -> None:
    mixture = Mixture(weights, seed=0)
    wanted = [5 * (source + 1) for source in range(len(weights))]
    num = mixture.positions_for(wanted)
    if len(weights) == 1:
        assert num == 5
        return
    assert all(have >= want for have, want in zip(mixture.counts(num), wanted, strict=True))
    shorter = mixture.counts(num - 1024)
    assert any(have < want for have, want in zip(shorter, wanted, strict=True))
