import multiprocessing
import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_scale.data.prepare.encoders import tokenizer as module
from jepa_scale.data.prepare.encoders.tokenizer import (
    load_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    train_bpe,
    vocabulary_size,
)
from jepa_scale.utils.errors import InputError

TEXTS = ["the cat sat on the mat, the end\n" * 20, "ein anderer Text über Züge " * 20]


def kept(cache) -> list[str]:
    return sorted(os.listdir(cache / "tokenizers"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_bpe(iter(TEXTS), 300, tmp_path_factory.mktemp("cache"), chat=True)


def test_the_same_texts_give_the_same_tokenizer(tmp_path):
    one = train_bpe(iter(TEXTS), 300, tmp_path / "a", chat=False)
    two = train_bpe(iter(TEXTS), 300, tmp_path / "b", chat=False)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)
    assert kept(tmp_path / "a") == kept(tmp_path / "b")
    for name in os.listdir(tmp_path / "a" / "tokenizers" / kept(tmp_path / "a")[0]):
        files = [tmp_path / x / "tokenizers" / kept(tmp_path / x)[0] / name for x in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_kept_tokenizer_is_not_trained_again(tmp_path, monkeypatch):
    first = train_bpe(iter(TEXTS), 300, tmp_path, chat=False)
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    again = train_bpe(iter(TEXTS), 300, tmp_path, chat=False)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(first)
    assert len(kept(tmp_path)) == 1


def test_whatever_it_depends_on_has_its_own_place(tmp_path):
    train_bpe(iter(TEXTS), 300, tmp_path, chat=False)
    train_bpe(iter(TEXTS), 301, tmp_path, chat=False)
    train_bpe(iter(TEXTS), 300, tmp_path, chat=True)
    train_bpe(iter(TEXTS[:1]), 300, tmp_path, chat=False)
    train_bpe(iter(["".join(TEXTS)]), 300, tmp_path, chat=False)
    assert len(kept(tmp_path)) == 5  # and no temporary folder


def test_the_vocabulary_is_as_large_as_asked_or_as_the_text_gives(tmp_path, trained):
    assert len(train_bpe(iter(TEXTS), 290, tmp_path, chat=True)) == 290
    assert 290 < len(trained) < 300  # there are no more pairs
    assert len(train_bpe(iter(["abab"]), 4096, tmp_path, chat=False)) < 270
    assert len(train_bpe(iter(["abab"]), 260, tmp_path, chat=True)) == 7 + 256  # what cannot be done without


def test_special_tokens_and_template(trained):
    assert special_ids(trained) == {"eos": 0, "pad": 1, "mask": 2}
    assert trained.convert_ids_to_tokens(list(range(7))) == [
        "<|endoftext|>", "<|pad|>", "<|mask|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    ]  # fmt: skip
    messages = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant", "tool")]
    text = trained.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|user|>t<|end|><|assistant|>"


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(trained, text):
    ids = trained(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert trained.decode(ids) == text


def test_training_reads_a_limited_number_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRAINED_ON", 700)
    read = []

    def texts():
        for n in range(1000):
            read.append(n)
            yield "über alles " * 10  # 120 bytes

    assert "ü" in train_bpe(texts(), 300, tmp_path, chat=False).decode(list(range(300)))
    assert len(read) == 6
    longer = train_bpe(iter(["a" * 699 + "ü" * 50]), 300, tmp_path, chat=False)  # cut inside of a character
    assert len(longer) > 259


def test_no_text_is_the_users_error(tmp_path):
    for texts in ([], ["", ""]):
        with pytest.raises(InputError, match="bpe has no readable text"):
            train_bpe(iter(texts), 300, tmp_path, chat=False)


def _race(cache, start, answers):
    start.wait()
    answers.put(tokenizer_fingerprint(train_bpe(iter(TEXTS), 300, cache, chat=False)))


def test_two_processes_may_train_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, start, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    assert len({answers.get(timeout=300) for _ in processes}) == 1
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(kept(tmp_path)) == 1


def test_losing_the_race_keeps_the_winners_folder(tmp_path, trained):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "mine").touch()
    module._save_atomic(trained, folder)
    assert os.listdir(folder) == ["mine"]
    assert os.listdir(tmp_path) == ["x"]


def test_a_tokenizer_that_is_not_there_is_the_users_error(tmp_path):
    for name in ("no/such", str(tmp_path)):
        with pytest.raises(InputError, match=f"data.tokenizer: '{name}' cannot be loaded .*save_pretrained") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)


def test_the_fingerprint_is_of_what_makes_the_ids(tmp_path, trained):
    before = tokenizer_fingerprint(trained)
    trained.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == before
    other = pickle.loads(pickle.dumps(trained))
    other(["a", "b c d"], padding=True, truncation=True, max_length=2)  # changes the backend's state, not the ids
    assert tokenizer_fingerprint(other) == before
    other.chat_template = "x"
    assert tokenizer_fingerprint(other) != before
    other = pickle.loads(pickle.dumps(trained))
    other.pad_token = "<|endoftext|>"
    assert tokenizer_fingerprint(other) != before
    other = pickle.loads(pickle.dumps(trained))
    other.add_tokens(["new"])
    assert tokenizer_fingerprint(other) != before


def test_pad_falls_back_to_eos(trained):
    other = pickle.loads(pickle.dumps(trained))
    other.pad_token = None
    assert special_ids(other)["pad"] == special_ids(other)["eos"] == 0


def test_the_vocabulary_reaches_to_the_largest_id():
    class Gap(dict):
        def get_vocab(self):
            return self

    assert vocabulary_size(Gap(a=0, b=9)) == 10 and vocabulary_size(Gap(a=0, b=0)) == 2
