"""The experiments of tests/quality differ from the product in what they say, and in no more."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import squeezenet1_0

from distill.evaluation.comparison import ComparisonRecipe
from distill.runtime.config import load_recipe
from distill.tasks.student_recipe import load_student_recipe
from teachers.build import build_teacher, parse_teacher
from teachers.features import Features, FeatureSpec
from teachers.testing import check_teacher
from teachers.upsamplers.downsampler import AttentionDownsampler
from teachers.upsamplers.featup import FeatUp
from tests.quality.aliased import OffCentre
from tests.quality.mode_switch import RECIPE, STUDENTS, overrides
from tests.quality.seven_taps import TAPS, SevenTaps, SevenTapsLevel
from tests.tiny_run import REPOSITORY


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The recipe entry of one with random weights."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet.npz"
    weights = squeezenet1_0().state_dict()
    np.savez(path, **{name: value.half().numpy() for name, value in weights.items()})
    return {"kind": "tests.quality.squeezenet:SqueezeNet", "weights": str(path)}


@pytest.mark.long
def test_squeezenet_is_a_teacher_with_a_cell_for_16_px_at_any_size(
    squeezenet: dict[str, str],
) -> None:
    teacher = build_teacher(parse_teacher(squeezenet))
    check_teacher(teacher)
    for size in ((224, 224), (48, 80), (128, 32)):
        grid = teacher(torch.rand(1, 3, *size)).spatial.shape[-2:]
        assert grid == teacher.spec.grid(*size) == (size[0] // 16, size[1] // 16)


def test_squeezenets_cells_look_at_their_own_16_px(squeezenet: dict[str, str]) -> None:
    network = build_teacher(parse_teacher(squeezenet)).network.double()
    for module in network.modules():  # a blur of everything that a cell can see
        for name, child in module.named_children():
            if isinstance(child, torch.nn.MaxPool2d):
                setattr(module, name, torch.nn.AvgPool2d(3, 2, ceil_mode=True))
    for parameter in network.parameters():
        parameter.data = parameter.abs() if parameter.ndim > 1 else torch.zeros_like(parameter)
    images = torch.ones(1, 3, 256, 256, dtype=torch.float64).requires_grad_()
    padded = torch.nn.functional.pad(images, (10, 9, 10, 9), mode="reflect")
    network(padded)[0, :, 8, 8].sum().backward()
    assert images.grad is not None
    seen = images.grad[0].sum(0).nonzero()
    centre = (seen.amin(0) + seen.amax(0)).double() / 2
    assert centre.tolist() == [8 * 16 + 7, 8 * 16 + 7]  # its middle is 7.5, between two


def test_seven_taps_changes_the_kernels_gradient_and_no_value() -> None:
    spec = FeatureSpec(summary_dim=None, spatial_dim=4, patch_size=4, resolution=(12, 16))
    torch.manual_seed(0)
    right = FeatUp(spec, (2, 2), sigma=1.0)
    torch.manual_seed(0)
    wrong = SevenTaps(spec, (2, 2), sigma=1.0)
    images, low = torch.rand(2, 3, 24, 32), torch.randn(2, 4, 3, 4)

    def run(upsampler: FeatUp) -> torch.Tensor:
        return upsampler(images, lambda _: Features(None, low)).high.spatial

    assert torch.equal(run(right), run(wrong))
    run(right).square().sum().backward()
    run(wrong).square().sum().backward()
    name = "jbu.levels.0.project.0.weight"
    a, b = (dict(each.named_parameters())[name].grad for each in (right, wrong))
    assert not torch.allclose(a, b, rtol=0.1)


def test_only_the_seven_taps_of_a_kernel_have_a_gradient() -> None:
    level = SevenTapsLevel()
    kernels = level.kernels(torch.randn(1, 3, 5, 5))
    before: list[torch.Tensor] = []
    # The softmax sees what the hook lets through.
    kernels.grad_fn.register_hook(lambda _, outputs: before.append(outputs[0]))
    kernels.sum().backward()
    (reached,) = before
    assert reached.flatten(3)[0, 2, 2].nonzero().flatten().tolist() == list(TAPS)


@pytest.mark.parametrize("factor", [(2, 2), (3, 3), (4, 3)])
def test_off_centre_windows_are_off_by_half_a_cell_less_half_a_position(
    factor: tuple[int, int],
) -> None:
    size = (8 * factor[0], 8 * factor[1])
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij")
    maps, still = torch.stack([y, x])[None], torch.eye(3, dtype=torch.float64)[None, None]
    inside = (0, 0, slice(None), 4, 4)
    ours = AttentionDownsampler(2, factor)(maps, still)[inside]
    theirs = OffCentre(2, factor)(maps, still)[inside]
    first, half = torch.tensor(factor) * 4.0, (torch.tensor(factor) - 1) / 2
    assert torch.allclose(ours, first + half, atol=1e-4)
    assert torch.allclose(theirs, first, atol=1e-4)


def test_the_comparison_recipe_loads() -> None:
    path = Path(REPOSITORY) / "recipes/evaluation/upsamplers.yaml"
    assert list(load_recipe(ComparisonRecipe, path, []).methods) == ["bilinear", "featsharp"]


def test_the_students_of_the_mode_switch_differ_in_who_sees_which_size_alone() -> None:
    loaded = {name: load_student_recipe(RECIPE, overrides(name)) for name in STUDENTS}
    trees = [recipe.model_dump(mode="json") for recipe in loaded.values()]
    seen = [{arm: tree["arms"][arm].pop("teachers") for arm in tree["arms"]} for tree in trees]
    assert trees[0] == trees[1]
    assert seen == [STUDENTS["split"], STUDENTS["both"]]
