"""From the rows of a split to questions, from answers to metrics and files; a model that says what it is told stands in for
the decoder, which tests/models/generation/test_batches.py and tests/distributed/test_chat_evaluation.py run."""

from __future__ import annotations

import io
import json
import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.config.parsing import parse_section
from jepa_scale.data import load_data, parse_data
from jepa_scale.data.examples import Conversation, Turn
from jepa_scale.data.shards.decode import truncate
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.evaluation.chat import ChatTest, Counter, Output, chosen, question, save, summary
from jepa_scale.evaluation.generations import generations_file
from jepa_scale.evaluation.options import ChatEvalOptions
from jepa_scale.evaluation.run import chat_test
from jepa_scale.metrics.text_match import Score, Wanted
from jepa_scale.models.generation.batches import Generated, Prompts
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.telemetry import describe
from jepa_scale.utils.errors import DataError, InputError

ALONE = ParallelContext(0, 1, 0, torch.device("cpu"), "python")
END = 255


def options(**keys: Any) -> ChatEvalOptions:
    return parse_section(ChatEvalOptions, keys, "eval")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ["exact_mach"]}, "eval.metrics: unknown metric 'exact_mach'; did you mean 'exact_match'?"),
        ({"metrics": ["zzz"]}, "eval.metrics: unknown metric 'zzz'; known: exact_match, starts_with"),
        ({"metrics": ["no_such_module:mine"]}, "eval.metrics: 'no_such_module:mine' cannot be imported"),
        ({"metrics": ["math:pi"]}, "eval.metrics: 'math:pi' is no function"),
        ({"metrics": ["math:gcd", "cmath:gcd"]}, "eval.metrics: 'cmath:gcd' cannot be imported"),
        ({"metrics": ["exact_match", "exact_match"]}, "eval.metrics: 'exact_match' is there twice"),
        ({"metrics": ["math:log", "cmath:log"]}, "eval.metrics: 'log' is there twice"),
        ({"metrics": ["multiple_choice"]}, "eval.choices: multiple_choice needs the labels"),
        ({"choices": ["A", "A"]}, "eval.choices: labels must differ"),
        ({"choices": ["A", " "]}, "eval.choices: labels must differ"),
        ({"metrics": ["sql_execution"]}, "eval.database: sql_execution needs an SQLite file"),
        ({"database_id": "(a"}, "eval.database_id: is no regular expression"),
        ({"database_id": "a"}, "eval.database_id: must have one group, for the database's name, but has 0"),
        ({"max_new_tokens": 0}, "eval.max_new_tokens:"),
        ({"micro_tokns": 0}, "eval.micro_tokns: unknown key; did you mean 'micro_tokens'?"),
    ],
)
def test_wrong_options_are_named(keys, message):
    with pytest.raises(InputError) as error:
        options(**keys)
    assert str(error.value).startswith(message)


def shared_letters(generated: str, wanted: Wanted) -> float:
    """A user's own metric."""
    if not wanted.answer:
        raise DataError(f"{wanted.name}: nothing to share")
    return len({*generated} & {*wanted.answer}) / len({*wanted.answer})


def length_score(generated: str, wanted: Wanted) -> Score:
    return Score({"length": float(len(generated)), "wanted": float(len(wanted.answer))}, "counted")


def test_a_function_of_ones_own_is_a_metric_beside_others(tmp_path):
    said = {"a": "abcd", "b": "xy", "c": ""}
    rows = [("a", "abxy"), ("b", "xy"), ("c", "")]
    names = ["exact_match", f"{__name__}:shared_letters", f"{__name__}:length_score"]
    (found,) = test_of(rows, options(metrics=names)).run(Told(said), ALONE, Output(tmp_path)).values()
    assert found["shared_letters"] == (0.5 + 1) / 2 and found["exact_match"] == 0.5  # the third row has no answer
    assert (found["length"], found["wanted"], found["unscored"]) == (3.0, 3.0, 1.0)
    assert read(tmp_path, 0)[0]["notes"][names[2]] == "counted"


def test_options_without_metrics_are_those_of_perplexity_and_generate_nothing():
    assert options(micro_tokens=5, max_samples=3).metrics == []
    assert chat_test(options(), None, None) is None  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- questions


def conversation(*said: tuple[str, str], opening: int = 1) -> Conversation:
    """A token is a character; a turn is opened by ``opening`` tokens and the assistant's closed by one."""
    tokens: list[int] = []
    turns = []
    for role, text in said:
        tokens += [1] * opening
        start = len(tokens)
        tokens += [ord(c) for c in text] + ([END] if role == "assistant" else [])
        turns.append(Turn(role, start, len(tokens)))
    return Conversation(np.array(tokens), tuple(turns), [{"role": r, "content": t} for r, t in said])


