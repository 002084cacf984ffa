"""DropPath: who is dropped follows from a segment's seed, and from nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.layers.drop_path import DropPath, drop_rate, rows_kept, segments_kept
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import Segment, SegmentTable, Views, pack, pack_sequence

VOCABULARY, BLOCKS = 50, 4
SHAPE = dict(hidden_size=32, num_hidden_layers=BLOCKS, num_key_value_heads=2)
WORD = (1 << 64) - 1


def make(rate=0.6, **options):
    torch.manual_seed(0)
    backbone = build_backbone(ModelOptions(**SHAPE, drop_path=rate, **options), VOCABULARY)
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    return backbone.train()


def mixed(z):
    """SplitMix64's output function on unsigned words."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


@settings(max_examples=40)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    st.integers(1, 4),
    st.floats(0.01, 0.99),
    st.integers(0, 2),
)
def test_the_choice_is_a_hash_compared_with_the_rate(seeds, blocks, rate, stack):
    table = SegmentTable.from_lengths(range(1, len(seeds) + 1))
    kept = segments_kept(torch.tensor(seeds), table, rate, blocks, stack)
    assert kept.shape == (blocks, 2, 1, sum(table.lengths)) and kept.dtype == torch.bool
    for block in range(blocks):
        for branch in (0, 1):
            row = []
            for seed, n in zip(seeds, table.lengths, strict=True):
                counter = 1 + 2 * block + branch + (stack << 32)
                z = mixed(mixed(seed & WORD) + counter * 0x9E3779B97F4A7C15 & WORD)
                uniform = (z >> 11) / 2**53
                row += [uniform >= drop_rate(rate, block, blocks) - 1e-12] * n
            assert kept[block, branch, 0].tolist() == row


def test_splitmix_gives_its_published_numbers():
    """The first outputs of SplitMix64 from state 1234567, as its authors' and many libraries' tests have them."""
    state, out = 1234567, []
    for _ in range(3):
        state = state + 0x9E3779B97F4A7C15 & WORD
        out.append(mixed(state))
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_rates_grow_linearly_and_choices_are_independent():
    n, rate, blocks = 20_000, 0.5, 5
    seeds = torch.arange(n) + (1 << 40)  # neighbours, as the segments of a sample have them
    table = SegmentTable.from_lengths([1] * n)
    dropped = torch.cat([~segments_kept(seeds, table, rate, blocks, stack)[:, :, 0] for stack in (0, 1)]).flatten(0, 1)
    expected = torch.tensor([rate * i / 4 for i in range(5)]).repeat_interleave(2).repeat(2)
    share = dropped.double().mean(1)
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()
    random = dropped[expected > 0].double()
    neighbours = torch.cat([random[:, :-1], random[:, 1:]])  # within a segment, and of one and the next
    correlation = torch.corrcoef(neighbours) - torch.eye(len(neighbours))
    assert correlation.abs().max() < 5 / n**0.5


def test_a_kept_branch_is_scaled_so_that_its_mean_stays():
    branch = torch.randn(2, 3, 4).requires_grad_()
    kept = torch.tensor([[True, False, True], [False, False, True]])
    out = DropPath(0.2)(branch, kept)
    torch.testing.assert_close(out, branch * kept[..., None] / 0.8)
    out.sum().backward()
    torch.testing.assert_close(branch.grad, (kept[..., None] / 0.8).expand(2, 3, 4))
    assert DropPath(0.2)(branch, None) is branch and DropPath(0.0)(branch, kept) is branch


def samples(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return [Views([Segment(tokens(3 + i), "a"), Segment(tokens(5), "b")], seed=7_000 * (i + 1)) for i in range(n)]


def states(backbone, views):
    """Role and sample → states of that segment."""
    batch = pack(views)
    stream = batch.sequences["main"]
    hidden = backbone.hidden(stream)
    found = {}
    for role, numbers in batch.segments.items():
        for sample, number in zip(batch.samples[role].tolist(), numbers.tolist(), strict=True):
            found[role, views[sample].seed] = hidden[stream.first[number] : stream.last[number] + 1]
    return found


@pytest.mark.parametrize("position_embedding", ["rope", "pope"])
def test_packing_changes_no_choice(position_embedding):
    """Together, in another order and one by one, the states are the same; they are not those without DropPath."""
    backbone, views = make(position_embedding=position_embedding), samples()
    together = states(backbone, views)
    others = [states(backbone, views[::-1])]
    others.append({key: value for view in views for key, value in states(backbone, [view]).items()})
    for other in others:
        for key, value in together.items():
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-4)
    whole = states(backbone.eval(), views)
    differ = [not torch.allclose(value, whole[key], atol=1e-3) for key, value in together.items()]
    assert sum(differ) > len(differ) / 2


