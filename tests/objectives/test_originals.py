"""Figures that the original programs gave on these inputs; ours must give the same.

Each was printed by calling the named function of the repository at the commit, on a CPU in fp32, with the inputs that the test
draws from its seed. Nothing of their code is here.

======================================= ======== ===================================================================
repository                              commit   function
======================================= ======== ===================================================================
fergusmeiklejohn/arc-jepa-rl            a2e727e  ``training.jepa.relational_loss.relational_consistency_loss``
                                                 ``training.modules.object_tokenizer.tokenize_grid_objects``
saran-gangster/REPR_CUR                 2676daf  ``src.models.jepa.JEPAObjective._barlow_loss``
gwherb/llm-jepa                         10ac5d6  ``models.gpt2_jepa.GPT2WithJEPA.forward_jepa``
tanmay-bakshi/tbml                      59afb43  ``train._predictor_span_loss``, with NumPy in the place of JAX
======================================= ======== ===================================================================
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jepa_scale.data.grids.objects import find_objects, near
from jepa_scale.data.reversal.facts import Fact
from jepa_scale.losses.barlow import barlow
from jepa_scale.losses.relational import relation_distances, relation_matrices, relation_mismatch
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.span.objective import Encoded
from jepa_scale.objectives.span.views import free_runs
from jepa_scale.objectives.two_view.objective import TwoView, TwoViewOptions
from tests.objectives.helpers import batch_of
from tests.objectives.span.reference import model


def test_gridjepas_relational_loss():
    """3 samples of 2 grids and a target, 4 slots, 5 features; numbers of objects and adjacency at random."""
    rng, n, length, slots = np.random.default_rng(26), 3, 2, 4
    rows = torch.from_numpy(rng.standard_normal((n * (length + 1), slots, 5))).float()
    present = torch.arange(slots) < torch.from_numpy(rng.integers(1, slots + 1, n * (length + 1)))[:, None]
    near_by = torch.from_numpy(rng.integers(0, 2, (n * (length + 1), slots, slots))).bool().triu(1)
    grid, one, other = (near_by & present[:, :, None] & present[:, None]).nonzero(as_tuple=True)
    distances = relation_distances(rows[grid, one], rows[grid, other], normalize=False)
    matrices = relation_matrices(distances, grid, one, other, len(rows), slots)
    context, target = matrices[: n * length].view(n, length, slots, slots), matrices[n * length :]
    across, within = relation_mismatch(context, target, torch.ones(n, length, dtype=torch.bool))
    assert [float(across.mean()), float(within.mean())] == pytest.approx(
        [10.0243501663208, 1.8159435987472534], rel=1e-5
    )


def test_gridjepas_features_and_adjacency():
    grid = np.random.default_rng(7).integers(0, 3, (6, 7))
    by_sides = [
        [0.190476, 0.380952, 0.5, 0.714286, 1.666667, 1, 1, 0.6875, 0.285714, 0.5, 0, 0.833333, 0.571429, 0.190476],
        [
            0.095238,
            0.238095,
            0.333333,
            0.428571,
            1.5,
            1,
            2,
            0.083333,
            0.714286,
            0,
            0.571429,
            0.166667,
            0.857143,
            0.095238,
        ],
        [
            0.071429,
            0.190476,
            0.333333,
            0.285714,
            1,
            1,
            2,
            0.611111,
            0.761905,
            0.5,
            0.714286,
            0.666667,
            0.857143,
            0.071429,
        ],
        [0.047619, 0.142857, 0.166667, 0.285714, 2, 1, 2, 0, 0.357143, 0, 0.285714, 0, 0.428571, 0.047619],
    ]
    by_corners = [
        [
            0.309524,
            0.904762,
            1,
            0.714286,
            0.833333,
            1,
            2,
            0.320513,
            0.626374,
            0,
            0.285714,
            0.833333,
            0.857143,
            0.309524,
        ],
        [0.238095, 0.571429, 0.666667, 0.857143, 1.5, 1, 1, 0.666667, 0.3, 0.333333, 0, 0.833333, 0.714286, 0.238095],
        [
            0.047619,
            0.190476,
            0.333333,
            0.285714,
            1,
            1,
            1,
            0.416667,
            0.785714,
            0.333333,
            0.714286,
            0.5,
            0.857143,
            0.047619,
        ],
        [
            0.047619,
            0.142857,
            0.166667,
            0.285714,
            2,
            1,
            2,
            0.833333,
            0.071429,
            0.833333,
            0,
            0.833333,
            0.142857,
            0.047619,
        ],
    ]
    adjacent = {4: [(0, 2), (1, 3)], 8: [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]}
    for connectivity, expected in ((4, by_sides), (8, by_corners)):
        found = find_objects([grid], 4, connectivity, "gridjepa")
        np.testing.assert_allclose(found.features[:, :14], expected, atol=1e-6)
        assert not found.features[:, 14:].any()
        pairs = np.triu(near(found.boxes, found.boxes), 1).nonzero()
        assert list(zip(*map(np.ndarray.tolist, pairs), strict=True)) == adjacent[connectivity]


def test_litjepas_barlow():
    """Theirs adds 1e-5 to the standard deviation, ours to the variance: hence the tolerance."""
    rng = np.random.default_rng(26)
    a, noise = (torch.from_numpy(rng.standard_normal((40, 6))).float() for _ in range(2))
    align, off_diagonal = barlow(a, 0.5 * a + noise, torch.tensor(40.0))
    assert [float(align), float(off_diagonal)] == pytest.approx([0.18969009816646576, 0.01817958429455757], rel=1e-4)
    assert float(align + 0.005 * off_diagonal) == pytest.approx(0.18978099524974823, rel=1e-4)


JEPA_LOSSES = {
    (0, "cosine"): 0.09206223487854004,
    (0, "l2"): 0.568850040435791,
    (0, "mse"): 0.04095204919576645,
    (1, "cosine"): 0.08159220218658447,
    (1, "l2"): 0.3945276439189911,
    (1, "mse"): 0.01995929889380932,
    (2, "cosine"): 0.0805034339427948,
    (2, "l2"): 0.462507963180542,
    (2, "mse"): 0.02771710604429245,
}
"""By predictor tokens and distance, of a GPT-2 of 2 blocks of 8."""


def test_gpt2_with_jepas_losses_with_the_reverse_view_at_the_positions_after_the_forward_one():
    config = dict(model_type="gpt2", n_positions=16, n_embd=8, n_layer=2, n_head=2)
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    backbone = build_backbone(ModelOptions(family="huggingface", config=config), 20)
    rng = np.random.default_rng(26)
    with torch.no_grad():
        for _, parameter in sorted(backbone.decoder.named_parameters()):
            parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape)) * 0.3))
    rows = [[1, 2, 11, 10, 3, 4], [5, 1, 12, 10, 2, 6], [3, 6, 13, 10, 7, 5]]
    kinds, inverses = ("train", "atomic", "train"), (12, 11, 14)
    facts = [
        Fact((a, b), r, mask, (c, d), kind, inverse)
        for (a, b, r, mask, c, d), kind, inverse in zip(rows, kinds, inverses, strict=True)
    ]
    for (k, distance), expected in JEPA_LOSSES.items():
        options = TwoViewOptions(predictor_tokens=k, distance=distance, reverse_positions="continued")
        special = {"pred": 15, "relations": sorted(inverses)}
        objective = TwoView(options, backbone, SimpleNamespace(kind="reversal", special=special))
        found = objective.loss(backbone, batch_of(objective, facts), [], 0).means
        assert float(found["lm_loss"]) == pytest.approx(2.967961549758911, rel=1e-5)
        assert float(found["jepa_loss"]) == pytest.approx(expected, rel=1e-4), (k, distance)


@pytest.mark.parametrize(("span_mean", "expected"), [("views", 1.4037911030981276), ("spans", 1.8526227)])
def test_spanjepas_reconstruction_of_spans(span_mean, expected):
    """2 texts with 3 views, one of them without a masked token. The mean over spans is not theirs; it is for comparison."""
    rng, texts, views, length = np.random.default_rng(26), 2, 3, 12
    whole = rng.standard_normal((texts, length, 4)).astype(np.float32)
    filled = rng.standard_normal((texts, views, length, 4)).astype(np.float32)
    masked = rng.random((texts, views, length)) < 0.35
    masked[1, 2] = False
    predicted, spans, weights = [], [], []
    for text, view in np.ndindex(texts, views):
        runs = free_runs(masked[text, view])
        predicted += [filled[text, view, begin : begin + n].mean(axis=0) for begin, n in runs]
        spans += [whole[text, begin : begin + n].mean(axis=0) for begin, n in runs]
        weights += [1 / (len(runs) * views) for _ in runs]
    means = (torch.from_numpy(np.stack(rows)) for rows in (predicted, spans))
    ours, targets = (torch.nn.functional.rms_norm(rows, (4,), eps=1e-6) for rows in means)
    nothing = torch.zeros(texts, views, 4)
    encoded = Encoded(nothing[0], nothing, nothing[:, 0], ours, targets, targets[:0], ours[:0])
    totals = {"texts": torch.tensor(texts), "spans": torch.tensor(len(spans)), "chosen": torch.tensor(0)}
    batch = SimpleNamespace(totals=totals, rows={"span_weight": torch.tensor(weights)})
    options = dict(global_views=1, local_views=views - 1, sigreg_weight=0.0, span_mean=span_mean)
    terms = model(options).objective.terms(encoded, batch, [], 0)
    assert float(terms["span_rec"]) == pytest.approx(expected, rel=1e-5)