ASK = ("user", "ab")


def test_the_last_answer_is_asked_for_after_all_that_was_said_before():
    example = conversation(("system", "s"), ASK, ("assistant", "x"), ("user", "cd"), ("assistant", "yz"))
    got = question(example, 7, "valid", options())
    assert got.row == 7 and got.asked == "cd" and not got.problem
    assert got.wanted.answer == "yz" and got.wanted.name == "valid row 7" and got.wanted.database is None
    assert got.prompt.tolist() == [1, 115, 1, 97, 98, 1, 120, END, 1, 99, 100, 1]  # with what opens the answer


def test_what_follows_the_last_answer_is_not_given_away():
    example = conversation(ASK, ("assistant", "x"), ("tool", "result"), ("user", "thanks"))
    got = question(example, 0, "valid", options())
    assert got.asked == "ab" and got.wanted.answer == "x" and got.prompt.tolist() == [1, 97, 98, 1]


def test_a_conversation_that_was_cut_is_asked_only_if_the_prompt_is_whole():
    example = conversation(ASK, ("assistant", "xyz"))
    assert len(example.tokens) == 8
    whole = question(truncate(example, 5), 0, "valid", options())  # in the middle of the answer
    assert not whole.problem and whole.prompt.tolist() == [1, 97, 98, 1] and whole.wanted.answer == "xyz"
    cut = question(truncate(example, 4), 3, "valid", options())
    assert cut.problem == "valid row 3: data.max_length cuts it before its answer"
    first = question(conversation(("assistant", "hello"), opening=0), 4, "valid", options())
    assert first.problem == "valid row 4: its answer has no prompt" and first.asked == ""


