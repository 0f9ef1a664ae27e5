"""PCA panels: one basis for teacher and students, so that equal features are equal colours."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.display.pictures import HEIGHT, ColourBasis, draw_panels
from student.model import StudentOutput
from teachers.features import Features


def _maps(seed: int, channels: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, 4, 6, generator=torch.Generator().manual_seed(seed))


def _columns(path: Path, count: int) -> list[np.ndarray]:
    """The panels of a picture of `count` columns, titles cut off."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    width = (pixels.shape[1] + 6) // count
    return [pixels[22:, i * width : (i + 1) * width - 6] for i in range(count)]


def _draw(path: Path, teacher: torch.Tensor, student: torch.Tensor) -> list[np.ndarray]:
    features = Features(None, student)
    draw_panels(
        path,
        torch.rand(2, 3, 32, 48),
        {"clip": Features(None, teacher)},
        {"student": StudentOutput(features, {"clip": features})},
    )
    return _columns(path, 3)


def test_a_student_equal_to_its_teacher_gives_the_same_picture(tmp_path: Path) -> None:
    _, teacher, student = _draw(tmp_path / "p.png", _maps(0), _maps(0))
    assert np.array_equal(teacher, student)
    assert len(np.unique(teacher.reshape(-1, 3), axis=0)) > 40  # a picture, not one grey


def test_a_student_at_half_scale_is_paler_and_not_stretched_to_its_own_range(
    tmp_path: Path,
) -> None:
    _, teacher, student = _draw(tmp_path / "p.png", _maps(0), _maps(0) / 2)
    inner = slice(0, HEIGHT)
    assert student[inner].std() < 0.65 * teacher[inner].std()


def test_the_axes_are_the_principal_components_of_the_teacher() -> None:
    scales = torch.tensor([1.0, 5.0, 0.1, 9.0, 3.0])[:, None, None]
    basis = ColourBasis.fit(torch.randn(20, 5, 16, 16) * scales)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected[3, 0] = expected[1, 1] = expected[4, 2] = 1
    torch.testing.assert_close(basis.axes, expected, atol=0.05, rtol=0)


def test_colours_run_from_the_lowest_to_the_highest_projection() -> None:
    ramp = torch.linspace(-1, 1, 201)
    maps = torch.stack([4 * ramp, 0 * ramp, 0 * ramp]).reshape(1, 3, 1, 201)
    red = ColourBasis.fit(maps).colours(maps)[0, 0, 0]
    inner = (ramp.double().clamp(-0.98, 0.98) / 0.98 + 1) / 2
    torch.testing.assert_close(red, inner, atol=1e-6, rtol=0)


def test_rows_and_columns_keep_their_places(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 32, 48)
    images[0, 0], images[1, 2] = 1, 1
    teacher = Features(None, _maps(1))
    draw_panels(tmp_path / "a" / "p.png", images, {"clip": teacher}, {})
    image, _ = _columns(tmp_path / "a" / "p.png", 2)
    assert image.shape == (2 * HEIGHT + 6, HEIGHT * 48 // 32, 3)
    assert (image[:HEIGHT] == [255, 0, 0]).all()
    assert (image[HEIGHT + 6 :] == [0, 0, 255]).all()
