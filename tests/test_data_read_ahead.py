"""Loading ahead of use: the order stays, errors keep their place, and the lead is bounded."""

import pytest

from data.errors import DataError
from data.read_ahead import read_ahead


def test_reading_ahead_keeps_the_order_and_hands_errors_on() -> None:
    assert list(read_ahead(lambda i: i * i, range(100))) == [i * i for i in range(100)]

    def refuse(number: int) -> int:
        if number == 40:
            raise DataError("the image 40")
        return number

    reading = read_ahead(refuse, range(100))
    assert [next(reading) for _ in range(40)] == list(range(40))
    with pytest.raises(DataError, match="the image 40"):
        next(reading)


def test_reading_ahead_stops_a_little_ahead() -> None:
    taken: list[int] = []
    reading = read_ahead(lambda i: i, (taken.append(i) or i for i in range(1000)))
    assert next(reading) == 0
    assert len(taken) < 50
    reading.close()