def test_states_are_those_of_blocks_run_by_hand():
    backbone = make()
    views = samples()
    batch = pack(views)
    stream = batch.sequences["main"]
    kept = segments_kept(stream.seeds, stream.table, 0.6, BLOCKS)
    assert not kept.all() and kept.any()
    x = backbone.embed(stream.input_ids)
    rotary = []
    for layer in backbone.layers:
        layer.register_forward_pre_hook(lambda m, a, kw: rotary.append(kw["rotary"]), with_kwargs=True)
    expected = backbone.hidden(stream)
    for number, layer in enumerate(backbone.layers):
        rate = 0.6 * number / (BLOCKS - 1)
        branch, _ = layer.self_attn(layer.input_layernorm(x[None]), rotary=rotary[0], packed=stream.table)
        x = x + branch[0] * kept[number, 0, 0, :, None] / (1 - rate)
        branch = layer.mlp(layer.post_attention_layernorm(x))
        x = x + branch * kept[number, 1, 0, :, None] / (1 - rate)
    torch.testing.assert_close(backbone.norm(x), expected, atol=1e-5, rtol=1e-4)


def test_partial_runs_and_reading_out_make_the_same_choices():
    backbone = make()
    stream = pack(samples()).sequences["main"]
    _, tap = backbone.hidden_and_tap(stream, 3)
    torch.testing.assert_close(backbone.hidden(stream, until=3), tap)
    torch.testing.assert_close(backbone.lower(3).train().hidden(stream), tap)
    torch.testing.assert_close(backbone.last_hidden(stream), backbone.hidden(stream)[stream.last], atol=1e-5, rtol=1e-4)


def test_branches_of_a_stream_make_choices_of_their_own():
    """A branch's tokens go through what its seed says, and see what its parent's says."""
    views = [Views([Segment([1, 2, 3, 4], "p"), Segment([5, 6], "b", prefix=("p", 3))], seed=900)]
    backbone = make()
    stream = pack(views).sequences["main"]
    assert torch.equal(backbone.hidden(stream), backbone.hidden(stream))
    parent = pack([Views(views[0].segments[:1], seed=900)]).sequences["main"]
    number = stream.table.lengths.index(4)
    own = slice(*stream.table.cu_seqlens[number : number + 2].tolist())
    torch.testing.assert_close(backbone.hidden(stream)[own], backbone.hidden(parent), atol=1e-5, rtol=1e-4)


def test_torchs_generator_has_no_part_in_it():
    backbone, stream = make(), pack(samples()).sequences["main"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = backbone.hidden(stream)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(backbone.hidden(stream), first)


def test_activation_checkpointing_makes_the_same_choices_again():
    grads = []
    for checkpointing in (False, True):
        backbone = make()
        if checkpointing:
            backbone.decoder.gradient_checkpointing_enable()
        backbone.hidden(pack(samples()).sequences["main"]).square().sum().backward()
        grads.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_evaluation_and_a_rate_of_zero_know_nothing_of_it():
    stream = pack(samples()).sequences["main"]
    with_it, without = make(), make(rate=0.0)
    assert torch.equal(with_it.eval().hidden(stream), without.train().hidden(stream))
    heard = []
    without.layers[0].register_forward_pre_hook(lambda m, a, kw: heard.append(kw["kept"]), with_kwargs=True)
    without.hidden(stream)
    without.hidden(pack_sequence([Segment([1, 2], "a")]))
    assert heard == [None, None]


def test_a_stream_without_seeds_is_refused_in_training_alone():
    stream = pack_sequence([Segment([1, 2], "a")])
    make().eval().hidden(stream)
    with pytest.raises(AssertionError, match="seeds"):
        make().hidden(stream)


def test_ordinary_batches_drop_row_by_row_from_torchs_generator():
    torch.manual_seed(0)
    kept = rows_kept(20_000, 0.5, 3, torch.device("cpu"))
    assert kept.shape == (3, 2, 20_000, 1)
    torch.testing.assert_close(
        1 - kept.double().mean((1, 2, 3)), torch.tensor([0, 0.25, 0.5]).double(), atol=0.01, rtol=0
    )
    backbone: Backbone = make(rate=0.9)
    ids = torch.arange(6).repeat(8, 1)
    with backbone.unpacked() as decoder:
        logits = decoder(ids, use_cache=False).logits
        assert not torch.equal(decoder(ids, use_cache=False).logits, logits)
        torch.manual_seed(3)
        first = decoder(ids, use_cache=False).logits
        torch.manual_seed(3)
        assert torch.equal(decoder(ids, use_cache=False).logits, first)
        decoder.eval()
        whole = decoder(ids, use_cache=False).logits
    assert len({tuple(row.flatten().tolist()) for row in logits}) > 2  # rows of one text, each with choices of its own
    torch.testing.assert_close(whole, whole[:1].expand_as(whole))
