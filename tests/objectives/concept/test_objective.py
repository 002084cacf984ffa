"""`concept` against a plain reference, and what must not leak into what."""

import math

import pytest
import torch
import torch.nn.functional as F

from jepa_scale.objectives.base import JepaModel
from jepa_scale.objectives.concept.config import ConceptOptions
from jepa_scale.objectives.concept.objective import Concept
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError
from tests.objectives.concept.reference import check_infonce, unit_rms
from tests.objectives.helpers import DATA, alone, backbone, batch_of

FACTS = [*(DATA.splits["train"][i] for i in range(0, 60, 10)), *(DATA.splits["atomic"][i] for i in range(4))]


def make(model, **options):
    torch.manual_seed(1)
    return Concept(ConceptOptions(bridge_width=8, **options), model, DATA)


def relation_of(model):
    """A relation is the embedding of its token, and has a number."""

    def of(fact):
        index = torch.tensor([DATA.special["relations"].index(fact.relation)])
        return model.embed(torch.tensor([fact.relation])), index

    return of


@pytest.mark.parametrize("predictor", ["rotation", "linear", "mlp"])
@pytest.mark.parametrize("tap", [1, 2])
def test_infonce_equals_the_plain_reference(predictor, tap):
    model = backbone()
    objective = make(model, predictor=predictor, tap_layer=tap, lm_weight=0.0)
    check_infonce(model, objective, FACTS, relation_of(model))


def test_speaking_equals_the_plain_reference():
    """The concept enters at <mask>, the tokens of the name follow, nothing of the question is there."""
    model = backbone()
    objective = make(model, decode_noise=0.0, decode_fraction=1.0)
    batch = batch_of(objective, FACTS)
    lm = objective.loss(model, batch, [], 0).means["lm_loss"]
    losses = []
    for i, fact in enumerate(FACTS):
        name = fact.object if batch.values["decoded_name"][i] else fact.subject
        concept = unit_rms(alone(model, list(name), until=1)[-1])
        stream = pack_sequence([Segment([fact.mask, *name[:-1]], "decode")])
        embeds = model.embed(stream.input_ids)
        bridged = objective.bridge(concept[None])
        states = model.hidden(stream, inputs_embeds=torch.cat([embeds[:1] + bridged, embeds[1:]]))
        losses.append(F.cross_entropy(model.logits(states), torch.tensor(name)))
    torch.testing.assert_close(lm, torch.stack(losses).mean().detach(), atol=1e-5, rtol=1e-4)


def test_speaking_trains_no_concept():
    """What is spoken is detached: the speaker must follow the concepts, not bend them."""
    model = backbone()
    objective = make(model, concept_dim=8, jepa_weight=0.0)
    objective.loss(model, batch_of(objective, FACTS), [], 0).total.backward()
    assert objective.project.weight.grad.abs().max() == 0
    assert objective.bridge.up.weight.grad.abs().max() > 0


def test_every_parameter_gets_a_gradient_in_every_step():
    """Also in a micro-batch that speaks nothing: ranks must not differ in the modules they use."""
    for memory in (False, True):
        model = backbone()
        objective = make(model, decode_fraction=1e-9, memory=memory, concept_dim=8)
        batch = batch_of(objective, FACTS)
        assert "decode" not in batch.segments
        objective.loss(model, batch, [], 0).total.backward()
        for name, p in [*model.named_parameters(), *objective.named_parameters()]:
            assert p.grad is not None, name


def test_noise_belongs_to_the_sample_not_to_the_batch():
    objective = make(backbone())
    whole = batch_of(objective, FACTS).values
    parts = [batch_of(objective, FACTS[:3]).values, batch_of(objective, FACTS[3:], first=3).values]
    for name in ("noise", "decoded_name"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole[name])
    assert abs(whole["noise"].std() / objective.options.decode_noise - 1) < 0.2


def test_noise_is_as_large_as_the_option_says():
    one, three = (batch_of(make(backbone(), decode_noise=size), FACTS).values["noise"] for size in (1.0, 3.0))
    assert one.abs().sum() > 0
    torch.testing.assert_close(three, 3 * one)


def test_a_name_is_encoded_once_a_micro_batch():
    batch = batch_of(make(backbone()), FACTS + FACTS)
    names = {name for fact in FACTS for name in (fact.subject, fact.object)}
    assert len(batch.sequences["names"].table.lengths) == len(names)


def test_the_scale_is_bounded_by_the_engine_and_has_a_gradient_at_its_bound_and_beyond():
    """As the temperature of ``grid``: clamped in the forward, a scale that an update has carried over its bound would never
    come back. Wrong predictions ask for a smaller scale, hence for a gradient that is positive."""
    model = backbone()
    for start, over in ((10.0, 0.0), (20.0, 0.0), (20.0, 1e-3), (20.0, 0.5)):
        objective = make(model, scale_init=start, lm_weight=0.0)
        assert objective.scale().item() == pytest.approx(start)
        ((name, (low, high)),) = objective.bounds.items()
        assert name == "objective.scale.log_scale" and (low, high) == (-math.inf, math.log(20.0))
        with torch.no_grad():
            objective.scale.log_scale += over
        objective.loss(model, batch_of(objective, FACTS), [], 0).total.backward()
        assert objective.scale.log_scale.grad > 1e-2, (start, over)


def test_the_scales_parameter_has_the_name_that_checkpoints_know():
    names = dict(JepaModel(model := backbone(), make(model)).named_parameters())
    assert set(make(model).bounds) <= names.keys()


def test_values_of_a_memory_are_the_concepts():
    objective = make(backbone(), memory=True, concept_dim=8)
    batch = batch_of(objective, FACTS)
    encoded = objective.encode_names(backbone(), batch)
    slot = objective.known.index(FACTS[0].subject)
    torch.testing.assert_close(encoded[0, 0], unit_rms(objective.memory.values.weight[slot]))


def test_bad_options_are_named():
    with pytest.raises(InputError, match="objective.concept_dim"):
        make(backbone(), concept_dim=7)
    with pytest.raises(InputError, match="objective.tap_layer: 3"):
        make(backbone(), tap_layer=3)
    assert make(backbone(), tap_layer=-2).tap == 1
