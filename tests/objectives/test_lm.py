"""`lm` against plain cross-entropy, and what it spares the LM head."""

import torch
import torch.nn.functional as F

from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from tests.objectives.helpers import DATA, alone, backbone, batch_of

FACTS = [DATA.train[i] for i in range(0, 40, 5)]


def test_loss_is_the_mean_over_the_labels_of_the_answers():
    model = backbone()
    objective = LanguageModeling(LmOptions(), model, DATA)
    got = objective.loss(model, batch_of(objective, FACTS), [], 0).total
    losses = []
    for fact in FACTS:
        logits = model.logits(alone(model, [*fact.prompt, *fact.object]))
        losses.append(F.cross_entropy(logits[len(fact.prompt) - 1 : -1], torch.tensor(fact.object)))
    torch.testing.assert_close(got, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_the_head_runs_on_labelled_positions_alone():
    model = backbone()
    objective = LanguageModeling(LmOptions(), model, DATA)
    rows = []
    model.decoder.get_output_embeddings().register_forward_hook(lambda m, inputs, out: rows.append(inputs[0].shape[0]))
    objective.loss(model, batch_of(objective, FACTS), [], 0)
    assert rows == [2 * len(FACTS)]
