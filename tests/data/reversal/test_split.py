"""Held-out facts never enter training in any form, through the real loader, for every shipped reversal config."""

import numpy as np
import pytest

from jepa_scale.config.loading import load_config
from jepa_scale.data import load_data
from jepa_scale.data.sampling.batches import SampleBatchSampler
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.experiment import objective_class, validate
from jepa_scale.models.loading import build_backbone
from jepa_scale.packing import IGNORE


@pytest.mark.parametrize("name", ["reversal", "reversal_lm", "reversal_two_view"])
def test_no_batch_of_an_epoch_holds_a_held_out_fact(name):
    experiment = validate(
        load_config(f"configs/{name}.yaml", ["data.entities_a=50", "data.comb=5", "train.batch_size=30"])
    )
    data = load_data(experiment.data)
    held_out = {(f.subject, f.relation, f.object) for f in data.splits["test"]}
    objective = experiment.objective.build(build_backbone(experiment.model, data.vocab_size), data)
    assert isinstance(objective, objective_class(experiment.objective.name))
    stream = SampleBatchSampler(data.order(0), 0, 30)
    steps = -(-len(data.train) // 30)
    seen_facts, seen_tokens = set(), []
    for step in range(steps):
        _, samples = stream.micro_batch(step, 0)
        seen_facts |= {(f.subject, f.relation, f.object) for f in (data.train[int(i)] for i in samples)}
    loader = Loader(data.train, stream, objective.view_transform(), objective.sequences, 0, steps, seed=0)
    for (batch,) in loader:
        for packed in batch.sequences.values():
            ends = np.cumsum(packed.table.lengths)
            for start, end in zip(ends - packed.table.lengths, ends, strict=True):
                row = packed.input_ids[start:end].tolist()
                labels = [t for t in packed.labels[start:end].tolist() if t != IGNORE]
                seen_tokens.append((row, labels))
    assert len(seen_facts) == len(data.train) and not seen_facts & held_out
    for subject, relation, target in held_out:
        for row, labels in seen_tokens:
            text = " ".join(map(str, [*row, *labels]))
            question = " ".join(map(str, [*subject, relation]))
            assert not (question in f" {text} " and tuple(labels) == target), (row, labels)
            assert f"{question} {data.special['mask']} {' '.join(map(str, target))}" not in text


@pytest.mark.parametrize("name", ["reversal_sentences", "reversal_sentences_lm"])
def test_no_batch_of_an_epoch_holds_a_held_out_sentence(name):
    """In no wording: neither the question in words of training, nor in those of the test, is followed by its answer."""
    experiment = validate(
        load_config(f"configs/{name}.yaml", ["data.entities_a=50", "data.comb=5", "train.batch_size=60"])
    )
    data = load_data(experiment.data)
    objective = experiment.objective.build(build_backbone(experiment.model, data.vocab_size), data)
    stream = SampleBatchSampler(data.order(0), 0, 60)
    steps = -(-len(data.train) // 60)
    rows = set()
    for (batch,) in Loader(data.train, stream, objective.view_transform(), objective.sequences, 0, steps, seed=0):
        for packed in batch.sequences.values():
            ends = np.cumsum(packed.table.lengths)
            for start, end in zip(ends - packed.table.lengths, ends, strict=True):
                labels = packed.labels[start:end].tolist()
                rows.add((*packed.input_ids[start:end].tolist(), *labels[-1:]))
    trained = {tuple(x.lm_sequence()[0]) for x in data.train}
    test, each = data.splits["test"], len(data.train.before) // 12
    for x, relation in zip(test, test.relation, strict=True):
        for t in range(relation * each, (relation + 1) * each):
            sentence = (*data.train.before[t], *x.subject, *data.train.after[t], *x.object)
            assert sentence not in rows and sentence not in trained
    assert (trained <= rows) == (name == "reversal_sentences_lm")  # the rows are what was looked for
