"""PCA panels: one basis for teacher and students, so that equal features are equal colours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.display import pictures
from distill.display.columns import HEIGHT, Column, draw_columns, layout
from distill.display.pictures import ColourBasis, draw_panels
from student.model import StudentOutput
from teachers.features import Features
from teachers.phi_s import FeatureStatistics, fit_phi_s


def _maps(seed: int, channels: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, 4, 6, generator=torch.Generator().manual_seed(seed))


def _panels(path: Path, *groups: str, rows: int = 2, aspect: float = 1.5) -> list[np.ndarray]:
    """The panels (rows, height, width, 3) of columns in these groups, without titles."""
    size = torch.zeros(rows, 3, 2, round(2 * aspect))
    place = layout([Column("", size, group) for group in groups])
    with Image.open(path) as image:
        pixels = np.asarray(image)
    assert pixels.shape[1] == place.size[0]
    return [
        np.stack([pixels[y : y + HEIGHT, x : x + place.width] for y in place.tops[:rows]])
        for x in place.lefts
    ]


def _draw(path: Path, teacher: torch.Tensor, student: torch.Tensor) -> list[np.ndarray]:
    features = Features(None, student)
    draw_panels(
        path,
        torch.rand(2, 3, 32, 48),
        {"clip": Features(None, teacher)},
        {"student": StudentOutput(features, {"clip": features})},
    )
    return _panels(path, "", "clip", "clip")


def test_a_student_equal_to_its_teacher_gives_the_same_picture(tmp_path: Path) -> None:
    _, teacher, student = _draw(tmp_path / "p.png", _maps(0), _maps(0))
    assert np.array_equal(teacher, student)
    assert len(np.unique(teacher.reshape(-1, 3), axis=0)) > 40  # a picture, not one grey


def test_a_student_at_half_scale_is_paler_and_not_stretched_to_its_own_range(
    tmp_path: Path,
) -> None:
    _, teacher, student = _draw(tmp_path / "p.png", _maps(0), _maps(0) / 2)
    assert student.std() < 0.65 * teacher.std()


def test_the_space_of_both_does_not_matter_as_phi_s_is_a_rotation_with_one_scale(
    tmp_path: Path,
) -> None:
    """So the student's standardised maps need no inverse."""
    teacher, student = _maps(0), 0.8 * _maps(0) + 0.4 * _maps(1)
    statistics = FeatureStatistics.zeros(8)
    statistics.update(3 * torch.randn(400, 8, generator=torch.Generator().manual_seed(4)) + 2)
    phi_s = fit_phi_s(statistics)
    _, *own = _draw(tmp_path / "a.png", phi_s.inverse(teacher), phi_s.inverse(student))
    _, *standardised = _draw(tmp_path / "b.png", teacher, student)
    # The sign of an axis follows its largest entry, so that a colour may run the other way, but in
    # the teacher's and the student's map alike.
    for row in range(2):
        for channel in range(3):
            x, y = (
                np.stack([each[row, ..., channel].astype(int) for each in columns])
                for columns in (own, standardised)
            )
            assert min(abs(x - y).max(), abs(255 - x - y).max()) <= 1


def test_each_image_has_axes_of_its_own(tmp_path: Path) -> None:
    teacher, other = _maps(2), _maps(3)
    together = _draw(tmp_path / "a.png", teacher, teacher)
    beside_another = _draw(tmp_path / "b.png", torch.cat([other[:1], teacher[1:]]), teacher)
    assert np.array_equal(together[1][1], beside_another[1][1])
    assert not np.array_equal(together[1][0], beside_another[1][0])


@pytest.mark.parametrize("channels", [5, 40])  # fewer and more than the 24 cells
def test_the_axes_are_those_of_the_covariance(channels: int) -> None:
    generator = torch.Generator().manual_seed(5)
    scales = torch.linspace(1, 3, channels)[:, None, None]
    maps = torch.randn(1, channels, 4, 6, generator=generator) * scales
    axes = ColourBasis.fit(maps).axes
    cells = maps.double()[0].flatten(1).T
    _, vectors = torch.linalg.eigh(torch.cov(cells.T))
    torch.testing.assert_close(axes.abs(), vectors[:, -3:].flip(1).abs(), atol=1e-6, rtol=1e-6)


def test_a_map_of_few_directions_is_drawn() -> None:
    assert (
        ColourBasis.fit(torch.ones(1, 40, 4, 6)).colours(torch.ones(1, 40, 4, 6)).isfinite().all()
    )
    line = torch.linspace(-1, 1, 24).view(1, 1, 4, 6) * torch.ones(1, 40, 1, 1)
    basis = ColourBasis.fit(line)
    torch.testing.assert_close(basis.axes.T @ basis.axes, torch.eye(3, dtype=torch.float64))


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
    image, _ = _panels(tmp_path / "a" / "p.png", "", "clip")
    assert image.shape == (2, HEIGHT, HEIGHT * 48 // 32, 3)
    assert (image[0] == [255, 0, 0]).all()
    assert (image[1] == [0, 0, 255]).all()


def test_a_panel_says_whose_map_it_is_and_how_near(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Column] = []
    monkeypatch.setattr(pictures, "draw_columns", lambda _, columns: drawn.extend(columns))
    features = Features(None, _maps(0))
    output = StudentOutput(features, {"clip": features, "dino": features})
    captions = {"dino": {"start": ["fidelity 0.93"]}}
    targets = {"clip": features, "dino": features}
    outputs = {"student": output, "start": output}
    draw_panels(Path("p.png"), torch.rand(2, 3, 32, 48), targets, outputs, captions)
    assert [(each.group, each.title) for each in drawn] == [
        ("", "image"),
        *(("clip", title) for title in ("teacher", "student", "start")),
        *(("dino", title) for title in ("teacher", "student", "start")),
    ]
    assert [list(each.caption) for each in drawn] == [*[[]] * 6, ["fidelity 0.93"]]
    assert [each.smooth for each in drawn] == [True, *[False] * 6]


@pytest.mark.parametrize("count", [3, 10])
def test_letters_stay_legible_where_a_wide_picture_is_shown_on_a_page(count: int) -> None:
    columns = [Column("", torch.zeros(1, 3, 2, 2)) for _ in range(count)]
    place = layout(columns)
    assert place.letters * min(1, 1000 / place.size[0]) >= 13.5


def test_captions_stand_below_and_groups_above(tmp_path: Path) -> None:
    """Where there are none, no room is left for them."""
    panels = torch.zeros(1, 3, 2, 2)
    bare, full = (tmp_path / name for name in ("bare.png", "full.png"))
    draw_columns(bare, [Column("a", panels)])
    draw_columns(full, [Column("a", panels, "group", ["one", "two"])])
    with Image.open(bare) as image:
        assert image.size == (HEIGHT, 22 + HEIGHT)
    with Image.open(full) as image:
        pixels = np.asarray(image.convert("L"))
    top, bottom = pixels[:22], pixels[44 + HEIGHT + 6 :]
    assert len(bottom) == 2 * 22
    for band in (top, bottom[:22], bottom[22:]):
        assert (band < 128).any()
