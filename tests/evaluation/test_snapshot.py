"""What is kept of representations to be drawn."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.evaluation.snapshot import POINTS, ROWS, VALUES, save_snapshot, snapshot
from jepa_scale.evaluation.snapshot_files import read_snapshots


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def distances_of(points):
    return (points[:, None] - points).norm(dim=-1)


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 5))
def test_a_spectrum_is_that_of_the_centred_rows(n, d, seed):
    x = rows(n, d, seed)
    found = torch.tensor(snapshot({"x": x})["spectra"]["x"], dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0)).flip(0).clamp(min=0).sqrt()
    expected = eigenvalues[: min(n, d)] / eigenvalues.sum()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.sum() == pytest.approx(1) and bool((found.diff() <= 0).all())


def test_a_projection_keeps_what_lies_in_a_plane():
    """Of points in a plane the distances stay, whatever the space around it; pairs keep their order."""
    plane = rows(50, 2)
    axes = torch.linalg.qr(rows(16, 2, 1)).Q.T
    x = plane @ axes + 3
    saved = snapshot({"a": x, "b": x + 0.1 * axes[0]})
    for name, shift in (("a", 0.0), ("b", 0.1)):
        found = torch.tensor(saved["projections"][name])
        torch.testing.assert_close(distances_of(found), distances_of(plane), atol=1e-4, rtol=0)
        distances = (found - torch.tensor(saved["projections"]["a"])).norm(dim=1)
        torch.testing.assert_close(distances, torch.full((50,), shift), atol=1e-4, rtol=0)
    assert sum(saved["explained"]) == pytest.approx(1)


def test_it_is_small_whatever_it_is_of(tmp_path):
    save_snapshot({"x": rows(5000, 300), "y": rows(5000, 300, 1), "narrow": rows(10, 4)}, tmp_path, 7, "valid")
    saved = read_snapshots(tmp_path)["valid"]
    assert saved["step"] == 7 and saved["rows"] == {"x": 5000, "y": 5000, "narrow": 10}
    assert len(saved["spectra"]["x"]) == VALUES and ROWS > 300
    assert len(saved["projections"]["x"]) == len(saved["projections"]["y"]) == POINTS
    assert "narrow" in saved["spectra"] and "narrow" not in saved["projections"]


@pytest.mark.parametrize("bad", [torch.zeros(0, 3), torch.ones(1, 3), torch.full((4, 3), torch.nan)])
def test_what_says_nothing_is_left_out(bad):
    assert snapshot({"bad": bad}) == {"spectra": {}, "projections": {}, "explained": [0.0, 0.0]}
    assert snapshot({"bad": bad, "good": rows(5, 3)})["spectra"].keys() == {"good"}


def test_of_a_point(tmp_path):
    save_snapshot({"x": torch.ones(5, 3)}, tmp_path, 1, "valid")
    assert set(read_snapshots(tmp_path)["valid"]["spectra"]["x"]) == {0.0}


def test_a_damaged_file_is_as_none(tmp_path):
    save_snapshot({"x": rows(5, 3)}, tmp_path, 1, "valid")
    (tmp_path / "representations/test.json").write_text('{"step": 3, "spec')
    (tmp_path / "representations/other.json").write_text(json.dumps([1]))
    assert list(read_snapshots(tmp_path)) == ["valid"]
