"""Hadamard matrices, feature statistics and PHI-S against closed forms and slow references."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.hadamard import hadamard, spread
from teachers.phi_s import FeatureStatistics, PhiS, fit_phi_s, load_phi_s, save_phi_s


@pytest.mark.parametrize(
    "n", [1, 2, 4, 12, 20, 28, 36, 384, 768, 1024, 1152, 1280, 1408, 1536, 1664]
)
def test_a_constructed_matrix_is_hadamard(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 7, 30, 92, 100, 2752])
def test_sizes_without_a_construction_are_not_made_up(n: int) -> None:
    assert hadamard(n) is None


@pytest.mark.parametrize("n", [1, 3, 7, 30, 92, 192])
def test_spread_makes_the_diagonal_of_any_variances_equal(n: int) -> None:
    variances = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) ** 8
    turn = spread(variances)
    diagonal = (turn @ variances.diag() @ turn.T).diagonal()
    torch.testing.assert_close(turn @ turn.T, torch.eye(n).double(), atol=1e-13, rtol=0)
    torch.testing.assert_close(diagonal, variances.mean().expand(n), atol=1e-13, rtol=1e-13)


def test_spread_of_equal_variances_is_finite() -> None:
    assert torch.equal(spread(torch.ones(7).double()), torch.eye(7).double())


def correlated(n: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) * torch.logspace(-2, 1, dim)
    return torch.randn(n, dim, generator=generator) @ mixing + 10 * torch.arange(dim)


def statistics_of(rows: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics.zeros(rows.shape[1])
    statistics.update(rows)
    return statistics


@pytest.mark.parametrize("chunk", [1, 7, 100, 5000])
def test_streamed_statistics_are_those_of_all_rows_at_once(chunk: int) -> None:
    rows = correlated(5000 if chunk > 1 else 200, 6)
    statistics = FeatureStatistics.zeros(6)
    for part in rows.split(chunk):
        statistics.update(part)
    torch.testing.assert_close(statistics.mean, rows.double().mean(0))
    torch.testing.assert_close(statistics.covariance(), torch.cov(rows.double().T))
    assert statistics.count == len(rows)


def test_merged_statistics_of_ranks_of_unequal_size_are_those_of_one_process() -> None:
    rows = correlated(1000, 5)
    ranks = [statistics_of(part) for part in rows.split([600, 399, 1])]
    merged = FeatureStatistics.zeros(5)
    for rank in ranks:
        merged.merge(rank)
    whole = statistics_of(rows)
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.scatter, whole.scatter)


def test_a_map_counts_cell_by_cell_and_masked_cells_have_no_influence() -> None:
    maps = correlated(2 * 3 * 4, 5).view(2, 3, 4, 5).permute(0, 3, 1, 2)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    spoilt = torch.where(mask[:, None], maps, math.nan)
    statistics = FeatureStatistics.zeros(5)
    statistics.update(spoilt, mask)
    rows = torch.stack([maps[b, :, y, x] for b, y, x in mask.nonzero().tolist()]).double()
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    torch.testing.assert_close(statistics.covariance(), torch.cov(rows.T))


def test_a_mask_of_nothing_changes_nothing() -> None:
    statistics = statistics_of(correlated(50, 3))
    before = statistics.scatter.clone()
    statistics.update(torch.ones(4, 3), torch.zeros(4, dtype=torch.bool))
    assert statistics.count == 50
    assert torch.equal(statistics.scatter, before)


def test_statistics_refuse_what_would_spoil_them() -> None:
    statistics = FeatureStatistics.zeros(3)
    with pytest.raises(ValueError, match=r"shape \(2, 4\): expected \(B, 3, h, w\) or \(N, 3\)"):
        statistics.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\).*expected \(2,\), bool"):
        statistics.update(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="NaN or infinity"):
        statistics.update(torch.full((2, 3), math.inf))
    with pytest.raises(RuntimeError, match="0 vectors have no covariance"):
        statistics.covariance()


@pytest.mark.parametrize("dim", [12, 7])  # Paley, Givens
def test_phi_s_of_its_own_data_has_mean_zero_and_variance_one_in_every_channel(dim: int) -> None:
    rows = correlated(4000, dim)
    phi_s = fit_phi_s(statistics_of(rows))
    z = phi_s(rows.T[None, :, None])[0, :, 0].double()
    torch.testing.assert_close(z.mean(1), torch.zeros(dim).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var(1), torch.ones(dim).double(), atol=1e-4, rtol=0)


def test_phi_s_is_the_published_formula_up_to_the_signs_of_eigenvectors() -> None:
    rows = correlated(2000, 12)
    phi_s = fit_phi_s(statistics_of(rows))
    covariance = torch.cov(rows.double().T)
    matrix = hadamard(12)
    assert matrix is not None
    pca = (matrix.T / math.sqrt(12)) @ phi_s.rotation.double()  # U^T
    turned = pca @ covariance @ pca.T
    torch.testing.assert_close(turned, turned.diagonal().diag(), atol=1e-4, rtol=0)
    scale = (covariance.trace() / 12).rsqrt().float()
    torch.testing.assert_close(phi_s.alpha, scale)


def test_phi_s_scales_all_distances_by_alpha() -> None:
    rows = correlated(500, 20)
    phi_s = fit_phi_s(statistics_of(rows))
    z = phi_s(rows.view(5, 100, 20, 1).permute(0, 2, 1, 3)).permute(0, 2, 1, 3).reshape(500, 20)
    due = torch.cdist(rows.double(), rows.double()) * phi_s.alpha
    torch.testing.assert_close(torch.cdist(z.double(), z.double()), due, atol=1e-4, rtol=1e-4)


def test_inverse_undoes_forward_on_maps_that_are_not_square() -> None:
    maps = correlated(2 * 3 * 5, 7).view(2, 3, 5, 7).permute(0, 3, 1, 2)
    phi_s = fit_phi_s(statistics_of(correlated(500, 7)))
    assert phi_s(maps).shape == maps.shape
    torch.testing.assert_close(phi_s.inverse(phi_s(maps)), maps, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_layer_outputs_the_inverse_of_what_the_layer_outputs(
    replicas: int, bias: bool
) -> None:
    phi_s = fit_phi_s(statistics_of(correlated(500, 12)))
    linear = nn.Linear(5, replicas * 12, bias=bias)
    tokens = torch.randn(9, 5)
    due = phi_s.inverse(linear(tokens).view(9 * replicas, 12, 1, 1)).view(9, replicas * 12)
    torch.testing.assert_close(phi_s.fold_into_linear(linear)(tokens), due, atol=1e-3, rtol=1e-4)
    due = phi_s(linear(tokens).view(9 * replicas, 12, 1, 1)).view(9, replicas * 12)
    torch.testing.assert_close(phi_s.standardise_linear(linear)(tokens), due, atol=1e-4, rtol=1e-4)


def test_folding_refuses_a_layer_of_another_width() -> None:
    phi_s = fit_phi_s(statistics_of(correlated(500, 12)))
    with pytest.raises(ValueError, match="vectors of 12 channels, got 13 outputs"):
        phi_s.fold_into_linear(nn.Linear(5, 13))


def test_two_fits_of_the_same_statistics_agree_bit_for_bit() -> None:
    statistics = statistics_of(correlated(500, 20))
    first, second = fit_phi_s(statistics), fit_phi_s(statistics)
    assert torch.equal(first.rotation, second.rotation)


def test_the_rotation_does_not_hang_on_the_signs_that_eigh_picks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statistics = statistics_of(correlated(500, 12))
    due, eigh = fit_phi_s(statistics).rotation, torch.linalg.eigh

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values, vectors * torch.tensor([1, -1] * 6)

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    torch.testing.assert_close(fit_phi_s(statistics).rotation, due)


def test_rank_deficient_features_stay_finite() -> None:
    rows = torch.cat([correlated(300, 4), torch.ones(300, 8)], 1)
    phi_s = fit_phi_s(statistics_of(rows))
    z = phi_s(rows.T[None, :, None])
    assert z.isfinite().all()
    torch.testing.assert_close(z.var(-1).flatten(), torch.ones(12), atol=1e-3, rtol=0)


def test_constant_features_are_refused() -> None:
    with pytest.raises(RuntimeError, match="constant"):
        fit_phi_s(statistics_of(torch.ones(10, 4)))


def test_phi_s_refuses_to_work_before_it_is_fitted() -> None:
    with pytest.raises(RuntimeError, match="not fitted"):
        PhiS(4)(torch.ones(1, 4, 2, 2))


def test_a_saved_phi_s_comes_back_for_its_own_fingerprint_only(tmp_path: Path) -> None:
    phi_s = fit_phi_s(statistics_of(correlated(100, 12)))
    path = tmp_path / "phi_s.safetensors"
    save_phi_s(path, phi_s, "abc")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = load_phi_s(path, "abc")
    for name, value in phi_s.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(TeacherError, match="another teacher.*fingerprint xyz, got abc"):
        load_phi_s(path, "xyz")
    path.write_bytes(b"nothing")
    with pytest.raises(TeacherError, match="is not a PHI-S file"):
        load_phi_s(path, "abc")
