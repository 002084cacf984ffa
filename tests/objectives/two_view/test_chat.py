"""`two_view` on conversations against upstream's way: three rows a sample, each a forward of its own."""

import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from jepa_scale.config.parsing import parse_section
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.objectives.base import JepaModel
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.objectives.two_view.objective import TwoView, TwoViewOptions
from jepa_scale.packing import IGNORE, pack
from jepa_scale.utils.errors import InputError
from tests.objectives.chats import backbone, batch_of, chat_data, conversations

ROWS = conversations(8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chat_data(tmp_path_factory.mktemp("llama"), "llama", ROWS)


def make(model, data, **options):
    torch.manual_seed(5)
    return TwoView(TwoViewOptions(**options), model, data)


def states_of(model, objective, ids):
    """(n, d) of one row by itself, through the decoder's ordinary attention; a predictor token is given as −1 − its number."""
    ids = torch.tensor(ids)
    embeds = model.embed(ids.clamp(min=0))
    if objective.predictors is not None:
        embeds = torch.where((ids < 0)[:, None], objective.predictors((-1 - ids).clamp(min=0)), embeds)
    with model.unpacked() as decoder:
        return decoder.base_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]


def reference(model, objective, data):
    """(lm, source rows, target rows): the template's own renderings of the conversation, the user's turn, the assistant's."""
    o = objective.options
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)

    def render(messages):
        return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]

    end = tokenizer.convert_tokens_to_ids("<|eot|>")
    losses, sources, targets = [], [], []
    for row in ROWS:
        whole = render(row)
        states = states_of(model, objective, whole)
        start = (
            len(render(row[:-1])) + len(render([{"role": "assistant", "content": ""}])) - 2
        )  # bos and eot are no header
        for t in range(start, len(whole)):
            losses.append(F.cross_entropy(model.logits(states[t - 1]), torch.tensor(whole[t])))
        asked, answered = render(row[1:2]), render(row[2:])
        assert asked[-1] == answered[-1] == end
        predictors = [-1 - n for n in reversed(range(o.predictor_tokens))]
        first = [*asked[:-1], *predictors, end]
        sources.append(states_of(model, objective, first)[-2])
        targets.append(states_of(model, objective, answered)[-2])
    return torch.stack(losses).mean(), torch.stack(sources), torch.stack(targets)


def distance_of(kind, a, b, temperature=0.1):
    if kind == "infonce":
        scores = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / temperature
        return F.cross_entropy(scores, torch.arange(len(a)))
    return {
        "cosine": lambda: (1 - F.cosine_similarity(a, b)).mean(),
        "l2": lambda: (a - b).norm(dim=-1).mean(),
        "mse": lambda: F.mse_loss(a, b),
    }[kind]()


def gradients(model, objective):
    return [p.grad.clone() for p in [*model.parameters(), *objective.parameters()]]


def step(model, objective, examples, borders):
    """The loss of a step, one micro-batch from each border to the next."""
    whole = batch_of(objective, examples)
    parts = [batch_of(objective, examples[a:b], first=a, like=examples[0]) for a, b in pairwise(borders)]
    batches = [replace(part, totals=whole.totals, max_samples=8) for part in parts]
    joined = JepaModel(model, objective)
    with torch.no_grad():
        gathered = [joined("gather", b) for b in batches] if objective.needs_global_batch and len(parts) > 1 else []
    total = 0.0
    for number, batch in enumerate(batches):
        loss = joined("loss", batch, gathered, number)
        loss.total.backward()
        total += float(loss.means["loss"])
    return total