@given(st.integers(0, 50), st.integers(0, 60))
def test_chosen_rows_are_spread_evenly(total, wanted):
    rows = chosen(total, wanted)
    assert len(rows) == len(set(rows)) == (min(total, wanted) if wanted else total)
    assert rows == sorted(rows) and all(0 <= r < total for r in rows)
    gaps = np.diff(rows)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert not rows or total - rows[-1] <= -(-total // len(rows))  # to the end


def database(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (name TEXT)")
    connection.executemany("INSERT INTO t VALUES (?)", [(n,) for n in names])
    connection.commit()
    connection.close()
    return path


def test_every_question_finds_its_database(tmp_path):
    wanted = database(tmp_path / "zoo" / "zoo.sqlite", "owl")
    spider = options(metrics=["sql_execution"], database=f"{tmp_path}/{{db_id}}/{{db_id}}.sqlite")

    def asked(text: str, how: ChatEvalOptions) -> Path | None:
        return question(conversation(("user", text), ("assistant", "SELECT 1")), 2, "valid", how).wanted.database

    assert asked("For db_id:[zoo]\nwho?", spider) == wanted
    assert asked("who?", options(metrics=["sql_execution"], database=str(wanted))) == wanted
    assert asked("who in <zoo>?", spider.model_copy(update={"database_id": "<(.*)>"})) == wanted
    assert asked("who?", spider.model_copy(update={"metrics": []})) is None
    for text, message in {
        "For db_id:[sea]": f"eval.database: {tmp_path}/sea/sea.sqlite does not exist, but valid row 2 needs it",
        "who?": "eval.database_id: matches no database name in valid row 2, 'who?'",
        "For db_id:[..]": "eval.database:",
    }.items():
        with pytest.raises(InputError) as error:
            asked(text, spider)
        assert str(error.value).startswith(message)
    with pytest.raises(InputError, match="^eval.database_id"):  # no way out of the folder
        asked("<../zoo/zoo>", spider.model_copy(update={"database_id": "<(.*)>"}))


# ---------------------------------------------------------------------------------------------- answers


class Told:
    """Says to each prompt what it was told to, a token a character, and END after it; at most as long as there is room."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.batches = answers, []

    def __call__(self, task: str, batch: Prompts, stop: tuple[int, ...], room: int) -> Generated:
        assert task == "generate" and stop == (END,)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        self.batches.append([len(p) for p in prompts])
        tokens = torch.zeros(len(prompts), room, dtype=torch.int64)
        lengths, stopped = [], []
        for row, prompt in enumerate(prompts):
            said = [ord(c) for c in self.answers["".join(map(chr, prompt)).strip("\1")]]
            full = [*said, END][:room]
            tokens[row, : len(full)] = torch.tensor(full)
            lengths.append(min(len(said), room))
            stopped.append(len(full) > len(said))
        return Generated(tokens, torch.tensor(lengths), torch.tensor(stopped))


def test_of(rows: list[tuple[str, str]], how: ChatEvalOptions, positions: int | None = None) -> ChatTest:
    asked = [question(conversation(("user", u), ("assistant", a)), n, "valid", how) for n, (u, a) in enumerate(rows)]
    return ChatTest(how, {"valid": asked}, lambda tokens: "".join(map(chr, tokens)), (END,), positions)


test_of.__test__ = False  # type: ignore[attr-defined]


def read(folder: Path, step: int, split: str = "valid") -> list[dict[str, Any]]:
    text = (folder / "generations" / f"step_{step:08d}_{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_metrics_are_means_over_what_can_be_scored_and_every_answer_is_kept(tmp_path):
    rows = [
        ("how many", "so\n#### 7"),
        ("q", "a\n#### 1,000"),
        ("long question", "b\n#### 3"),
        ("no number", "c"),
        ("nothing", " "),
        ("é", "d\n#### 5"),
    ]
    said = {
        "how many": "so\n#### 7",
        "q": "it is 1000",
        "long question": "none at all, and on and on",
        "no number": "c",
        "nothing": "",
        "é": "d\n#### 5 eggs",
    }
    model = Told(said)
    how = options(metrics=["exact_match", "gsm8k"], generation_batch=2, max_new_tokens=13)
    results = test_of(rows, how).run(model, ALONE, Output(tmp_path, 12))
    assert results == {
        "valid": {
            "exact_match": 1 / 4,
            "exact_match_upstream": 1 / 4,
            "gsm8k": 3 / 4,
            "gsm8k_upstream": 1 / 4,
            "stopped": 4 / 6,
            "generated": 6.0,
            "unscored": 2.0,
        }
    }
    assert model.batches == [[15, 11], [10, 9], [3, 3]]
    records = read(tmp_path, 12)
    assert [(r["row"], r["prompt"], r["wanted"]) for r in records] == [(n, u, a) for n, (u, a) in enumerate(rows)]
    assert [r["generated"] for r in records] == [t[:13] for t in said.values()]
    assert [r["stopped"] for r in records] == [True, True, False, True, True, False]  # the last by its limit
    assert [r["tokens"] for r in records] == [9, 10, 13, 1, 0, 13]
    assert records[1]["values"] == {"exact_match": 0, "exact_match_upstream": 0, "gsm8k": 1, "gsm8k_upstream": 0}
    assert records[1]["notes"] == {"gsm8k": "1000"} and records[2]["notes"] == {"gsm8k": "no number"}
    assert [bool(r["unscored"]) for r in records] == [False, False, False, True, True, False]
    assert "valid row 3: no number after '####'" in records[3]["unscored"]
    assert records[3]["values"]["exact_match"] == 1  # told, and not counted
    assert "valid row 4: the wanted answer is empty" in records[4]["unscored"]


def test_rows_that_cannot_be_asked_are_kept_and_not_counted(tmp_path):
    """Beyond the decoder's positions there is no room for an answer: a wrong one. Without a prompt there's no question."""
    made = test_of([("a" * 20, "x"), ("b", "x"), ("c" * 6, "xyz")], options(metrics=["exact_match"]), positions=10)
    cut = question(truncate(conversation(ASK, ("assistant", "x")), 4), 3, "valid", made.options)
    made = ChatTest(made.options, {"valid": [*made.questions["valid"], cut]}, made.decode, made.stop, 10)
    (result,) = made.run(Told({"b": "x", "c" * 6: "xyz"}), ALONE, Output(tmp_path, 0)).values()
    assert (result["exact_match"], result["generated"], result["unscored"]) == (1 / 3, 3.0, 1.0)
    records = read(tmp_path, 0)
    assert [r["generated"] for r in records] == ["", "x", "xy", None]  # "xyz" would need an eleventh position
    assert [r["stopped"] for r in records] == [False, True, False, False]
    assert (
        records[3]["unscored"] == "valid row 3: data.max_length cuts it before its answer" and not records[3]["values"]
    )


def test_queries_run_on_the_rows_database(tmp_path):
    database(tmp_path / "zoo.sqlite", "owl", "bee")
    database(tmp_path / "sea.sqlite", "cod")
    ask = "For db_id:[{}] who?"
    rows = [(ask.format("zoo"), "SELECT name FROM t"), (ask.format("sea"), "SELECT name FROM t")]
    said = {rows[0][0]: "SELECT name FROM t ORDER BY 1", rows[1][0]: "SELECT nam FROM t"}
    how = options(metrics=["sql_execution"], database=f"{tmp_path}/{{db_id}}.sqlite")
    (result,) = test_of(rows, how).run(Told(said), ALONE, Output(tmp_path, 3)).values()
    assert (result["sql_execution"], result["sql_execution_upstream"]) == (0.5, 0.0)
    assert "no such column: nam" in read(tmp_path, 3)[1]["notes"]["sql_execution"]


def test_labels_come_from_the_options():
    how = options(metrics=["multiple_choice"], choices=["A", "B"])
    (result,) = test_of([("q", "B"), ("p", "A")], how).run(Told({"q": "(B)", "p": "B"}), ALONE, Output()).values()
    assert (result["multiple_choice"], result["multiple_choice_upstream"]) == (0.5, 0.0)


def test_without_rows_or_scores_there_are_no_means(tmp_path):
    assert test_of([], options(metrics=["exact_match"])).run(Told({}), ALONE, Output(tmp_path)) == {}
    (result,) = test_of([("q", "")], options(metrics=["exact_match"])).run(Told({"q": ""}), ALONE, Output()).values()
    assert result == {"stopped": 1.0, "generated": 1.0, "unscored": 1.0}
    assert summary([]) == {"generated": 0.0, "unscored": 0.0}


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "generations").write_text("a file in the way")
    save(generations_file(tmp_path, 1, "valid"), [])
    assert "step_00000001_valid.jsonl was not written" in caplog.text


def test_metrics_are_described():
    for name in ("exact_match_upstream", "gsm8k", "sql_execution_upstream", "multiple_choice"):
        assert describe(name).better == "higher"
    assert describe("unscored").better == "lower" and describe("generated").better is None


# ---------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_a_file_a_message_now_and_then(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "jepa_scale")
    with Counter("generate valid", 4, shown=True, stream=(screen := Terminal())) as counter:
        counter.add(3)
    assert "generate valid" in screen.getvalue() and "/4" in screen.getvalue()
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Counter("generate valid", 4, shown=True, stream=io.StringIO()) as counter:
        for clock[0] in (1.0, 31.0, 32.0):
            counter.add(1)
    assert caplog.messages == ["generate valid  2/4"]
    with Counter("generate valid", 4, shown=False, stream=(nothing := Terminal())) as counter:
        counter.add(4)
    assert nothing.getvalue() == ""


# ---------------------------------------------------------------------------------------------- real data


def test_prompts_and_texts_of_prepared_conversations(tmp_path):
    """The prompt is what the tokenizer's template makes of the messages before, ready for the answer; what a model says
    is read without special tokens, its white space untouched."""
    from transformers import AutoTokenizer

    said = [("a cat .", "it meows , twice"), ("a dog", "woof <|end|> woof"), ("an owl", "hoo")]
    lines = [{"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]} for u, a in said]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_data(
        parse_data(
            {"source": "chat", "path": str(tmp_path / "train.jsonl"), "valid_path": str(tmp_path / "valid.jsonl")}
            | {"vocab_size": 300, "cache": str(tmp_path / "cache")}
        )
    )
    torch.manual_seed(0)
    model = ModelOptions(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=50)
    backbone = build_backbone(model, data.vocab_size)
    test = chat_test(options(metrics=["exact_match"], max_generations=2), data, backbone)
    assert test is not None and test.positions == 50
    assert test.stop == tuple(sorted((data.special["end"], data.special["eos"])))
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    assert [q.row for q in test.questions["valid"]] == [0, 1]
    for asked, (user, answer) in zip(test.questions["valid"], said, strict=False):
        whole = tokenizer.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True)
        assert asked.prompt.tolist() == list(whole["input_ids"])
        assert asked.wanted.answer == answer and asked.asked == user
    example = data.splits["valid"][0]
    turn = example.turns[1]
    assert example.tokens[turn.stop - 1] in test.stop
    assert test.decode(example.tokens[turn.start : turn.stop].tolist()) == "it meows , twice"
    test.decode([10**6])  # rows of the embedding that belong to no token can be said, too

    objective = LanguageModeling(LmOptions(), backbone, data)
    (result,) = test.run(
        lambda task, *args: getattr(objective, task)(backbone, *args), ALONE, Output(tmp_path, 5)
    ).values()
    assert result["generated"] == 2.0 and len(read(tmp_path, 5)) == 2
