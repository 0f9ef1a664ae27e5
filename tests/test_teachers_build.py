"""Kinds by name and import path, a user's own teacher, the check before training, fingerprints."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from teachers.build import TEACHERS, build_teacher, parse_teacher
from teachers.dry_run import dry_run
from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.fingerprint import teacher_fingerprint
from teachers.multi_scale import MultiScaleTeacher
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.tile import TileConfig
from tests.doubles import Patches

OWN = """
from torch import nn
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher, TeacherConfig


class ColourConfig(TeacherConfig):
    width: int = 4


class Colour(Teacher):
    Config = ColourConfig

    def __init__(self, config):
        spec = FeatureSpec(summary_dim=None, spatial_dim=config.width, patch_size=8,
                           resolution=(32, 32), any_resolution=True)
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        self.net = nn.Conv2d(3, config.width, 8, 8)

    def extract(self, images):
        return Features(None, self.net(images))
"""
TIMM = {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "none"}
_numbers = itertools.count()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a user's module in the current directory, which is not on the import path."""
    name = f"own_teachers_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield name
    sys.modules.pop(name, None)


def test_a_users_own_teacher_of_twenty_lines_is_built_by_its_import_path(own: str) -> None:
    assert len([line for line in OWN.splitlines() if line.strip()]) <= 20
    config = parse_teacher({"kind": f"{own}:Colour", "width": 6, "chunk_size": 2})
    teacher = build_teacher(config)
    dry_run(teacher)
    assert teacher(torch.rand(3, 3, 16, 40)).spatial.shape == (3, 6, 2, 5)
    assert teacher.chunk_size == 2  # though its constructor does not pass it on


def test_a_users_own_teacher_takes_an_upsampler_like_any_other(own: str) -> None:
    value = {"kind": f"{own}:Colour", "upsampler": {"kind": "tile", "factor": [2, 3]}}
    teacher = build_teacher(parse_teacher(value))
    assert isinstance(teacher, UpsampledTeacher)
    dry_run(teacher)
    assert teacher(torch.rand(1, 3, 64, 96)).spatial.shape == (1, 4, 8, 12)


def test_an_entry_survives_being_dumped_and_read_again() -> None:
    config = parse_teacher(TIMM | {"upsampler": {"kind": "tile", "factor": 2}})
    assert isinstance(config.upsampler, TileConfig)
    assert parse_teacher(config.model_dump()) == config
    assert parse_teacher(config) is config


@pytest.mark.parametrize(
    "value, message",
    [
        ({"kind": "siglipp"}, r"'siglipp' is unknown \(did you mean 'siglip'\?\); choose one of"),
        ({"model": "x"}, r"expected a teacher: a mapping with a kind, one of \['dfn_clip'"),
        ("siglip", "a mapping with a kind.*got 'siglip'"),
        ({"kind": "nowhere.at_all:X"}, "no module 'nowhere' in .* or on the import path"),
        ({"kind": "teachers.nowhere:X"}, "no module 'teachers.nowhere' in"),
        ({"kind": "teachers.timm_teacher:TimTeacher"}, r"no class 'TimTeacher' \(did you mean 'Ti"),
        ({"kind": "teachers.features:Features"}, "not a subclass of teachers.teacher.Teacher"),
        ({"kind": "teachers.teacher:Teacher"}, "lacks what every teacher must implement: extract"),
        (TIMM | {"modle": "x"}, r"modle: unknown key \(did you mean 'model'\?\); choose from"),
        ({"kind": "timm"}, "model: required"),
        (TIMM | {"chunk_size": 0}, "chunk_size: .*greater than 0, got 0"),
        (TIMM | {"upsampler": {"kind": "tile"}}, "upsampler: factor: required"),
        (TIMM | {"upsampler": {"kind": "tyle"}}, "upsampler: kind: 'tyle' is unknown.*'tile'"),
    ],
)
def test_a_wrong_entry_is_refused_in_words(value: object, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        parse_teacher(value)


def test_a_module_that_misses_another_one_says_which(own: str) -> None:
    Path(f"{own}.py").write_text("import no_such_library_anywhere")
    with pytest.raises(TeacherError, match=f"{own} cannot be imported: No module named 'no_such_l"):
        parse_teacher({"kind": f"{own}:Colour"})


def test_a_config_of_another_type_is_refused(own: str) -> None:
    Path(f"{own}.py").write_text(OWN.replace("Config = ColourConfig", "Config = dict"))
    with pytest.raises(TeacherError, match="Config must be a subclass of .*TeacherConfig.*dict"):
        parse_teacher({"kind": f"{own}:Colour"})


SPEC = FeatureSpec(
    summary_dim=None, spatial_dim=4, patch_size=8, resolution=(16, 16), any_resolution=True
)


class Good(Patches):
    """Passes the check; the classes below each break one promise."""

    def __init__(self) -> None:
        super().__init__(SPEC)


class NoSuper(Good):
    def __init__(self) -> None:
        nn.Module.__init__(self)


class OwnForward(Good):
    def forward(self, images: Tensor) -> Features:  # type: ignore[misc]
        return self.extract(images)


class WrongShape(Good):
    def extract(self, images: Tensor) -> Features:
        return Features(None, self.net(images)[:, :3])


class NoFeatures(Good):
    def extract(self, images: Tensor) -> Features:
        return self.net(images)


class Raises(Good):
    def extract(self, images: Tensor) -> Features:
        raise KeyError("oops")


class Random(Good):
    def extract(self, images: Tensor) -> Features:
        return Features(None, nn.functional.dropout(self.net(images)))


class OverBatch(Good):
    def extract(self, images: Tensor) -> Features:
        spatial = self.net(images)
        return Features(None, spatial - spatial.mean(0))


class Infinite(Good):
    def extract(self, images: Tensor) -> Features:
        return Features(None, self.net(images) / 0)


class Blind(Good):
    def extract(self, images: Tensor) -> Features:
        return Features(None, self.net(torch.ones_like(images)))


class Thawed(Good):
    def extract(self, images: Tensor) -> Features:
        self.requires_grad_(True)
        return super().extract(images)


class Waking(Good):
    def extract(self, images: Tensor) -> Features:
        self.net.train()
        return super().extract(images)


class Bytes(Good):
    mean_colour, std_colour = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)