@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("distance", ["cosine", "l2", "mse", "infonce"])
def test_packed_views_equal_three_forwards(data, distance, k):
    model = backbone("llama", data.vocab_size)
    objective = make(model, data, distance=distance, predictor_tokens=k, jepa_weight=0.7, lm_weight=1.3)
    loss = objective.loss(model, batch_of(objective, list(data.train)), [], 0)
    loss.total.backward()
    got = gradients(model, objective)
    model.zero_grad(), objective.zero_grad()
    lm, sources, targets = reference(model, objective, data)
    jepa = distance_of(distance, sources, targets)
    (1.3 * lm + 0.7 * jepa).backward()
    torch.testing.assert_close(loss.means["lm_loss"], lm.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.means["jepa_loss"], jepa.detach(), atol=1e-5, rtol=1e-5)
    for a, b in zip(got, gradients(model, objective), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("distance", ["cosine", "infonce"])
@pytest.mark.parametrize("regularizer", ["none", "vicreg", "sigreg"])
def test_accumulation_changes_nothing(data, distance, regularizer):
    examples = list(data.train)
    results = []
    for borders in ([0, 8], [0, 3, 5, 5, 8]):
        model = backbone("llama", data.vocab_size)
        objective = make(model, data, distance=distance, regularizer=regularizer)
        results.append((step(model, objective, examples, borders), gradients(model, objective)))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("readout", ["content", "mean"])
def test_a_shared_prefix_reads_what_a_whole_view_would(data, k, readout):
    """The same as a first view that repeats the conversation up to the end of the question."""
    model = backbone("llama", data.vocab_size)
    objective = make(model, data, shared_prefix=True, predictor_tokens=k, readout=readout)
    examples = list(data.train)
    batch = batch_of(objective, examples)
    loss = objective.loss(model, batch, [], 0)
    source, _ = objective.readouts(objective._states(model, batch)[1], batch)
    for row, example in zip(source, examples, strict=True):
        question = example.turns[1]
        ids = [*example.tokens[: question.stop].tolist(), *(-1 - n for n in reversed(range(k)))]
        states = states_of(model, objective, ids)
        expected = states[-1] if readout == "content" else states[question.start :].mean(dim=0)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
    apart = make(model, data, predictor_tokens=k)
    assert batch.num_tokens < batch_of(apart, examples).num_tokens
    lm = apart.loss(model, batch_of(apart, examples), [], 0).means["lm_loss"]
    torch.testing.assert_close(loss.means["lm_loss"], lm)


def test_the_teacher_encodes_the_second_view(data):
    model = backbone("llama", data.vocab_size)
    objective = make(model, data, target="ema")
    (path,) = objective.teacher_copies(model)
    copied = objective.teacher_copies(model)[path]
    assert path == "backbone"
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)

    class Stands:
        def forward(self, path, stream):
            return copied(stream)

    objective.teacher = Stands()
    batch = batch_of(objective, list(data.train))
    _, target = objective.readouts(objective._states(model, batch)[1], batch)
    assert not target.requires_grad
    own = make(model, data)
    plain = batch_of(own, list(data.train))
    _, trained = own.readouts(own._states(model, plain)[1], plain)
    assert (target - trained).abs().max() > 0.1
    halved = make(copied, data)
    _, expected = halved.readouts(copied.hidden(plain.sequences["main"]).detach(), plain)
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-4)


def test_stop_gradient_trains_the_first_view_alone(data):
    model = backbone("llama", data.vocab_size)
    objective = make(model, data, target="stop_gradient", lm_weight=0.0, predictor_tokens=0)
    batch = batch_of(objective, list(data.train))
    hidden, states = objective._states(model, batch)
    source, target = objective.readouts(states, batch)
    assert source.requires_grad and not target.requires_grad


