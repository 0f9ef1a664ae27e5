"""Students that are networks of timm: shapes, who reads what, normalisation, refusals, files."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from student.config import HeadConfig, StudentConfig, StudentInit
from student.errors import StudentError
from student.initial import build as build_initial
from student.model import Student, StudentOutput
from student.storage import load_student, read_header, save_student
from student.timm_config import TimmStudentConfig
from student.timm_trunk import TimmTrunk
from teachers.features import FeatureSpec

TARGETS = {
    "clip": FeatureSpec(summary_dim=5, spatial_dim=6, patch_size=16, resolution=(32, 32)),
    "sam": FeatureSpec(summary_dim=None, spatial_dim=7, patch_size=14, resolution=(28, 28)),
}
HEAD = HeadConfig(hidden_dim=8, num_layers=1)
CNNS = ("test_convnext", "test_resnet", "test_efficientnet")
SWIN = "swin_tiny_patch4_window7_224"


def config(model: str = "test_convnext", **changes: object) -> TimmStudentConfig:
    return TimmStudentConfig(**({"model": model, "head": HEAD} | changes))


def build(
    model: str = "test_convnext",
    targets: Mapping[str, FeatureSpec] = TARGETS,
    **changes: object,
) -> Student:
    torch.manual_seed(0)
    return Student(config(model, **changes), targets)


def tensors(output: StudentOutput) -> list[Tensor]:
    pairs = [output.backbone, *output.heads.values()]
    return [t for pair in pairs for t in pair if t is not None]


@pytest.fixture(scope="module")
def swin() -> Student:
    """Slow to build, for all tests."""
    return build(SWIN).eval()


@pytest.mark.parametrize("model", [*CNNS, "test_vit"])
def test_outputs_are_maps_on_the_heads_grids(model: str) -> None:
    student = build(model)
    stride = 16 if model == "test_vit" else 32
    assert student.spec.patch_size == stride
    output = student(torch.rand(2, 3, 64, 96))
    assert output.backbone.spatial.shape == (
        2,
        student.spec.spatial_dim,
        64 // stride,
        96 // stride,
    )
    assert output.backbone.summary.shape == (2, student.spec.summary_dim)
    # Of teachers of 16 and of 14 px patches: cells of 16 px.
    assert output.heads["clip"].spatial.shape == (2, 6, 4, 6)
    assert output.heads["sam"].spatial.shape == (2, 7, 4, 6)
    assert output.heads["clip"].summary.shape == (2, 5)
    assert output.heads["sam"].summary is None
    assert {t.dtype for t in tensors(output)} == {torch.float32}


@pytest.mark.parametrize("model", CNNS)
def test_it_is_timms_network_on_normalised_images(model: str) -> None:
    student, images = build(model).eval(), torch.rand(2, 3, 64, 96)
    plain = timm.create_model(model, num_classes=0).eval()
    plain.load_state_dict(student.trunk.network.state_dict())
    mean, std = (torch.tensor(plain.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    inputs = (images - mean) / std
    maps = plain.forward_intermediates(inputs, intermediates_only=True)
    torch.testing.assert_close(student(images).backbone.spatial, maps[-1])
    torch.testing.assert_close(student(images).backbone.summary, plain(inputs))
    assert student.config.mean == plain.pretrained_cfg["mean"]


@pytest.mark.parametrize("model", CNNS)
def test_intermediates_are_a_pyramid_that_ends_with_the_map(model: str) -> None:
    student, images = build(model).eval(), torch.rand(1, 3, 64, 96)
    count = student.trunk.num_layers
    maps = student.forward_intermediates(images, range(count))
    assert [64 // m.shape[2] for m in maps] == [2, 4, 8, 16, 32][-count:]
    assert [96 // m.shape[3] for m in maps] == [2, 4, 8, 16, 32][-count:]
    assert torch.equal(maps[-1], student(images).backbone.spatial)
    assert torch.equal(student.forward_intermediates(images, [1])[0], maps[1])
    with pytest.raises(StudentError, match=f"no level {count}; it has levels 0 to {count - 1}"):
        student.forward_intermediates(images, [count])


@pytest.mark.long
def test_maps_of_networks_with_channels_last_are_channels_first(swin: Student) -> None:
    maps = swin.forward_intermediates(torch.rand(1, 3, 64, 96), range(4))
    shapes = [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    assert swin(torch.rand(1, 3, 96, 64)).backbone.spatial.shape == (1, 768, 3, 2)


def test_a_stated_level_is_the_map_and_the_summary_stays_that_of_the_last() -> None:
    student, images = build(level=-2).eval(), torch.rand(2, 3, 48, 80)
    assert student.spec.patch_size == 16
    output = student(images)
    assert output.backbone.spatial.shape == (2, 48, 3, 5)
    assert torch.equal(output.backbone.spatial, student.forward_intermediates(images, [2])[0])
    assert output.backbone.summary.shape == (2, 64)
    assert student.config.head.upsample == {"clip": 1, "sam": 1}


def test_the_upsampling_of_a_head_can_be_stated() -> None:
    head = HEAD.model_copy(update={"upsample": {"clip": 4}})
    output = build(head=head)(torch.rand(1, 3, 32, 64))
    assert output.heads["clip"].spatial.shape == (1, 6, 4, 8)
    assert output.heads["sam"].spatial.shape == (1, 7, 2, 4)


@pytest.mark.parametrize(
    ("patch", "due"), [(4, 8), (8, 4), (14, 2), (16, 2), (24, 1), (32, 1), (64, 1)]
)
def test_upsampling_gives_the_cells_nearest_to_the_teachers(patch: int, due: int) -> None:
    target = FeatureSpec(
        summary_dim=None, spatial_dim=4, patch_size=patch, resolution=(patch, patch)
    )
    assert config().upsampling("t", target) == due
    assert config().cell_size("t", target) == 32 // due


@pytest.mark.parametrize("model", [*CNNS, "test_vit"])
@pytest.mark.parametrize("level", [None, -2])
@pytest.mark.parametrize("with_summary", [True, False])
def test_every_parameter_gets_a_gradient(model: str, level: int | None, with_summary: bool) -> None:
    targets = TARGETS if with_summary else {"sam": TARGETS["sam"]}
    student = build(model, targets, level=level)
    output = student(torch.rand(2, 3, 64, 96))
    assert (output.backbone.summary is not None) == with_summary
    sum((t**2).sum() for t in tensors(output)[1 + with_summary :]).backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("model", ["test_convnext", "test_resnet"])
def test_activation_checkpointing_changes_no_output_gradient_or_statistic(model: str) -> None:
    images, results = torch.rand(4, 3, 64, 64), []
    for on in (False, True):
        student = build(model, activation_checkpointing=on).train()
        calls = []
        blocks = [m for m in student.trunk.modules() if type(m).__name__.endswith("Block")]
        (blocks or [*student.trunk.modules()])[-1].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        output = tensors(student(images))
        sum((t**2).sum() for t in output).backward()
        assert len(calls) == (2 if on else 1)
        results.append([*output, *(p.grad for p in student.parameters()), *student.buffers()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_batch_norms_use_the_batch_in_training_and_running_statistics_in_evaluation() -> None:
    student, images = build("test_resnet").train(), torch.rand(4, 3, 64, 64)
    before = {n: b.clone() for n, b in student.named_buffers()}
    student(images)
    moved = [n for n, b in student.named_buffers() if not torch.equal(b, before[n])]
    assert sorted(moved) == sorted(before)
    student.eval()
    alone = student(images[:1])
    for one, many in zip(tensors(alone), tensors(student(images)), strict=True):
        torch.testing.assert_close(one, many[:1], atol=1e-4, rtol=1e-4)


def test_drop_path_is_drawn_in_training_only() -> None:
    student, images = build(drop_path=0.5), torch.rand(4, 3, 32, 32)
    plain = build()
    plain.load_state_dict(student.state_dict())
    assert not torch.equal(student.train()(images).backbone.spatial, plain(images).backbone.spatial)
    assert torch.equal(student.eval()(images).backbone.spatial, plain(images).backbone.spatial)


def test_positions_are_not_decayed() -> None:
    names = {f"trunk.network.{name}" for name in ("pos_embed", "cls_token")}
    assert names <= build("test_vit").no_weight_decay()
    assert build().no_weight_decay() == set()


def test_files_hold_the_whole_student(tmp_path: Path) -> None:
    student, images = build("test_resnet"), torch.rand(2, 3, 64, 96)
    student.train()(images)  # moves the running statistics
    student.eval()
    path = tmp_path / "student.safetensors"
    stated = student.config.model_copy(update={"weights": "hub"})
    save_student(path, stated, student.targets, student.state_dict(), {})
    loaded = load_student(path)
    for one, two in zip(tensors(student(images)), tensors(loaded(images)), strict=True):
        assert torch.equal(one, two)
    header = read_header(path)
    assert isinstance(header.config, TimmStudentConfig)
    assert header.config.weights == "none"
    assert header.config.head.upsample == {"clip": 2, "sam": 2}
    assert isinstance(loaded.trunk, TimmTrunk)


@pytest.mark.long
def test_tables_that_no_file_holds_are_computed_again(swin: Student, tmp_path: Path) -> None:
    path, images = tmp_path / "student.safetensors", torch.rand(1, 3, 64, 96)
    save_student(path, swin.config, swin.targets, swin.state_dict(), {})
    assert torch.equal(load_student(path)(images).backbone.spatial, swin(images).backbone.spatial)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "convnext_attoo"}, "no model 'convnext_attoo' .did you mean 'convnext_atto'"),
        ({"model": "test_vit.none"}, "no tag of 'test_vit.none'.*choose one of test_vit.r160_in1k"),
        ({"model": "maxvit_nano_rw_256"}, "takes images of some sizes only"),
        ({"level": 4}, "no level 4; it has 0 to 3 .strides 4, 8, 16, 32"),
        ({"level": -5}, "no level -5"),
        ({"num_registers": 2}, "num_registers: only for kind: vit"),
        ({"windows": {}, "isolated": ["clip"]}, "windows, isolated: only for kind: vit"),
        ({"position_dropout": 0.1}, "position_dropout: only for kind: vit"),
        ({"init": {"kind": "timm", "model": "x"}}, "init: kind: timm .*give weights"),
        ({"init": StudentInit(kind="student", path="x"), "weights": "hub"}, "set only one"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std must be set together"),
        (
            {"head": HeadConfig(attention_blocks=1, attention_heads=7)},
            "64 channels do not divide into 7 heads; use a divisor",
        ),
        ({"model": "vgg11", "drop_path": 0.1, "level": 0}, None),
    ],
)
def test_mistakes_are_refused_by_their_key(changes: dict[str, object], message: str | None) -> None:
    if message is None:
        with pytest.raises(StudentError, match="drop_path: timm's 'vgg11'"):
            build(**changes)
        return
    with pytest.raises(ValidationError, match=message):
        config(**changes)


@pytest.mark.parametrize("key", ["model", "weights", "level", "drop_path"])
def test_a_vit_refuses_the_options_of_the_other_kind(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key}: only for kind: timm"):
        StudentConfig(**{key: 1})


def test_files_of_vits_are_as_they_were() -> None:
    assert "kind" not in StudentConfig().model_dump()
    assert config().model_dump()["kind"] == "timm"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((1, 3, 40, 64), "multiples of 32 px; the nearest size is 32 x 64"),
        ((1, 1, 64, 64), "expected .B, 3, H, W"),
    ],
)
def test_other_sizes_are_refused(images: tuple[int, ...], message: str) -> None:
    with pytest.raises(StudentError, match=message):
        build()(torch.rand(*images))


def test_images_smaller_than_a_cell_of_the_last_level_are_refused() -> None:
    with pytest.raises(StudentError, match="has cells of 32 px"):
        build(level=-2)(torch.rand(1, 3, 16, 32))


def test_a_batch_without_statistics_is_refused() -> None:
    student = build("test_resnet").train()
    with pytest.raises(StudentError, match=r"one value of a channel.*run.micro_batch_size"):
        student(torch.rand(1, 3, 32, 32))


def test_windows_are_refused() -> None:
    with pytest.raises(StudentError, match="window: .* kind: vit"):
        build()(torch.rand(1, 3, 64, 64), window=2)


class TestWeights:
    """Initial weights: a file, the hub, another student."""

    @staticmethod
    def file(folder: Path, model: str = "test_resnet", **options: object) -> tuple[Path, nn.Module]:
        torch.manual_seed(1)
        source = timm.create_model(model, **options).eval()
        path = folder / "model.safetensors"
        save_file(source.state_dict(), path)
        return path, source

    @pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"num_classes": 7}])
    def test_a_file_of_timm_is_loaded_with_or_without_classifier(
        self, tmp_path: Path, options: dict[str, object]
    ) -> None:
        path, source = self.file(tmp_path, **options)
        student = build_initial(config("test_resnet", weights=path), TARGETS)
        for name, value in student.trunk.network.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name

    def test_a_file_of_another_network_is_refused(self, tmp_path: Path) -> None:
        path, _ = self.file(tmp_path, "test_efficientnet")
        with pytest.raises(StudentError, match="student.weights: .* is for another model"):
            build_initial(config("test_resnet", weights=path), TARGETS)

    def test_a_missing_file_and_the_hub_without_network_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(StudentError, match="student.weights: .* no such file"):
            build_initial(config(weights=tmp_path / "none"), TARGETS)

    def test_a_level_without_summary_takes_what_it_needs(self, tmp_path: Path) -> None:
        path, source = self.file(tmp_path)
        sam = {"sam": TARGETS["sam"]}
        student = build_initial(config("test_resnet", level=2, weights=path), sam)
        state = student.trunk.network.state_dict()
        assert 0 < len(state) < len(source.state_dict())
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in state.items())

    def test_a_trained_student_is_a_start(self, tmp_path: Path) -> None:
        trained = build("test_resnet")
        path = tmp_path / "student.safetensors"
        save_student(path, trained.config, trained.targets, trained.state_dict(), {})
        init = StudentInit(kind="student", path=path)
        new = TARGETS | {"new": TARGETS["clip"]}
        torch.manual_seed(2)
        student = build_initial(config("test_resnet", init=init), new)
        ours, theirs = student.state_dict(), trained.state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        with pytest.raises(
            StudentError, match=r"model test_resnet and level 4.*set student\.model"
        ):
            build_initial(config("test_convnext", init=init), new)
        with pytest.raises(StudentError, match="is of kind: timm, but the student of kind: vit"):
            build_initial(StudentConfig(size="tiny", depth=1, init=init), new)
