"""Bad samples: named, tolerated below a share, fatal above it."""

import logging
import math
import random

import pytest

from data.bad import BadCounter, check_share, describe, log_bad, tolerated
from data.batch import BadSample
from data.errors import DataError


def _bad(*numbers: int) -> list[BadSample]:
    return [BadSample("000.tar", f"{n:04}", "why") for n in numbers]


def test_one_bad_sample_among_the_first_ten_is_tolerated() -> None:
    check_share(1, 10, 0.001, _bad(0))


def test_over_a_long_run_the_share_itself_decides() -> None:
    for seen in (10**6, 10**8):
        assert tolerated(0.001, seen) / seen == pytest.approx(
            0.001, rel=3.2 / math.sqrt(seen / 1e3)
        )
    assert tolerated(0.001, 10**8) < 0.00102 * 10**8


def test_data_at_the_tolerated_share_end_hardly_ever_a_run() -> None:
    """A run of 20000 samples, each bad with just the tolerated probability."""
    stopped = 0
    for seed in range(50):
        rng, bad = random.Random(seed), 0
        for seen in range(1, 20001):
            bad += rng.random() < 0.01
            if bad > tolerated(0.01, seen):
                stopped += 1
                break
    assert stopped <= 1


def test_data_at_five_times_the_share_soon_end_a_run() -> None:
    for seed in range(20):
        rng, bad = random.Random(seed), 0
        for seen in range(1, 2001):
            bad += rng.random() < 0.05
            if bad > tolerated(0.01, seen):
                break
        else:
            pytest.fail("2000 samples, 5 % bad, did not end the run")


def test_a_share_of_zero_stops_at_the_first() -> None:
    check_share(0, 10, 0.0, [])
    with pytest.raises(DataError, match=r"1 of 1000000 samples are bad"):
        check_share(1, 10**6, 0.0, _bad(0))


def test_the_error_gives_counts_the_share_and_the_first_five_names() -> None:
    with pytest.raises(DataError) as raised:
        check_share(50, 100, 0.001, _bad(*range(50)))
    lines = str(raised.value).splitlines()
    assert lines[0] == (
        "50 of 100 samples are bad, more than data.max_bad_share=0.001 allows; the first:"
    )
    assert lines[1:] == [f"  000.tar/{n:04}: why" for n in range(5)]


def test_a_defect_without_a_key_is_described_by_its_shard() -> None:
    assert describe(BadSample("a.tar", "", "the file is empty")) == "a.tar: the file is empty"


def test_a_sample_that_is_bad_in_each_epoch_counts_once() -> None:
    counter = BadCounter(0.0001, num_samples=100)
    for _ in range(1000):
        counter.add(100, _bad(7))
    assert counter.bad == _bad(7)


def test_samples_seen_are_at_most_those_there_are() -> None:
    """Epochs do not wash the share out: 20 of 100 are bad, after many epochs too."""
    counter = BadCounter(0.05, num_samples=100)
    counter.add(100_000, [])
    with pytest.raises(DataError, match="of 100 samples are bad"):
        counter.add(100, _bad(*range(20)))


def test_without_a_known_number_all_samples_read_count() -> None:
    counter = BadCounter(0.05, num_samples=None)
    counter.add(100_000, _bad(*range(20)))
    assert len(counter.bad) == 20


def test_the_counter_stops_the_run() -> None:
    counter = BadCounter(0.001, num_samples=None)
    with pytest.raises(DataError, match=r"10 of 74 samples are bad"):
        counter.add(64, _bad(*range(10)))


def test_first_names_are_logged_then_each_doubling(caplog: pytest.LogCaptureFixture) -> None:
    counter = BadCounter(0.9, num_samples=None)
    with caplog.at_level(logging.WARNING):
        for number in range(40):
            counter.add(10, _bad(number))
            counter.add(10, _bad(number))
    logged = [int(record.getMessage().split()[2][:-1]) for record in caplog.records]
    assert logged == [1, 2, 3, 4, 5, 8, 16, 32]
    assert caplog.records[0].getMessage() == "bad sample 1: 000.tar/0000: why"


def test_what_is_found_together_is_logged_in_one_message(caplog: pytest.LogCaptureFixture) -> None:
    log_bad([], 10)
    assert not caplog.records
    log_bad(_bad(*range(8)), 100)
    assert caplog.messages == [
        "8 of 100 samples are bad; the first:\n"
        + "\n".join(f"  000.tar/{n:04}: why" for n in range(5))
    ]