CONTROLS = {
    "cosine": {},
    "infonce": dict(distance="infonce", regularizer="vicreg", predictor_tokens=2),
    "inner states": dict(regularizer="sigreg", tap_layer=1, shared_prefix=True),
    "legacy": dict(legacy_loss=True, distance="infonce"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_control_leaves_the_decoder_to_next_token_prediction(data, name):
    keys = dict(linear_predictor=True, **CONTROLS[name])
    found = {}
    for form, more in (("plain", dict(jepa_weight=0.0)), ("trained", {}), ("control", dict(detach=True))):
        model = backbone("llama", data.vocab_size)
        objective = make(model, data, **keys, **more)
        step(model, objective, list(data.train), [0, 3, 8])
        assert objective.predictors.weight.requires_grad is (form != "control")
        found[form] = {n: p.grad for n, p in model.named_parameters()}, objective.linear.weight.grad
    if name != "legacy":
        model = backbone("llama", data.vocab_size)
        lm = LanguageModeling(LmOptions(), model, data)
        step(model, lm, list(data.train), [0, 8])
        found["plain"] = {n: p.grad for n, p in model.named_parameters()}, None
    (plain, _), (trained, wanted), (control, got) = (found[form] for form in ("plain", "trained", "control"))
    for key, grad in plain.items():
        torch.testing.assert_close(control[key], grad, atol=1e-6, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert any(not torch.allclose(trained[key], grad, atol=1e-4) for key, grad in plain.items())
    assert got.any() and torch.equal(got, wanted)  # the matrix learns the same from these states


def test_read_after_an_inner_block(data):
    model = backbone("llama", data.vocab_size)
    objective = make(model, data, tap_layer=1, predictor_tokens=0)
    batch = batch_of(objective, list(data.train))
    source, _ = objective.readouts(objective._states(model, batch)[1], batch)
    states = model.hidden(batch.sequences["main"], until=1)
    torch.testing.assert_close(source, states[batch.positions["source"]])


def test_the_legacy_loss_is_upstreams(data):
    """Every token but padding is predicted, padding being EOS; a mean over the micro-batch, not over the global one."""
    model = backbone("llama", data.vocab_size)
    objective = make(model, data, legacy_loss=True, distance="infonce", temperature=0.07)
    examples = list(data.train)
    pad = data.special["pad"]
    halves = [batch_of(objective, examples[:5]), batch_of(objective, examples[5:])]
    assert not objective.needs_global_batch
    for batch, part in zip(halves, (examples[:5], examples[5:]), strict=True):
        loss = objective.loss(model, replace(batch, totals={}), [], 0)
        labels = [int(t) for example in part for t in example.tokens[1:] if t != pad]
        assert sorted(labels) == sorted(
            batch.sequences["main"].labels[batch.sequences["main"].labels != IGNORE].tolist()
        )
        losses = []
        for example in part:
            ids = example.tokens.tolist()
            logits = model.logits(states_of(model, objective, ids))
            losses += [F.cross_entropy(logits[t], torch.tensor(ids[t + 1])) for t in range(len(ids) - 1)]
        torch.testing.assert_close(loss.means["lm_loss"], torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)
        hidden, states = objective._states(model, batch)
        source, target = objective.readouts(states, batch)
        torch.testing.assert_close(loss.means["jepa_loss"], distance_of("infonce", source, target, 0.07))
        torch.testing.assert_close(loss.total, loss.means["lm_loss"] + loss.means["jepa_loss"])


def test_predictor_tokens_that_the_tokenizer_has_are_where_ours_begin(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jepa_scale")
    data = chat_data(tmp_path, "llama", ROWS)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|predictor_2|>"]})
    tokenizer.save_pretrained(data.tokenizer)
    model = backbone("llama", len(tokenizer))
    objective = make(model, data, predictor_tokens=3)
    assert (
        "the tokenizer has <|predictor_2|>; the predictor tokens are initialised with their embeddings" in caplog.text
    )
    same = [
        any(torch.equal(row, known) for known in model.decoder.get_input_embeddings().weight)
        for row in objective.predictors.weight
    ]
    assert same == [False, True, False]


def test_weights_over_the_steps(data):
    options = TwoViewOptions(jepa_weight=2.0, jepa_start=10, jepa_ramp=4, min_jepa_weight=1.0)
    assert [options.jepa_weight_at(s) for s in (0, 9, 10, 12, 14, 100)] == [0, 0, 1.0, 1.5, 2.0, 2.0]
    model = backbone("llama", data.vocab_size)
    objective = make(model, data, jepa_start=3)
    counts = [batch_of(objective, list(data.train), step).counts["pairs"] for step in (2, 3)]
    assert counts == [0, 8]
    loss = objective.loss(model, batch_of(objective, list(data.train), 2), [], 0)
    torch.testing.assert_close(loss.total, loss.means["lm_loss"])


def test_diagnostics_show_a_collapse(data):
    model = backbone("llama", data.vocab_size)
    objective = make(model, data, jepa_weight=0.0, loss_dropout=0.5)

    def call(task, batch):
        with torch.no_grad():
            return getattr(objective, task)(model, batch)

    found = objective.diagnostics(call)
    views = found.views
    batches = [pack([views(example, SampleRNG(0, 0, 0, i)) for i, example in enumerate(data.train)])]
    healthy = found.measure(batches)
    assert healthy["retrieval_chance"] == pytest.approx(1 / 8)
    assert healthy["effective_rank_directions"] > 3 and healthy["view_cosine_others"] < 0.9
    directions = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)) * 0.02 + 1

    def alike(task, batch):
        return {"source": directions[0], "target": directions[1], "key": torch.arange(8)}

    found.call = alike
    collapsed = found.measure(batches)
    assert collapsed["view_cosine"] > 0.99 and collapsed["view_cosine_others"] > 0.99
    assert collapsed["effective_rank_directions"] < 1.5 and collapsed["effective_rank"] > 3  # centred, noise has rank


def test_what_does_not_fit_is_refused_by_name(data):
    model = backbone("llama", data.vocab_size)
    for clash in (
        "swap_views: true",
        "plain_views: true",
        "predictor_place: front",
        "readout: closing",
        "last_token: -2",
    ):
        key, _, value = clash.partition(": ")
        parsed = {"true": True, "-2": -2}.get(value, value)
        with pytest.raises(InputError, match=rf"^objective\.{key}: .*shared_prefix"):
            parse_section(TwoViewOptions, {"shared_prefix": True, key: parsed}, "objective")
    with pytest.raises(InputError, match=r"^objective\.lm_weight: 0 leaves nothing to train the decoder with detach"):
        parse_section(TwoViewOptions, {"detach": True, "linear_predictor": True, "lm_weight": 0.0}, "objective")
    with pytest.raises(InputError, match=r"^objective\.linear_predictor: is all that detach trains"):
        parse_section(TwoViewOptions, {"detach": True}, "objective")
    with pytest.raises(InputError, match=r"^objective\.ema: has no effect without target: ema"):
        parse_section(TwoViewOptions, {"ema": {"momentum": 0.5}}, "objective")
    with pytest.raises(InputError, match="legacy_loss"):
        parse_section(TwoViewOptions, {"legacy_loss": True, "target": "ema"}, "objective")
    with pytest.raises(InputError, match=r"objective\.tap_layer: 0 is outside"):
        make(model, data, tap_layer=0)
    with pytest.raises(InputError, match=r"objective\.tap_layer: 9 is outside"):
        make(model, data, tap_layer=9)
