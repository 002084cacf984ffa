import math

import numpy as np
import pytest

from jepa_scale.bench.measures.frozen_states import retrieval

WORDS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (1.0, 1.0), "d": (1.0, 0.1), "e": (0.2, 1.0)}


class Encoder:
    """Returns the mean of its words' vectors."""

    def encode(self, texts, pooling, truncate):
        return np.array([np.mean([WORDS[word] for word in text.split()], axis=0) for text in texts], np.float32)


def test_a_half_is_ranked_among_the_other_halves_of_all_texts():
    texts = ["a d", "b e", "c a"]  # c is nearest to d and e, which are others' halves, and a is the last of three
    wanted = [1 / math.log2(1 + rank) for rank in (2, 1, 3)]  # a is nearest to a, the third text's half
    assert retrieval(Encoder(), texts) == pytest.approx(
        {"retrieval_last": np.mean(wanted), "retrieval_mean": np.mean(wanted)}
    )


def test_equal_states_find_nothing():
    """A collapsed encoder has no rank, however many texts there are: a tie counts against it."""
    assert retrieval(Encoder(), ["a a"] * 20) == {"retrieval_last": 0, "retrieval_mean": 0}
