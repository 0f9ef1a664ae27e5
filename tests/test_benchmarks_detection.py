"""Detection on frozen maps: strides, shared batches, and AP on a set that is easy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.errors import DataError
from data.labelled.detection import CocoLayout
from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.detection import detection_training
from distill.benchmarks.detection.detection_training import (
    DetectorTrainingConfig,
    add_gradients,
    batch_loss,
    fit_image,
    train_detector,
    training_draws,
)
from distill.benchmarks.detection.detector import (
    CellAnchors,
    LayerPyramid,
    Level,
    Pyramid,
    build_detector,
    levels_of,
    pyramid_levels,
    source_maps,
)
from distill.benchmarks.sharing import own_share
from distill.engine.optimizer import build_optimizer
from distill.evaluation.models import Pixels, PixelsConfig
from distill.evaluation.suite import SuiteRecipe
from distill.runtime.config import load_recipe
from distill.runtime.errors import RecipeError
from distill.tasks.student_encoder import StudentEncoder
from student.config import HeadConfig
from student.model import Student
from student.timm_config import TimmStudentConfig
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.bilinear import Bilinear
from tests.doubles import SPEC, Curved
from tests.ranks import run_on_ranks
from tests.shapes import write_shapes

SIZE = (64, 64)
FAST = {"channels": 32, "batch_size": 4, "optimizer": {"lr": 3e-3}, "schedule": {"warmup_steps": 9}}


def colours() -> Pixels:
    return Pixels(PixelsConfig(patch_size=8, resolution=SIZE))


def pyramid_encoder(
    model: str = "test_convnext",
    *,
    level: int | None = None,
    summary_dim: int | None = 4,
    head: str | None = None,
) -> StudentEncoder:
    torch.manual_seed(0)
    spec = FeatureSpec(summary_dim=summary_dim, spatial_dim=3, patch_size=16, resolution=(64, 64))
    sizes = HeadConfig(hidden_dim=8, num_layers=0)
    config = TimmStudentConfig(model=model, level=level, head=sizes)
    return StudentEncoder(Student(config, {"t": spec}), head=head)


def measured(root: Path, folder: Path, encoder: Teacher, **changes: Any) -> Measurement:
    folder.mkdir(exist_ok=True)
    entry = {"kind": "detection", "dataset": {"root": root}, **FAST, **changes}
    return build_benchmark(parse_benchmark(entry)).measure(encoder, 0, folder)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", 32, 13)


# The pyramid


@pytest.mark.parametrize(
    "image, grid, doublings, finest",
    [
        ((512, 512), (32, 32), [2, 1, 0, -1], 4.0),  # 16 px
        ((448, 448), (32, 32), [2, 1, 0, -1], 3.5),  # 14 px
        ((256, 256), (32, 32), [1, 0, -1, -2], 4.0),  # 8 px
        ((224, 224), (7, 7), [3, 2, 1, 0], 4.0),  # 32 px
        ((1152, 1152), (81, 81), [2, 1, 0, -1], 1152 / 324),  # nine tiles of 384 px, 14 px patches
    ],
)
def test_strides_come_near_4_to_32(
    image: tuple[int, int], grid: tuple[int, int], doublings: list[int], finest: float
) -> None:
    levels = pyramid_levels(image, grid)
    assert [level.doublings for level in levels] == doublings
    assert [level.cell for level in levels] == [
        pytest.approx((finest * 2**i, finest * 2**i)) for i in range(4)
    ]


def test_heights_and_widths_of_cells_are_apart() -> None:
    levels = pyramid_levels((48, 96), (3, 8))
    assert levels[0] == Level(2, (4, 3))


def test_every_level_has_the_cells_that_its_doublings_say() -> None:
    levels = [Level(d, (1, 1)) for d in (3, 2, 1, 0, -1, -2)]
    pyramid = Pyramid(torch.zeros(5), torch.ones(5), levels, channels=32)
    maps = pyramid(torch.rand(2, 5, 5, 7))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (32, 40, 56),
        (32, 20, 28),
        (32, 10, 14),
        (32, 5, 7),
        (32, 3, 4),
        (32, 2, 2),
    ]


def test_a_levels_cell_sees_the_same_place_of_the_map() -> None:
    """A change in one corner of the map changes each level there, and not in the other corner."""
    torch.manual_seed(0)
    levels = pyramid_levels((256, 256), (16, 16))
    pyramid = Pyramid(torch.zeros(5), torch.ones(5), levels, channels=32)
    maps = torch.rand(1, 5, 16, 16)
    changed = maps.clone()
    changed[..., :2, 14:] += 1
    for before, after in zip(pyramid(maps), pyramid(changed), strict=True):
        differs = (before != after).any(1)[0]
        h, w = differs.shape
        assert differs[: h // 8, 7 * w // 8 :].all()
        assert not differs[h // 2 :].any()
        assert not differs[:, : w // 2].any()


def test_scale_and_offset_of_an_encoders_channels_do_not_matter() -> None:
    maps = torch.rand(1, 5, 4, 4)
    scale, offset = torch.tensor([1e-3, 1, 1e3, 5, 0.1]), torch.tensor([0, 9, -1e3, 0, 1])
    pyramids = []
    for mean, deviation in ((torch.zeros(5), torch.ones(5)), (offset, scale)):
        torch.manual_seed(0)
        pyramids.append(Pyramid(mean, deviation, [Level(1, (8, 8))], channels=32))
    moved = maps * scale.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)
    torch.testing.assert_close(pyramids[0](maps)[0], pyramids[1](moved)[0], atol=1e-3, rtol=1e-3)


def test_the_boxes_of_cells_tile_the_image() -> None:
    levels = [Level(0, (14.5, 10.0)), Level(-1, (29.0, 20.0))]
    maps = [torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 2, 3)]
    sizes = type("Sizes", (), {"image_sizes": [(58, 60)] * 2})
    first, second = CellAnchors(levels)(sizes, maps)  # type: ignore[arg-type]
    assert torch.equal(first, second)
    assert first[0].tolist() == [0, 0, 10, 14.5]
    assert first[23].tolist() == [50, 43.5, 60, 58]
    assert first[24].tolist() == [0, 0, 20, 29]
    assert (first[:, 2:] - first[:, :2]).prod(1)[:24].sum() == 58 * 60


def test_an_upsampled_encoder_gives_denser_levels_over_its_larger_image() -> None:
    encoder = UpsampledTeacher(Curved(), Bilinear(SPEC, (2, 2)))
    assert encoder.spec.resolution == (24, 40)
    detector = build_detector(
        encoder,
        [(torch.zeros(8), torch.ones(8))],
        size=encoder.spec.resolution,
        num_classes=2,
        channels=32,
        seed=0,
    )
    maps = detector.backbone(torch.rand(1, 3, 24, 40))
    assert [tuple(m.shape[-2:]) for m in maps.values()] == [(6, 10), (3, 5), (2, 3), (1, 2)]
    assert [c[0] for c in detector.anchor_generator.cells] == [4, 8, 16, 32]


def test_a_students_levels_are_the_pyramid() -> None:
    """No level is made of another: a change in one layer changes one level."""
    encoder = pyramid_encoder()
    assert encoder.strides == (4, 8, 16, 32)
    levels = levels_of(encoder, (64, 96))
    assert [(level.source, level.doublings) for level in levels] == [(i, 0) for i in range(4)]
    assert [level.cell for level in levels] == [(s, s) for s in (4, 8, 16, 32)]
    maps = source_maps(encoder, torch.rand(1, 3, 64, 96), levels)
    pyramid = LayerPyramid(
        [(torch.zeros(m.shape[1]), torch.ones(m.shape[1])) for m in maps], levels, 32
    )
    before = pyramid(maps)
    assert [tuple(m.shape[1:]) for m in before] == [(32, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    after = pyramid([maps[0], maps[1] + 1, *maps[2:]])
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [True, False, True, True]


def test_levels_that_a_student_lacks_come_from_the_nearest() -> None:
    """Of a student that ends at stride 16: no teacher of it has a summary."""
    encoder = pyramid_encoder(level=2, summary_dim=None)
    assert encoder.strides == (4, 8, 16)
    levels = levels_of(encoder, (64, 96))
    assert [(level.source, level.doublings) for level in levels] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (2, -1),
    ]
    assert levels[-1].cell == (32, 32)


def test_of_layers_of_one_stride_the_last_is_taken() -> None:
    encoder = pyramid_encoder("test_efficientnet")
    assert encoder.strides == (2, 4, 8, 16, 32)
    assert [level.source for level in levels_of(encoder, (64, 64))] == [1, 2, 3, 4]
    encoder.strides = (4, 4, 8, 8, 16)
    assert [level.source for level in levels_of(encoder, (64, 64))] == [1, 3, 4, 4]


def test_a_head_and_a_vit_have_one_map() -> None:
    assert pyramid_encoder(head="t").strides == ()
    assert pyramid_encoder("test_vit").strides == ()


def test_a_detector_trains_on_the_levels(shapes: Path, tmp_path: Path) -> None:
    found = measured(shapes, tmp_path / "out", pyramid_encoder(), steps=2, size=(64, 96))
    assert found.protocol["detector"] == (
        "FCOS on the encoder's layers of strides (4, 8, 16, 32), encoder frozen"
    )
    assert found.protocol["cells_px"] == [[s, s] for s in (4, 8, 16, 32)]


# Training


def test_every_image_comes_once_a_pass_and_batches_are_full() -> None:
    config = DetectorTrainingConfig(steps=5, batch_size=4, flip=0.5)
    draws = training_draws(7, config, seed=3)
    assert len(draws) == 20
    numbers = [number for number, _ in draws]
    assert sorted(numbers[:7]) == sorted(numbers[7:14]) == list(range(7))
    assert {flipped for _, flipped in draws} == {True, False}
    assert draws == training_draws(7, config, seed=3)
    assert draws != training_draws(7, config, seed=4)


def test_crowds_and_empty_boxes_do_not_train(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", 1, 1)
    path = root / "annotations" / "instances_train2017.json"
    tree = json.loads(path.read_text())
    first, second = tree["annotations"]
    first["iscrowd"] = 1
    tree["annotations"] += [{**second, "id": 9, "bbox": [5, 5, 0, 4]}]
    path.write_text(json.dumps(tree))
    fitted = fit_image(CocoLayout(root=root).load("train").images[0], SIZE, flipped=False)
    left, top, width, height = second["bbox"]
    assert fitted.boxes.tolist() == [
        pytest.approx([left * 2 / 3, top * 2 / 3, (left + width) * 2 / 3, (top + height) * 2 / 3])
    ]


def test_images_without_objects_train(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", 2, 1)
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    train = CocoLayout(root=root).load("train")
    config = DetectorTrainingConfig.model_validate({**FAST, "steps": 2})
    detector = train_detector(colours(), train, SIZE, config, seed=0)
    loss = batch_loss(detector, [fit_image(image, SIZE, False) for image in train.images])
    assert loss.isfinite()
    assert float(loss.detach()) > 0


def test_the_rate_falls_every_step_to_almost_nothing(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(detection_training, "build_optimizer", watched)
    changes = {"steps": 8, "batch_size": 1, "schedule": {"warmup_steps": 2}}
    config = DetectorTrainingConfig.model_validate({**FAST, **changes})
    train = CocoLayout(root=shapes).load("train")
    train_detector(colours(), train, SIZE, config, seed=0)
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[2:] == sorted(set(rates[2:]), reverse=True)
    assert len(rates) == 8
    assert 0 < rates[-1] < 3e-4


def test_the_encoder_stays_as_it_is(shapes: Path) -> None:
    encoder = Curved()
    before = [p.clone() for p in encoder.parameters()]
    config = DetectorTrainingConfig.model_validate({**FAST, "steps": 2})
    train = CocoLayout(root=shapes).load("train")
    detector = train_detector(encoder, train, SPEC.resolution, config, seed=0)
    assert not encoder.training
    assert all(map(torch.equal, before, encoder.parameters()))
    trained = {name.split(".")[0] for name, p in detector.named_parameters() if p.requires_grad}
    assert trained == {"backbone", "head"}
    assert not any(p.requires_grad for p in detector.backbone.encoder.parameters())


def test_maps_are_standardised_by_training_images(shapes: Path) -> None:
    config = DetectorTrainingConfig.model_validate({**FAST, "steps": 1, "statistics_images": 5})
    train = CocoLayout(root=shapes).load("train")
    train = train._replace(images=train.images[:5])
    pyramid = train_detector(colours(), train, SIZE, config, seed=0).backbone.pyramid
    pixels = torch.stack([fit_image(i, SIZE, False).pixels for i in train.images]).double() / 255
    cells = nn.functional.avg_pool2d((pixels - 0.5) / 0.25, 8).transpose(0, 1).flatten(1)
    torch.testing.assert_close(pyramid.mean.flatten().double(), cells.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        pyramid.deviation.flatten().double(), cells.std(1, correction=0), atol=1e-5, rtol=0
    )


def test_the_seed_decides_the_detector(shapes: Path) -> None:
    config = DetectorTrainingConfig.model_validate({**FAST, "steps": 3})
    train = CocoLayout(root=shapes).load("train")
    first, again, other = (
        nn.utils.parameters_to_vector(
            train_detector(colours(), train, SIZE, config, seed).parameters()
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_torchs_own_randomness_is_left_alone(shapes: Path) -> None:
    state = torch.get_rng_state()
    config = DetectorTrainingConfig.model_validate({**FAST, "steps": 1})
    train_detector(colours(), CocoLayout(root=shapes).load("train"), SIZE, config, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def gradients(root: Path) -> list[Tensor]:
    """Those of one batch of seven, uneven over two ranks, after one detector's build."""
    train = CocoLayout(root=root).load("train")
    detector = build_detector(
        colours(),
        [(torch.zeros(3), torch.ones(3))],
        size=SIZE,
        num_classes=2,
        channels=32,
        seed=0,
    ).train()
    batch = [fit_image(train.images[i], SIZE, flipped=bool(i % 2)) for i in own_share(7)]
    batch_loss(detector, batch).backward()
    add_gradients(detector)
    return [p.grad for p in detector.parameters() if p.grad is not None]


