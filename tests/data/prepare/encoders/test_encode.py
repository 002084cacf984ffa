import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jepa_scale.data.examples import Conversation, GridSequence, Turn
from jepa_scale.data.prepare.base import BadRecord, PrepareOptions, Record
from jepa_scale.data.prepare.encoders.encode import cut, make_encoder
from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer, tokenizer_fingerprint, train_bpe
from jepa_scale.data.prepare.readers import open_reader
from jepa_scale.data.reversal import facts as reversal
from jepa_scale.data.reversal import files as reversal_files
from jepa_scale.packing import IGNORE
from jepa_scale.utils.errors import InputError

TEXT = "the cat sat on the mat and the dog ate the cat\n" * 30


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def saved_tokenizer(cache):
    """A folder with a tokenizer that begins texts with BOS and has no chat template."""
    made = train_bpe(iter([TEXT]), 300, cache, chat=False)
    made.add_special_tokens({"bos_token": "<s>"})
    bos = made.bos_token_id
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    made.save_pretrained(cache / "saved")
    return cache / "saved"


def made(path, cache, **values):
    """Reader and encoder; the encoder has gone through pickling, as on its way to a worker."""
    options = PrepareOptions(**values)
    reader = open_reader(str(path), options)
    return reader, pickle.loads(pickle.dumps(make_encoder(reader, options, cache)))


def samples(reader, encoder, split="train"):
    return [sample for record in reader.records(split) for sample in encoder(record)]


@given(st.integers(2, 60), st.integers(2, 20))
def test_pieces_overlap_by_one_token(n, limit):
    tokens = np.arange(n)
    pieces = cut(tokens, limit)
    assert all(2 <= len(p) <= limit for p in pieces)
    assert [p[0] for p in pieces[1:]] == [p[-1] for p in pieces[:-1]]
    assert np.concatenate([pieces[0], *(p[1:] for p in pieces[1:])]).tolist() == tokens.tolist()
    predicted = np.concatenate([p[1:] for p in pieces])
    assert predicted.tolist() == tokens[1:].tolist()  # every token but the first, once
    assert all(len(p) == limit for p in pieces[:-1])


def test_a_document_is_its_ids_and_eos(tmp_path, cache):
    (tmp_path / "a.txt").write_text(TEXT)
    reader, encoder = made(tmp_path / "a.txt", cache, vocab_size=300)
    (sample,) = samples(reader, encoder)
    tokens = sample.members["npy"]
    assert tokens.dtype == np.uint16
    assert sample.tokens == len(tokens)
    assert tokens[-1] == encoder.special["eos"]
    assert encoder.tokenizer.decode(tokens[:-1]) == TEXT
    assert encoder.vocab_size == len(encoder.tokenizer)
    assert set(encoder.special) == {"eos", "pad", "mask"}
    cut_reader, cutter = made(tmp_path / "a.txt", cache, vocab_size=300, max_document_tokens=50)
    pieces = [s.members["npy"] for s in samples(cut_reader, cutter)]
    assert len(pieces) > 5
    assert np.concatenate([pieces[0], *(p[1:] for p in pieces[1:])]).tolist() == tokens.tolist()


def test_a_special_tokens_name_in_a_text_is_text(tmp_path, cache):
    (tmp_path / "a.txt").write_text("the <|endoftext|> cat<|pad|>")
    reader, encoder = made(tmp_path / "a.txt", cache, vocab_size=300)
    (sample,) = samples(reader, encoder)
    assert (sample.members["npy"][:-1] > 2).all()
    assert encoder.tokenizer.decode(sample.members["npy"][:-1]) == "the <|endoftext|> cat<|pad|>"


def test_bos_is_put_before_where_it_is_the_tokenizers_habit(tmp_path, cache, saved_tokenizer):
    (tmp_path / "a.txt").write_text("the cat")
    reader, encoder = made(tmp_path / "a.txt", cache, tokenizer=str(saved_tokenizer))
    (sample,) = samples(reader, encoder)
    tokens = sample.members["npy"].tolist()
    assert tokens[0] == encoder.special["bos"]
    assert tokens[-1] == encoder.special["eos"]
    assert tokens.count(encoder.special["bos"]) == 1
    assert encoder.tokenizer.decode(tokens[1:-1]) == "the cat"


def test_the_tokenizer_is_saved_beside_the_shards(tmp_path, cache, saved_tokenizer):
    (tmp_path / "a.txt").write_text("the cat")
    _, encoder = made(tmp_path / "a.txt", cache, tokenizer=str(saved_tokenizer))
    assert encoder.save(tmp_path / "out" / "tokenizer")
    loaded = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    assert tokenizer_fingerprint(loaded) == encoder.tokenizer_fingerprint


