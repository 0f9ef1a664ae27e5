"""The file of a trained upsampler: what it carries, whom it fits, and how a recipe names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from teachers.build import build_teacher, parse_teacher
from teachers.dry_run import dry_run
from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.fingerprint import teacher_fingerprint
from teachers.phi_s import FeatureStatistics, fit_phi_s
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.bilinear import Bilinear
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.downsampler import AttentionDownsampler
from teachers.upsamplers.standardised import Standardised
from teachers.upsamplers.trained import (
    FORMAT,
    TrainedUpsampler,
    UpsamplerCard,
    load_downsampler,
    load_upsampler,
    save_upsampler,
)
from teachers.upsamplers.upsampler import UpsamplerConfig

TIMM = {"kind": "timm", "model": "test_vit", "weights": "none", "resolution": [32, 32]}
FEATSHARP = {"kind": "featsharp", "factor": [2, 1], "num_heads": 4}
FACTOR = (2, 1)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return build_teacher(parse_teacher(TIMM))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))


def train(teacher: Teacher, entry: dict[str, Any], *, bias: bool = True) -> Standardised:
    """Random weights in the place of a training."""
    torch.manual_seed(0)
    config = parse_upsampler(entry)
    assert config is not None
    statistics = FeatureStatistics.zeros(teacher.spec.spatial_dim)
    statistics.update(torch.randn(300, teacher.spec.spatial_dim))
    inner = build_upsampler(config, teacher.spec)
    upsampler = Standardised(inner, fit_phi_s(statistics), bias=bias)
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.normal_(std=0.1)
    return upsampler.eval().requires_grad_(False)  # torch rounds otherwise where it is required


def card(teacher: Teacher, entry: dict[str, Any] = FEATSHARP, *, bias: bool = True) -> Any:
    return UpsamplerCard(
        upsampler=entry,
        bias=bias,
        spec=teacher.spec,
        teacher=TIMM,
        fingerprint=teacher_fingerprint(teacher),
        facts={"steps": 7},
    )


def downsampler(teacher: Teacher) -> AttentionDownsampler:
    torch.manual_seed(1)
    module = AttentionDownsampler(teacher.spec.spatial_dim, FACTOR)
    torch.nn.init.normal_(module.logit)
    return module


def tensors(teacher: Teacher, upsampler: Standardised) -> dict[str, Tensor]:
    along = downsampler(teacher).state_dict()
    return upsampler.state_dict() | {f"downsampler.{n}": t for n, t in along.items()}


@pytest.fixture
def saved(teacher: Teacher, tmp_path: Path) -> Path:
    """The file of a FeatSharp for `teacher`."""
    path = tmp_path / "upsampler.safetensors"
    save_upsampler(path, tensors(teacher, train(teacher, FEATSHARP)), card(teacher))
    return path


def rewritten(path: Path, **header: str) -> Path:
    with safe_open(path, framework="pt") as file:
        own = file.metadata()
    save_file(load_file(path), path, own | header)
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entry", [FEATSHARP, {"kind": "sapa", "factor": 2}], ids=str)
def test_a_loaded_upsampler_gives_the_same_bits_and_needs_no_encoder(
    entry: dict[str, Any], bias: bool, teacher: Teacher, images: Tensor, tmp_path: Path
) -> None:
    path, upsampler = tmp_path / "u.safetensors", train(teacher, entry, bias=bias)
    save_upsampler(path, upsampler.state_dict(), card(teacher, entry, bias=bias))
    loaded = load_upsampler(path)
    with torch.no_grad():
        due, came = upsampler(images, teacher), loaded(images, teacher)
    assert torch.equal(came.high.spatial, due.high.spatial)
    assert torch.equal(came.low.spatial, due.low.spatial)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["u.safetensors"]


def test_the_card_says_whose_it_is(saved: Path, teacher: Teacher) -> None:
    assert load_upsampler(saved).card == card(teacher)
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["holds"]) == ("pt", FORMAT)
    assert json.loads(header["card"])["upsampler"] == FEATSHARP


def test_half_precision_halves_the_weights_and_keeps_phi_s_and_the_downsampler(
    teacher: Teacher, images: Tensor, saved: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half.safetensors"
    upsampler = train(teacher, FEATSHARP)
    save_upsampler(half, tensors(teacher, upsampler), card(teacher), half=True)
    types = {name: t.dtype for name, t in load_file(half).items()}
    whole = {n for n, t in types.items() if t == torch.float32}
    assert whole == {n for n in types if n.startswith(("phi_s.", "downsampler."))}
    assert half.stat().st_size < 0.6 * saved.stat().st_size
    loaded = load_upsampler(half)
    assert all(t.dtype == torch.float32 for t in loaded.state_dict().values())
    with torch.no_grad():
        due, came = upsampler(images, teacher).high.spatial, loaded(images, teacher).high.spatial
    assert 0 < (came - due).norm() / due.norm() < 5e-3


def test_the_downsampler_it_learned_along_comes_back(saved: Path, teacher: Teacher) -> None:
    maps = torch.randn(2, teacher.spec.spatial_dim, 8, 4)
    views = torch.eye(3).expand(2, 1, 3, 3)
    assert torch.equal(load_downsampler(saved)(maps, views), downsampler(teacher)(maps, views))


class OwnConfig(UpsamplerConfig):
    kind: str = "tests.test_teachers_trained:Own"
    density: int


class Own(Bilinear):
    Config = OwnConfig

    @classmethod
    def from_config(cls, config: Any, spec: FeatureSpec) -> "Own":
        return cls(spec, (config.density, config.density))


def test_a_kind_of_a_users_own_may_call_its_factor_as_it_likes(
    teacher: Teacher, tmp_path: Path
) -> None:
    path, entry = tmp_path / "u.safetensors", {"kind": OwnConfig(density=2).kind, "density": 2}
    along = AttentionDownsampler(teacher.spec.spatial_dim, (2, 2)).state_dict()
    state = train(teacher, entry).state_dict()
    save_upsampler(
        path, state | {f"downsampler.{n}": t for n, t in along.items()}, card(teacher, entry)
    )
    assert load_upsampler(path).factor == load_downsampler(path).factor == (2, 2)


def test_a_file_without_a_downsampler_says_so(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "u.safetensors"
    save_upsampler(path, train(teacher, FEATSHARP).state_dict(), card(teacher))
    with pytest.raises(TeacherError, match=r"u\.safetensors: .*downsampler\.\w+ has .*None"):
        load_downsampler(path)


def test_another_spec_is_refused_with_the_first_difference(saved: Path) -> None:
    other = FeatureSpec(
        summary_dim=None, spatial_dim=64, patch_size=16, resolution=(64, 32), any_resolution=True
    )
    config = parse_upsampler(saved)
    assert config is not None
    with pytest.raises(TeacherError, match="trained for another encoder; its .* is .*, got .*"):
        build_upsampler(config, other)


def test_other_weights_of_the_same_shape_are_refused(saved: Path) -> None:
    loaded = load_upsampler(saved)
    with pytest.raises(TeacherError, match="other weights or options: .*got fingerprint"):
        loaded.check_encoder("f" * 64)
    loaded.check_encoder(loaded.card.fingerprint)


def test_a_recipe_that_gives_it_other_weights_is_refused(saved: Path, tmp_path: Path) -> None:
    changed = build_teacher(parse_teacher(TIMM))
    state = changed.network.state_dict()  # type: ignore[union-attr]
    first = next(name for name, t in state.items() if t.ndim > 1)
    state[first] = state[first] + 0.1
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "other.safetensors")
    entry = TIMM | {"weights": str(tmp_path / "other.safetensors"), "upsampler": str(saved)}
    with pytest.raises(TeacherError, match="same shape with other weights or options"):
        build_teacher(parse_teacher(entry))


def test_another_format_is_refused(saved: Path) -> None:
    rewritten(saved, holds="featsharp-distill upsampler 9")
    with pytest.raises(
        TeacherError, match="its format is 'featsharp-distill upsampler 9', expected"
    ):
        load_upsampler(saved)


@pytest.mark.parametrize("damage", ["{", "{}", '{"upsampler": 1}'])
def test_a_damaged_card_is_refused(saved: Path, damage: str) -> None:
    rewritten(saved, card=damage)
    with pytest.raises(TeacherError, match="not a valid upsampler file"):
        load_upsampler(saved)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", None])
def test_a_damaged_file_is_refused(saved: Path, content: bytes | None) -> None:
    saved.write_bytes(saved.read_bytes()[:-100] if content is None else content)
    with pytest.raises(TeacherError, match="not a valid upsampler file"):
        load_upsampler(saved)


def test_weights_that_do_not_fit_the_card_are_named(saved: Path) -> None:
    state = load_file(saved)
    state["bias.map"] = state["bias.map"][:, :1].contiguous()
    del state["inner.tile_position"]
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    save_file(state, saved, header)
    with pytest.raises(
        TeacherError, match=r"2 weights do not fit; bias\.map has shape \(64, 1, 2\), exp"
    ):
        load_upsampler(saved)


def test_a_file_whose_phi_s_was_never_fitted_is_refused(saved: Path) -> None:
    state = load_file(saved)
    state["phi_s.alpha"] = torch.zeros(())
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    save_file(state, saved, header)
    with pytest.raises(TeacherError, match="its PHI-S is not fitted"):
        load_upsampler(saved)


def test_a_missing_file_is_named_with_the_closest_there_is(saved: Path) -> None:
    near = saved.with_name("upsmpler.safetensors")
    with pytest.raises(TeacherError, match="no such file.*did you mean '.*upsampler.safetensors'"):
        load_upsampler(near)
    with pytest.raises(TeacherError, match="upsampler nowhere/at_all: there is no such file"):
        load_upsampler("nowhere/at_all")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_recipe_names_the_file_where_it_would_describe_an_upsampler(
    dtype: torch.dtype | None, saved: Path, teacher: Teacher, images: Tensor
) -> None:
    config = parse_teacher(TIMM | {"upsampler": str(saved)})
    assert parse_teacher(config.model_dump(mode="json")) == config
    built = build_teacher(config, dtype=dtype)
    assert isinstance(built, UpsampledTeacher)
    dry_run(built)
    with torch.no_grad():
        due = load_upsampler(saved)(images, teacher).high
    came = built(images)
    assert came.spatial.dtype == torch.float32
    assert came.spatial.shape == (2, 64, 4, 2)
    if dtype is None:
        assert torch.equal(came.spatial, due.spatial)
        return
    assert 1e-5 < (came.spatial - due.spatial).norm() / due.spatial.norm() < 0.05
    kinds = {name: p.dtype for name, p in built.named_parameters()}
    assert all(kinds[n] == torch.float32 for n in kinds if n.startswith("upsampler."))
    assert torch.bfloat16 in kinds.values()


def test_using_an_upsampled_teacher_does_not_change_its_fingerprint(
    saved: Path, images: Tensor
) -> None:
    built = build_teacher(parse_teacher(TIMM | {"upsampler": str(saved)}))
    before = teacher_fingerprint(built)
    built(images)
    assert teacher_fingerprint(built) == before


def test_weights_that_nobody_trained_are_refused_with_what_trains_them() -> None:
    with pytest.raises(
        TeacherError, match=r"upsampler: featsharp has weights to learn; train it with .*\.train_up"
    ):
        build_teacher(parse_teacher(TIMM | {"upsampler": FEATSHARP}))
    for entry in ({"kind": "bilinear", "factor": 2}, {"kind": "tile", "factor": 2}):
        build_teacher(parse_teacher(TIMM | {"upsampler": entry}))


@pytest.mark.parametrize("trained", [True, False])
def test_on_the_meta_device_shapes_alone_are_built(saved: Path, trained: bool) -> None:
    entry = TIMM | {"upsampler": str(saved) if trained else FEATSHARP}
    built = build_teacher(parse_teacher(entry), device="meta")
    assert all(p.is_meta for p in built.parameters())
    assert all(b.is_meta for b in built.buffers())
    assert built.spec.resolution == (64, 32)
    assert built.spec.grid(64, 32) == (4, 2)


def test_the_loaded_one_is_the_class_that_the_kind_names(saved: Path, teacher: Teacher) -> None:
    config = parse_upsampler({"kind": "trained", "path": str(saved)})
    assert config == parse_upsampler(saved)
    assert config is not None
    built = build_upsampler(config, teacher.spec)
    assert isinstance(built, TrainedUpsampler)
    assert built.path == saved
    assert isinstance(built(torch.rand(1, 3, 64, 32), teacher).high, Features)
