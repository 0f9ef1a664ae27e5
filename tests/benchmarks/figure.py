"""The result of a benchmark: a figure and its target."""

from typing import NamedTuple


class Figure(NamedTuple):
    """One row of the table that `python -m tests.benchmarks` prints.

    If `most`, the target is the largest value allowed, else the smallest.
    """

    name: str
    value: float
    target: float
    most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.most else self.value >= self.target

    def line(self) -> str:
        sign, verdict = "<=" if self.most else ">=", "met" if self.met else "MISSED"
        return f"{self.name:58s} {self.value:8.3f}   {sign} {self.target:<6g} {verdict}"