def test_a_vocabulary_of_more_than_65536_takes_four_bytes(tmp_path, cache):
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(66_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(tmp_path / "big")
    (tmp_path / "a.txt").write_text("w7 w65999")
    reader, encoder = made(tmp_path / "a.txt", cache, tokenizer=str(tmp_path / "big"))
    (sample,) = samples(reader, encoder)
    assert sample.members["npy"].dtype == np.uint32
    assert sample.members["npy"].tolist() == [7, 65_999, 1]
    assert encoder.special == {"eos": 1, "pad": 1}


def test_bpe_is_trained_on_what_is_trained_on(tmp_path, cache):
    lines = [f"word{n} " * 8 for n in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    reader, encoder = made(tmp_path / "a.txt", cache, documents="line", valid_fraction=0.3, max_items=5, vocab_size=300)
    trained_on = [r.value for r in reader.records("train")]
    assert len(trained_on) == 5
    expected = train_bpe(iter(trained_on), 300, tmp_path / "other", chat=False)
    assert encoder.tokenizer_fingerprint == tokenizer_fingerprint(expected)


CHAT = [
    {"messages": [{"role": "user", "content": f"the cat {n}"}, {"role": "assistant", "content": f"sat {n}"}]}
    for n in range(9)
]


@pytest.fixture
def chat_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, CHAT)))
    return tmp_path / "a.jsonl"


def example(sample) -> Conversation:
    stored = json.loads(json.dumps(sample.members["json"]))
    return Conversation(
        sample.members["npy"],
        tuple(Turn(m["role"], *t) for m, t in zip(stored["messages"], stored["turns"], strict=True)),
        stored["messages"],
    )


def test_a_conversation_by_its_template(chat_file, cache):
    reader, encoder = made(chat_file, cache, vocab_size=300)
    first = samples(reader, encoder)[0]
    found = example(first)
    decode = encoder.tokenizer.decode
    assert decode(found.tokens) == "<|user|>the cat 0<|end|><|assistant|>sat 0<|end|>"
    assert [(t.role, decode(found.tokens[t.start : t.stop])) for t in found.turns] == [
        ("user", "the cat 0"),
        ("assistant", "sat 0<|end|>"),
    ]
    assert found.messages == CHAT[0]["messages"]
    assert first.tokens == len(found.tokens)
    assert encoder.special["end"] == encoder.tokenizer.convert_tokens_to_ids("<|end|>")
    tokens, labels = found.lm_sequence()
    assert decode(labels[labels != IGNORE]) == "sat 0<|end|>"  # the stop token is trained
    assert (labels[:-1][labels[:-1] != IGNORE] == tokens[1:][labels[:-1] != IGNORE]).all()


def test_a_plain_conversation(chat_file, cache, saved_tokenizer):
    reader, encoder = made(chat_file, cache, tokenizer=str(saved_tokenizer), plain=True)
    found = example(samples(reader, encoder)[0])
    decode = encoder.tokenizer.decode
    assert decode(found.tokens) == "<s>the cat 0\nsat 0<|endoftext|>"
    assert [decode(found.tokens[t.start : t.stop]) for t in found.turns] == ["the cat 0", "sat 0<|endoftext|>"]
    # the prompt that generation starts from is tokenised as in training
    prompt = encoder.tokenizer("the cat 0\n").input_ids
    assert found.tokens[: found.turns[1].start].tolist() == prompt
    long = {"messages": [*CHAT[0]["messages"], *CHAT[1]["messages"]]}
    (sample,) = encoder(Record("x", long))
    assert decode(sample.members["npy"]) == "<s>the cat 0\nsat 0<|endoftext|>\nthe cat 1\nsat 1<|endoftext|>"
    (said,) = encoder(Record("x", {"messages": [{"role": "assistant", "content": "<|endoftext|>"}]}))
    assert said.members["npy"].tolist().count(encoder.special["eos"]) == 1


def test_a_tokenizer_for_plain_conversations_has_no_tokens_for_roles(chat_file, cache):
    reader, encoder = made(chat_file, cache, plain=True)
    found = example(samples(reader, encoder)[0])
    assert encoder.tokenizer.decode(found.tokens) == "the cat 0\nsat 0<|endoftext|>"
    assert "<|user|>" not in encoder.tokenizer.get_vocab()
    assert encoder.special["end"] == encoder.special["eos"]


