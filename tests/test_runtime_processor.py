"""What a recipe hears about bfloat16 on this machine's processor."""

import logging
from pathlib import Path

import pytest
import torch

from distill.engine.engine_config import EngineConfig
from distill.planning.run import print_plan
from distill.runtime import processor
from distill.runtime.config import dump_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.processor import (
    bf16_line,
    measured_precision,
    require_alike,
    warn_of_slow_bf16,
)
from distill.targets.source import TargetsConfig

BOTH = {"engine.precision": "bf16", "targets.precision": "bf16"}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("ratio", "expected"), [(0.5, "bf16"), (300.0, "fp32")])
def test_auto_is_what_is_faster_and_the_recipe_keeps_it(
    ratio: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "bf16_to_fp32", lambda: ratio)
    assert EngineConfig.model_validate({"precision": "auto"}).precision == expected
    assert TargetsConfig.model_validate({"precision": "auto"}).model_dump()["precision"] == expected
    assert measured_precision("bf16") == "bf16"


@pytest.mark.usefixtures("no_gpu")
def test_a_processor_without_it_is_told_with_the_keys(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processor, "bf16_to_fp32", lambda: 300.0)
    keys = "set engine.precision=fp32 targets.precision=fp32"
    with caplog.at_level(logging.WARNING, logger="distill"):
        warn_of_slow_bf16(BOTH)
        warn_of_slow_bf16({"engine.precision": "fp32"})
    assert [record.message for record in caplog.records] == [
        f"in bf16 this processor takes 300 times as long for a product as in fp32; {keys}"
    ]
    monkeypatch.setattr(processor, "bf16_to_fp32", lambda: 0.5)
    line = bf16_line(BOTH)
    assert line is not None
    assert "set" not in line


def test_ranks_that_auto_would_part_are_told() -> None:
    require_alike([BOTH, BOTH])
    other = {**BOTH, "targets.precision": "fp32"}
    message = (
        r"targets.precision: auto is bf16 on rank 0 and fp32 on rank 1, .*set targets.precisio"
    )
    with pytest.raises(RecipeError, match=message):
        require_alike([BOTH, other])


def test_the_measurement_gives_a_ratio() -> None:
    assert processor.bf16_to_fp32() > 0


@pytest.mark.usefixtures("no_gpu")
def test_a_plan_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processor, "bf16_to_fp32", lambda: 300.0)
    recipe = {
        "run": {"dir": "x", "steps": 9, "resolution": 32, "batch_size": 4},
        "data": {"sources": [{"shards": "x"}]},
        "teachers": {"expert": {"kind": "timm", "model": "test_vit", "weights": "none"}},
        "student": {"width": 32, "depth": 2, "heads": 2, "max_resolution": 64},
        "engine": {"precision": "bf16"},
    }
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    print_plan(tmp_path / "recipe.yaml", [], "h100", [1], 0.4)
    assert "300 times as long for a product as in fp32; set engine.precision=fp32\n" in (
        capsys.readouterr().out
    )
