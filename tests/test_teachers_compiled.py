"""What `compile_teacher` compiles, and that no feature changes; by Dynamo, without kernels."""

from functools import partial

import pytest
import torch

from teachers.build import build_teacher, parse_teacher
from teachers.compiled import compile_teacher
from teachers.fingerprint import teacher_fingerprint
from teachers.upsampled import UpsampledTeacher


@pytest.mark.long
def test_encoder_and_fusion_are_compiled_once_and_give_the_same_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []
    compile_it = partial(torch.compile, backend="eager")

    def counted(function, **options):
        compiled.append(f"{type(function.__self__).__name__}.{function.__name__}")
        return compile_it(function, **options)

    monkeypatch.setattr(torch, "compile", counted)
    entry = {
        "kind": "dfn_clip",
        "model": "clip_ti16_128",
        "upsampler": "clip_ti16_128_featsharp_2x",
    }
    teacher = build_teacher(parse_teacher(entry))
    assert isinstance(teacher, UpsampledTeacher)
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    due, fingerprint = teacher(images), teacher_fingerprint(teacher)
    assert compile_teacher(teacher) is teacher
    assert sorted(compiled) == ["DFNCLIP.extract", "FusionBlock._call_impl"]
    came = teacher(images)
    torch.testing.assert_close(came, due)
    assert teacher_fingerprint(teacher) == fingerprint
