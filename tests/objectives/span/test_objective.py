"""`span` against a plain reference with dense masks: states, losses, gradients; accumulation; a teacher; bad input."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jepa_scale.data.examples import LabelledTokens
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.models.flops import DecoderFlops
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.base import JepaModel
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.objectives.span.config import SpanOptions
from jepa_scale.objectives.span.objective import Span
from jepa_scale.objectives.span.views import PREDICTOR
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError
from tests.objectives.span.reference import DATA, batches_of, encode, model, reference, run, texts

EXAMPLES = (19, 8, 23, 12, 2, 15, 1)
FORMS = {
    "seed": {},
    "cosine": dict(distance="cosine", span_mean="spans"),
    "stop_gradient": dict(target="stop_gradient"),
    "no_predictor": dict(predictor_layers=0),
    "no_sigreg": dict(sigreg_weight=0.0),
    "other_views": dict(global_views=1, local_views=2, local_ratio=(0.6, 0.9), span_length=1.0, predictor_layers=1),
    "globals_alone": dict(global_views=3, local_views=0),
    "masked_tokens": dict(mlm_weight=0.7),
    "masked_tokens_alone": dict(mlm_weight=1.0, jepa_weight=0.0, sigreg_weight=0.0),
}


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_same_gradients(got, wanted):
    for name in wanted.keys() | got.keys():
        a, b = (g.get(name, torch.zeros(())) for g in (got, wanted))
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max())), name  # fp64, but statistics are fp32


@pytest.mark.parametrize("position", ["rope", "pope"])
def test_token_states_of_packed_views_are_those_under_a_dense_mask(position):
    module = model({}, position_embedding=position)
    (batch,) = batches_of(module.objective, texts(*EXAMPLES))
    stream = batch.sequences["main"]
    states = module.backbone.hidden(stream)
    ends = stream.table.cu_seqlens.tolist()
    make, seen = module.objective.view_transform(), {"sample": 0, "global": 0, "local": 0}
    for i, example in enumerate(texts(*EXAMPLES)):
        segments = make(example, SampleRNG(7, 0, 3, i)).segments
        whole = segments[0]
        for view in segments:
            if view.role not in seen:
                continue
            number = int(batch.segments[view.role][seen[view.role]])
            seen[view.role] += 1
            masked = ~np.isin(whole.position_ids, view.position_ids)
            expected, _ = encode(module.backbone, np.asarray(whole.tokens), np.asarray(whole.position_ids), masked)
            torch.testing.assert_close(
                states[ends[number] : ends[number + 1]], expected[~torch.from_numpy(masked)], rtol=1e-5, atol=1e-5
            )
    assert sum(seen.values()) == 9 * len(EXAMPLES)


@pytest.mark.parametrize("position", ["rope", "pope"])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_those_of_the_reference(form, position):
    module = model(FORMS[form], position_embedding=position, embedding_norm=position == "pope")
    got = run(module, batches_of(module.objective, texts(*EXAMPLES)))
    of_packed = gradients(module)
    wanted = reference(module, texts(*EXAMPLES))
    wanted["loss"].backward()
    of_reference = gradients(module)
    assert set(wanted) - {"loss"} <= set(got)
    for name, value in wanted.items():
        assert abs(float(got[name]) - float(value)) < 1e-5 * max(1.0, float(value)), name
    assert len(of_reference) > 10
    assert_same_gradients(of_packed, of_reference)


@pytest.mark.parametrize("form", ["seed", "stop_gradient", "no_predictor", "masked_tokens"])
def test_nothing_depends_on_accumulation(form):
    module = model(FORMS[form])
    once = run(module, batches_of(module.objective, texts(*EXAMPLES)))
    expected = gradients(module)
    for micros in (2, 5, 9):  # of nine, two have no text at all
        parts = run(module, batches_of(module.objective, texts(*EXAMPLES), micros))
        assert {k: float(v) for k, v in parts.items()} == pytest.approx(
            {k: float(v) for k, v in once.items()}, rel=1e-5
        )
        assert_same_gradients(gradients(module), expected)


@pytest.mark.parametrize("mlm_weight", [0.0, 1.0])
def test_a_batch_in_which_nothing_is_masked_still_runs_everything(mlm_weight):
    module = model(dict(mlm_weight=mlm_weight))
    (batch,) = batches_of(module.objective, texts(1, 1, 2))  # 45 % of two tokens is none
    assert batch.sequences[PREDICTOR].num_tokens == 1
    got = run(module, [batch])
    assert float(got["span_rec"]) == 0 and all(torch.isfinite(v) for v in got.values())
    found = gradients(module)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert any("predictor" in name for name in found)
    assert ("backbone.decoder.lm_head.weight" in found) == (mlm_weight > 0)
    assert float(got.get("mlm_loss", 0)) == 0


class Teacher:
    """Stands still, a little beside its student."""

    def __init__(self, module):
        (self.backbone,) = module.objective.teacher_copies(module.backbone).values()
        with torch.no_grad():
            for parameter in self.backbone.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        self.root = torch.nn.ModuleDict({"backbone": self.backbone})

    @torch.no_grad()
    def forward(self, path, *args, **kwargs):
        return self.root.get_submodule(path)(*args, **kwargs)

    def momentum(self, step):
        return 0.9


def test_targets_of_a_teacher():
    module = model(dict(target="ema"), position_embedding="pope")
    teacher = module.objective.teacher = Teacher(module)
    got = run(module, batches_of(module.objective, texts(*EXAMPLES), 2))
    of_packed = gradients(module)
    wanted = reference(module, texts(*EXAMPLES), teacher=teacher.backbone)
    wanted["loss"].backward()
    for name, value in wanted.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name
    assert_same_gradients(of_packed, gradients(module))
    student = reference(module, texts(*EXAMPLES))
    assert abs(float(student["seq_rec"]) - float(wanted["seq_rec"])) > 1e-3  # it is another one


def test_next_tokens_may_be_predicted_on_the_whole_text():
    module = model(dict(lm_weight=0.7))
    examples = texts(*EXAMPLES)
    got = run(module, batches_of(module.objective, examples))
    of_packed = gradients(module)
    losses = []
    for example in examples:
        tokens = example.tokens[:-1]
        hidden, _ = encode(module.backbone, tokens, np.arange(len(tokens)), np.zeros(len(tokens), bool))
        logits = module.backbone.logits(hidden)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(example.tokens[1:]), reduction="none"))
    lm = torch.cat(losses).mean()
    wanted = reference(module, examples)["loss"] + 0.7 * lm
    wanted.backward()
    assert float(got["lm_loss"]) == pytest.approx(float(lm), rel=1e-6)
    assert float(got["loss"]) == pytest.approx(float(wanted), rel=1e-5)
    assert_same_gradients(of_packed, gradients(module))
    assert module.objective.predicts_tokens and not model({}).objective.predicts_tokens


CONTROLS = {
    "seed": {},
    "ema": dict(target="ema"),
    "other_mean": dict(span_mean="spans", sigreg_weight=0.0),
    "masked_tokens": dict(mlm_weight=0.7),
}


@pytest.mark.parametrize("form", CONTROLS)
def test_the_control_leaves_the_decoder_to_next_token_prediction(form):
    module = model(dict(detach=True, lm_weight=0.7, **CONTROLS[form]), position_embedding="pope")
    objective, backbone, examples = module.objective, module.backbone, texts(*EXAMPLES)
    teacher = objective.teacher = Teacher(module) if form == "ema" else None
    got = run(module, batches_of(objective, examples, 2))
    found = gradients(module)
    wanted = reference(module, examples, teacher=teacher and teacher.backbone)
    for name, value in wanted.items():
        if name != "loss":
            assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name
    wanted["loss"].backward()
    trained = gradients(module)
    plain = JepaModel(backbone, LanguageModeling(LmOptions(), backbone, DATA))
    run(plain, batches_of(plain.objective, examples))
    expected = {name: 0.7 * grad for name, grad in gradients(plain).items()}
    heads = {name: grad for name, grad in trained.items() if name.startswith("objective.")}
    assert len(heads) > 10 and any(grad.any() for name, grad in trained.items() if name not in heads)
    assert_same_gradients(found, heads | expected)


def test_a_control_without_a_head_or_without_next_tokens_is_refused():
    with pytest.raises(ValueError, match="lm_weight: 0 leaves nothing to train the decoder with detach"):
        SpanOptions(detach=True)
    with pytest.raises(ValueError, match="predictor_layers: 0 leaves detach no head to train"):
        SpanOptions(detach=True, lm_weight=1.0, predictor_layers=0)


def test_masked_tokens_without_a_predictor_are_refused():
    with pytest.raises(ValueError, match="mlm_weight: needs the predictor's outputs, and predictor_layers is 0"):
        SpanOptions(mlm_weight=1.0, predictor_layers=0)
    assert SpanOptions(jepa_weight=0.0, mlm_weight=1.0).mlm_weight == 1


@torch.no_grad()
def test_an_evaluation_has_the_loss_of_the_masked_tokens():
    module = model(dict(mlm_weight=0.7))
    batches, wanted = (f(module.objective, texts(*EXAMPLES)) for f in (batches_of, lambda _, x: reference(module, x)))
    found = module.objective.diagnostics(module).measure(batches)
    assert found["mlm_loss"] == pytest.approx(float(wanted["mlm_loss"]), rel=1e-6)
    assert "mlm_loss" not in model({}).objective.diagnostics(model({})).measure(batches)


def test_momentum_without_a_teacher_is_refused():
    for target in ("trained", "stop_gradient"):
        with pytest.raises(ValueError, match="ema: has no effect without target: ema"):
            SpanOptions(target=target, ema={"momentum": 0.5})
    assert SpanOptions(target="ema", ema={"momentum": 0.5}).ema.momentum == 0.5


def test_flops_of_a_step_are_those_of_its_parts():
    module = model({})
    objective, backbone = module.objective, module.backbone
    batches = batches_of(objective, texts(*EXAMPLES), 2)
    count = objective.flops(backbone)
    decoder, predictor = DecoderFlops.of(backbone), objective.predictor.flops()
    least = 0
    for batch in batches:
        least += decoder.of_sequence(batch.sequences["main"], training=True)
        least += predictor.count(batch.sequences[PREDICTOR], len(batch.positions["masked"]), training=True)
    assert least < count(batches) < 2 * least  # with the collecting pass and SIGReg


def test_bad_input_is_named():
    module = model({})

    def refuse(message, data=DATA, **keys):
        with pytest.raises(InputError, match=message):
            Span(SpanOptions(**keys), module.backbone, data)

    refuse("objective.max_positions: 20 is below the 24 tokens", max_positions=20)
    facts = SimpleNamespace(kind="reversal", special={}, train=DATA.train)
    refuse("objective.name: span needs texts", data=facts)
    assert Span(SpanOptions(max_positions=30), module.backbone, DATA).predictor.mask_embedding.num_embeddings == 30
    assert Span(SpanOptions(), module.backbone, DATA).least_samples > 1
    assert Span(SpanOptions(sigreg_weight=0), module.backbone, DATA).least_samples == 1


def test_rows_of_tokens_keep_their_labels_in_the_whole_text():
    module = model({})
    data = SimpleNamespace(kind="tokens", special={}, train=DATA.train)
    objective = Span(SpanOptions(lm_weight=1.0), module.backbone, data)
    row = LabelledTokens(np.arange(3, 15), np.where(np.arange(12) % 3, np.arange(12), IGNORE))
    whole, *views = objective.view_transform()(row, SampleRNG(7, 0, 3, 0)).segments
    assert (whole.role, [*whole.tokens], [*whole.labels]) == ("sample", [*row.tokens], [*row.labels])
    assert {view.role for view in views} == {"global", "local", "predicted"}
    assert all(view.labels is None for view in views)


def test_a_model_of_transformers_can_be_the_encoder():
    keys = dict(model_type="llama", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    backbone = build_backbone(ModelOptions(family="huggingface", config=keys), 40)
    module = JepaModel(backbone, Span(SpanOptions(predictor_layers=1), backbone, DATA))
    got = run(module, batches_of(module.objective, texts(*EXAMPLES)))
    assert all(torch.isfinite(v) for v in got.values())
    found = gradients(module)
    assert {name for name, p in module.named_parameters()} - found.keys() == {"backbone.decoder.lm_head.weight"}
