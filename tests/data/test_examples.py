import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.data.examples import Conversation, Turn
from jepa_scale.packing import IGNORE


@given(st.integers(2, 12), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), max_size=4))
def test_exactly_the_assistants_tokens_are_predicted(n, spans):
    """Whatever turns a template gives: empty ones, one that begins the conversation, one that a cut has shortened."""
    turns = tuple(Turn("assistant" if said else "user", min(a, b), max(a, b)) for a, b, said in spans)
    tokens = np.arange(100, 100 + n)
    _, labels = Conversation(tokens, turns, []).lm_sequence()
    assert len(labels) == n
    predicted = {i for turn in turns if turn.role == "assistant" for i in range(max(turn.start, 1), min(turn.stop, n))}
    assert {int(label) - 100 for label in labels if label != IGNORE} == predicted
    assert all(labels[i - 1] == tokens[i] for i in predicted)


def test_an_answer_that_is_excluded_has_no_labels():
    turns = (Turn("assistant", 1, 3, trained=False), Turn("user", 3, 5), Turn("assistant", 5, 7))
    _, labels = Conversation(np.arange(7), turns, []).lm_sequence()
    assert labels.tolist() == [IGNORE] * 4 + [5, 6, IGNORE]
