from itertools import combinations

import numpy as np

from jepa_scale.data.sampling.rng import SampleRNG, generator


def test_a_generator_is_a_function_of_its_name() -> None:
    first = generator("a").integers(0, 2**63, 4)
    assert (first == generator("a").integers(0, 2**63, 4)).all()
    # The stream of a name is part of what a seed means: a change here changes every run.
    assert generator("order/0/0/10").permutation(10).tolist() == [7, 0, 6, 3, 1, 2, 9, 8, 5, 4]


def test_draws_differ_in_seed_epoch_sample_and_purpose_but_not_in_step() -> None:
    base = SampleRNG(seed=1, epoch=2, step=3, sample=4)
    others = [
        SampleRNG(0, 2, 3, 4),
        SampleRNG(1, 3, 3, 4),
        SampleRNG(1, 2, 3, 5),
        SampleRNG(2, 1, 3, 4),
        SampleRNG(1, 4, 3, 2),
    ]
    value = base.rng("mask").random()
    assert SampleRNG(1, 2, 99, 4).rng("mask").random() == value
    assert value not in [d.rng("mask").random() for d in others]
    purposes = ["mask ", "Mask", "negatives_a", "negatives_b", "a/b", ""]  # two of them equal in their first bytes
    assert len({base.rng(p).random() for p in [*purposes, "mask"]}) == 7


def test_numbers_follow_the_same_rule_and_spread_over_their_range() -> None:
    base = SampleRNG(seed=1, epoch=2, step=3, sample=4)
    value = base.number("model")
    assert SampleRNG(1, 2, 99, 4).number("model") == value
    others = [SampleRNG(0, 2, 3, 4), SampleRNG(1, 3, 3, 4), SampleRNG(1, 2, 3, 5), SampleRNG(2, 1, 3, 4)]
    assert len({value, base.number("other"), *(d.number("model") for d in others)}) == 6
    shares = np.array([SampleRNG(0, 0, 0, i).number("model") / 2**62 for i in range(4000)])
    distance = np.abs(np.sort(shares) - (np.arange(4000) + 0.5) / 4000).max()
    assert shares.min() >= 0 and shares.max() < 1 and distance < 1.95 / np.sqrt(4000)


def test_step_draws_are_shared_by_samples_and_ranks() -> None:
    one, other = SampleRNG(7, 0, 5, 1), SampleRNG(7, 3, 5, 900)
    assert one.step_rng("dropout").random() == other.step_rng("dropout").random()
    assert one.step_rng("dropout").random() != SampleRNG(7, 0, 6, 1).step_rng("dropout").random()
    assert one.step_rng("dropout").random() != SampleRNG(8, 0, 5, 1).step_rng("dropout").random()


def test_neighbouring_draws_are_uniform_and_independent() -> None:
    """First numbers of 4,000 neighbouring samples, epochs and purposes: uniform, and uncorrelated with each other."""
    n = 4000
    columns = [
        np.array([SampleRNG(0, 0, 0, i).rng("a").random() for i in range(n)]),
        np.array([SampleRNG(0, 1, 0, i).rng("a").random() for i in range(n)]),
        np.array([SampleRNG(1, 0, 0, i).rng("a").random() for i in range(n)]),
        np.array([SampleRNG(0, 0, 0, i).rng("b").random() for i in range(n)]),
        np.array([SampleRNG(0, 0, 0, i + 1).rng("a").random() for i in range(n)]),
    ]
    for column in columns:
        distance = np.abs(np.sort(column) - (np.arange(n) + 0.5) / n).max()  # Kolmogorov-Smirnov
        assert distance < 1.95 / np.sqrt(n)  # exceeded once in a thousand uniform samples
    for x, y in combinations(columns, 2):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(n)