def shared_work(root: Path, folder: Path) -> tuple[list[Tensor], dict[str, float]]:
    return gradients(root), measured(root, folder, colours(), steps=12).metrics


@pytest.mark.process
def test_two_ranks_have_one_ranks_gradients_and_figures(shapes: Path, tmp_path: Path) -> None:
    """Thirteen test images and passes of four: the last is not full, on either number of ranks."""
    due, due_figures = shared_work(shapes, tmp_path)
    (first, figures), (second, same_figures) = run_on_ranks(2, shared_work, shapes, tmp_path)
    for whole, one, two in zip(due, first, second, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, whole, atol=1e-5, rtol=1e-3)
    assert figures == same_figures
    assert figures == pytest.approx(due_figures, abs=0.5)


# The benchmark


@pytest.mark.long
def test_ap_on_an_easy_set_rises_well_above_zero(shapes: Path, tmp_path: Path) -> None:
    fresh = measured(shapes, tmp_path, colours(), steps=1).metrics
    trained, protocol = measured(shapes, tmp_path, colours(), steps=70)
    assert fresh["ap"] < 5
    assert trained["ap"] > 35
    assert trained["ap50"] > 80
    assert next(iter(trained)) == "ap"
    assert (protocol["grid"], protocol["test_objects"]) == ([8, 8], 26)
    assert Image.open(tmp_path / "detections.png").width == 640


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"size": [60, 64]}, TeacherError, r"size: images of 60 x 64 px.*multiples of 8 px"),
        ({"channels": 48}, TeacherError, "channels: .*multiple of 32"),
        ({"dataset": {"root": "nowhere"}}, DataError, r"no nowhere/train2017; expected"),
        ({"dataset": {"root": "x", "kind": "voc"}}, TeacherError, "dataset.kind: .*'coco'"),
        ({"step": 3}, TeacherError, "step: unknown key .did you mean 'steps'"),
    ],
)
def test_a_users_mistake_is_named(
    shapes: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        measured(shapes, tmp_path, colours(), **{"steps": 1, **changes})


def test_classes_have_to_be_those_that_trained(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "set", 1, 1)
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("disc", "ball"))
    with pytest.raises(DataError, match="training and test images have different classes"):
        measured(root, tmp_path, colours(), steps=1)


def test_a_batch_smaller_than_the_ranks_is_refused(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(RecipeError, match="batch_size: expected .* each of 8 ranks, got 4"):
        measured(shapes, tmp_path, colours(), steps=1)


def test_a_loss_that_is_not_finite_ends_the_run(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"the detector's loss is nan at step .*1e\+20"):
        measured(shapes, tmp_path, colours(), steps=9, optimizer={"lr": 1e20})


def test_the_recipe_measures_the_encoder_with_and_without_an_upsampler() -> None:
    recipe = load_recipe(SuiteRecipe, Path("recipes/evaluation/detection.yaml"), [])
    (entry,) = recipe.benchmarks.values()
    defaults = parse_benchmark({"kind": "detection", "dataset": {"root": "datasets/coco"}})
    assert entry == defaults
    upsamplers = [model.upsampler for model in recipe.models.values()]
    assert [u is None for u in upsamplers] == [True, False, False]