@pytest.mark.parametrize(
    "kind, message",
    [
        (Bytes, r"Bytes: mean \(123.7.* for images in \[0, 1\].*by 255"),
        (NoSuper, "NoSuper has no spec: its __init__ must call super"),
        (OwnForward, "OwnForward overrides forward; implement extract only"),
        (WrongShape, r"WrongShape.extract returned a spatial of shape \(2, 3, 2, 3\).*by its spec"),
        (NoFeatures, "NoFeatures.extract returned a Tensor, not Features"),
        (Raises, r"Raises fails on images of shape \(2, 3, 16, 24\): KeyError: 'oops'"),
        (Random, "spatial of one image differs from call to call"),
        (OverBatch, "depends on the other images in its batch"),
        (Infinite, "spatial holds NaN or infinity"),
        (Blind, "two different images have the same map"),
        (Thawed, "Thawed is not frozen"),
        (Waking, "Waking is not in eval mode: net"),
    ],
)
def test_the_check_says_what_a_teacher_does_wrong(kind: type[Good], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        dry_run(kind())


def test_the_check_passes_a_good_teacher_and_costs_three_images() -> None:
    seen: list[int] = []

    class Counting(Good):
        def extract(self, images: Tensor) -> Features:
            seen.append(len(images))
            return super().extract(images)

    dry_run(Counting())
    assert sum(seen) == 3


@pytest.mark.long
def test_a_teacher_in_half_precision_keeps_norms_whole_and_returns_close_float32() -> None:
    images = torch.rand(2, 3, 224, 224)
    whole = build_teacher(parse_teacher(TIMM))
    half = build_teacher(parse_teacher(TIMM), dtype=torch.bfloat16)
    dry_run(half)
    blocks = half.network.blocks  # type: ignore[union-attr]
    assert blocks[0].attn.qkv.weight.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    assert blocks[0].norm1.weight.dtype == torch.float32  # type: ignore[index, union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's precision is not the teacher's
        due = whole(images).spatial
    torch.testing.assert_close(due, whole(images).spatial)
    came = half(images).spatial
    assert came.dtype == torch.float32
    assert 1e-5 < (came - due).norm() / due.norm() < 0.05


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(TeacherError, match="dtype: expected torch.float32.*got torch.int8"):
        Good().cast(torch.int8)


def test_a_fingerprint_is_stable_and_changes_with_all_that_features_depend_on() -> None:
    def name(**changes: object) -> str:
        return teacher_fingerprint(build_teacher(parse_teacher(TIMM | changes)))

    base = name()
    assert base == name(chunk_size=3)
    changed = build_teacher(parse_teacher(TIMM))
    weight = changed.network.blocks[5].mlp.fc1.weight  # type: ignore[index, union-attr]
    weight.data[0, 0] += 1e-4
    half = build_teacher(parse_teacher(TIMM), dtype=torch.bfloat16)
    names = {
        base,
        teacher_fingerprint(changed),
        teacher_fingerprint(half),
        name(features=-1),
        name(features=3),
        name(summary="pool"),
        name(upsampler={"kind": "tile", "factor": [1, 2]}),
        name(upsampler={"kind": "tile", "factor": [2, 1]}),
        name(upsampler={"kind": "bilinear", "factor": [2, 1]}),
    }
    assert len(names) == 9


def test_a_renamed_class_keeps_its_fingerprint_and_its_subclasses_have_their_own() -> None:
    class Renamed(Good):
        fingerprinted_as = f"{Good.__module__}.{Good.__qualname__}"

    class Derived(Renamed):
        pass

    def fingerprint(kind: type[Teacher]) -> str:
        torch.manual_seed(0)
        return teacher_fingerprint(kind())  # type: ignore[call-arg]

    assert fingerprint(Renamed) == fingerprint(Good) != fingerprint(Derived)


def test_classes_that_moved_are_fingerprinted_by_their_former_names() -> None:
    assert MultiScaleTeacher.fingerprinted_as == "teachers.matched.MatchedTeacher"
    assert TEACHERS.resolve("open_clip").fingerprinted_as.endswith("_tower.OpenClipTower")
    for kind, name in (("dfn_clip", "DFNCLIP"), ("siglip", "SigLIP")):
        found = TEACHERS.resolve(kind)
        assert f"{found.__module__}.{found.__name__}" == f"teachers.open_clip_teacher.{name}"
