import torch

from jepa_scale.objectives.grid.object_encoder import CellReadout, ObjectEncoder

SPREAD = (0.5, 1.0, 2.0, 1.0, 0.25, 1.0, 4.0)


def encoder(layers: int = 2) -> ObjectEncoder:
    torch.manual_seed(0)
    return ObjectEncoder(SPREAD, 8, layers, heads=2)


def adjacent(grids: int, slots: int, *pairs: tuple[int, int, int]) -> torch.Tensor:
    mask = torch.zeros(grids, slots, slots, dtype=torch.bool)
    for grid, a, b in pairs:
        mask[grid, a, b] = mask[grid, b, a] = True
    return mask


def test_an_object_sees_those_that_are_adjacent_and_itself():
    """0 – 1 – 2 in a row and 3 by itself: after one layer 0 knows of 1, after two of 2, never of 3."""
    features, place = torch.randn(4, 7), torch.arange(4)
    mask = adjacent(1, 4, (0, 0, 1), (0, 1, 2))
    for layers, known in ((0, {0}), (1, {0, 1}), (2, {0, 1, 2})):
        module = encoder(layers)
        first = module(features, place, mask)
        for other in range(4):
            changed = features.clone()
            changed[other] += 1
            moved = (module(changed, place, mask)[0] - first[0]).abs().max() > 1e-6
            assert bool(moved) == (other in known), (layers, other)


def test_grids_and_empty_slots_are_apart():
    module, features = encoder(), torch.randn(5, 7)
    together = module(features, torch.tensor([0, 1, 4, 5, 6]), adjacent(3, 4, (0, 0, 1), (1, 0, 1), (1, 1, 2)))
    first = module(features[:2], torch.tensor([0, 1]), adjacent(1, 4, (0, 0, 1)))
    second = module(
        features[2:], torch.tensor([0, 1, 2]), adjacent(1, 6, (0, 0, 1), (0, 1, 2))
    )  # more slots change nothing
    torch.testing.assert_close(together, torch.cat([first, second]))
    assert together.isfinite().all()
    assert module(features[:0], torch.arange(0), adjacent(2, 4)).shape == (0, 8)
    assert module(features[:0], torch.arange(0), adjacent(0, 4)).shape == (0, 8)


def test_without_neighbours_attention_is_of_the_object_to_itself():
    module, features = encoder(1), torch.randn(3, 7)
    layer = module.layers[0]
    x = module.down(torch.nn.functional.gelu(module.up(features / torch.tensor(SPREAD))))
    value = layer.qkv(layer.attention_norm(x))[:, 16:]
    x = x + layer.out(value)
    x = x + layer.mlp(layer.mlp_norm(x))
    torch.testing.assert_close(module(features, torch.arange(3), adjacent(1, 3)), module.norm(x))


def test_objects_are_means_of_their_cells():
    torch.manual_seed(1)
    module, states = CellReadout(6, 4), torch.randn(10, 6)
    cells, sizes = torch.tensor([3, 4, 9, 0]), torch.tensor([2, 1, 1])
    means = torch.stack([states[3:5].mean(dim=0), states[9], states[0]])
    torch.testing.assert_close(module(states, cells, sizes), module.norm(module.project(means)))
    assert module(states, cells[:0], sizes[:0]).shape == (0, 4)