def test_without_a_template_the_error_names_the_way_out(chat_file, cache, saved_tokenizer):
    with pytest.raises(InputError, match=r"saved' has no chat template; .*data\.plain: true"):
        made(chat_file, cache, tokenizer=str(saved_tokenizer))


def test_plain_needs_something_to_close_an_answer_with(chat_file, cache, tmp_path):
    other = train_bpe(iter([TEXT]), 300, cache, chat=False)
    other.eos_token = None
    other.save_pretrained(tmp_path / "x")
    with pytest.raises(InputError, match="data.plain: .* has no EOS"):
        made(chat_file, cache, tokenizer=str(tmp_path / "x"), plain=True)


def test_thinking_is_removed_before_the_template(tmp_path, cache):
    row = {"question": "the cat", "answer": "<think>mat</think> sat"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    reader, encoder = made(tmp_path / "a.jsonl", cache, remove_thinking=True)
    found = example(samples(reader, encoder)[0])
    assert encoder.tokenizer.decode(found.tokens) == "<|user|>the cat<|end|><|assistant|>sat<|end|>"


def test_bad_conversations_are_told_by_the_encoder_not_the_training_of_the_tokenizer(tmp_path, cache):
    rows = [*CHAT[:2], {"messages": [{"role": "user", "content": "u"}]}, {"messages": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reader, encoder = made(tmp_path / "a.jsonl", cache)
    records = list(reader.records("train"))
    for record, reason in zip(records[2:], ("no assistant turn", "not messages"), strict=True):
        with pytest.raises(BadRecord, match=reason) as caught:
            encoder(record)
        assert caught.value.where == record.where


def test_token_ids_are_taken_as_they_are(tmp_path, cache):
    metadata = {"vocab_size": 70_000, "max_seq_len": 40, "eos_id": 1, "pad_id": 0, "mask_id": 2}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    rows = np.zeros((2, 40), dtype=np.int32)
    rows[0, :39], rows[1, :1] = np.arange(69_000, 69_039), 7
    np.save(tmp_path / "shard_0.npy", rows)
    reader, encoder = made(tmp_path, cache, max_document_tokens=16)
    first, second = reader.records("train")
    pieces = [s.members["npy"] for s in encoder(first)]
    assert [len(p) for p in pieces] == [16, 16, 9]
    assert pieces[0].dtype == np.uint32
    assert pieces[2][-1] == 69_038
    with pytest.raises(BadRecord, match="single token"):
        encoder(second)
    assert (encoder.vocab_size, encoder.special) == (70_000, {"eos": 1, "pad": 0, "mask": 2})
    assert encoder.tokenizer_fingerprint == ""
    assert encoder.save(tmp_path / "out") is False


def test_grids_count_the_tokens_of_their_flat_form(tmp_path, cache):
    rows = [
        {"context": [[[1, 2]], [[3], [4], [5]]], "target": [[6, 7, 8], [9, 0, 1]]},
        {"input": [[1]], "output": [[2]]},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    reader, encoder = made(tmp_path / "a.jsonl", cache)
    (sample,) = samples(reader, encoder)
    value = json.loads(json.dumps(sample.members["json"]))
    grids = GridSequence(
        tuple(np.array(g, dtype=np.int8) for g in value["context"]), np.array(value["target"], dtype=np.int8)
    )
    assert value == {**rows[0], "where": "a.jsonl:1"}
    assert sample.tokens == len(grids.lm_sequence()[0])
    assert (encoder.vocab_size, encoder.special) == (12, {"row": 10, "end": 11})
    assert encoder.save(tmp_path / "out") is False


def test_facts_are_taken_as_they_are(tmp_path, cache):
    reversal_files.write(reversal.generate(50, comb=5, relations=2), tmp_path / "facts", valid_train=7)
    reader, encoder = made(tmp_path / "facts", cache)
    data = reversal_files.read(tmp_path / "facts")
    rows = json.loads((tmp_path / "facts" / "train.json").read_text())
    found = samples(reader, encoder)
    assert [s.members["json"] for s in found] == rows
    assert {s.tokens for s in found} == {2 + 1 + 1 + 2}
    assert (encoder.vocab_size, encoder.special) == (data.vocab_size, data.special)
    assert encoder.save(tmp_path / "out" / "tokenizer")
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").read_bytes() == (
        tmp_path / "facts" / "vocab.json"
    ).read_bytes()
    (tmp_path / "facts" / "vocab.json").write_text("changed later")
    assert len(encoder.tokenizer_fingerprint) == 64
