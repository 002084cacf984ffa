"""Templates that look at more than the messages: the thinking that they allow, and today's date."""

import pytest

from jepa_scale.data.prepare.base import Record
from jepa_scale.data.prepare.encoders.chat_encoder import ChatEncoder
from jepa_scale.data.prepare.encoders.template import names_read, render
from jepa_scale.data.prepare.encoders.tokenizer import train_bpe

SAYS = "user assistant question answer think thought the a b 12 2024 Jul <think>\n\n</think>\n\n"
QWEN3 = (  # the last answer has a thought, if need be an empty one; without thinking the generation prompt has it too
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DATED = (  # as Llama 3's
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}Today: {{ date_string }}\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = train_bpe(iter([SAYS * 20]), 350, tmp_path_factory.mktemp("cache"), chat=False)
    made.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def answer_of(tokenizer, template, content):
    """What is predicted of one answer, and the whole text."""
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
    (sample,) = ChatEncoder(tokenizer, False, False, "x")(Record("here", {"messages": messages}))
    start, stop = sample.members["json"]["turns"][1]
    return tokenizer.decode(sample.members["npy"][start:stop]), tokenizer.decode(sample.members["npy"])


def test_an_empty_thought_is_no_part_of_the_answer(tokenizer):
    said, text = answer_of(tokenizer, QWEN3, "the answer")
    assert said == "the answer<|im_end|>" and "<think>\n\n</think>\n\nthe answer" in text


def test_a_real_thought_is(tokenizer):
    said, _ = answer_of(tokenizer, QWEN3, "<think>\na thought\n</think>\n\nthe answer")
    assert said == "<think>\na thought\n</think>\n\nthe answer<|im_end|>"


def test_the_date_is_the_same_on_every_day(tokenizer):
    _, text = answer_of(tokenizer, DATED, "the answer")
    assert text.startswith("Today: 26 Jul 2024\n")


@pytest.mark.parametrize("first_line", ["", "\n", "  {% if false %}{% endif %}\n"])
def test_a_template_that_asks_for_the_date_gets_the_same_on_every_day(tokenizer, first_line):
    """The rest of the template is rendered as it was, white space at its beginning too."""
    asks = first_line + "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %B') }} {{ strftime_now('%' + 'Y') }}|"
    tokenizer.chat_template = asks + QWEN3
    given = [{"role": "user", "content": "question"}]
    own = tokenizer.apply_chat_template(given, tokenize=False).partition("|")
    found = render(tokenizer, given).partition("|")
    assert found[0] == own[0][: len(own[0]) - len(own[0].lstrip())] + "2024-07-26 26 July 26 Jul 2024"
    assert found[2] == own[2]


def test_thoughts_in_several_turns_are_what_the_template_makes_of_them(tokenizer):
    """Qwen 3 leaves out the thoughts of answers that a user's message follows."""
    keeps_last = (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}"
        "{% if m.role == 'assistant' and loop.index0 < ns.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = keeps_last
    contents = ["question", "<think>\na\n</think>\n\nb <|im_end|>", "12", "<think>\nthe\n</think>\n\nanswer"]
    messages = [{"role": "assistant" if n % 2 else "user", "content": c} for n, c in enumerate(contents)]
    (sample,) = ChatEncoder(tokenizer, False, False, "x")(Record("here", {"messages": messages}))
    ids, turns = sample.members["npy"], sample.members["json"]["turns"]
    said = [tokenizer.decode(ids[slice(*turns[n])]) for n in (1, 3)]
    assert said == ["b <|im_end|><|im_end|>", "<think>\nthe\n</think>\n\nanswer<|im_end|>"]
    assert list(ids).count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4  # what is said is text


def test_names_that_a_template_reads():
    template = "{% for m in messages %}{{ m.a }}{{ m['b'] }}{% if 'c' in m %}{% generation %}{{ d }}{% endgeneration %}{% endif %}{% endfor %}"
    assert {"a", "b", "c", "d", "messages"} <= names_read(template) and "e" not in names_read(template)


def test_a_sample_knows_the_row_that_it_was(tokenizer):
    tokenizer.chat_template = QWEN3
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    (sample,) = ChatEncoder(tokenizer, False, False, "x")(Record("/some/folder/rows.jsonl:17", {"messages": messages}))
    assert sample.members["json"]["where"] == "rows.jsonl:17"  # the same bytes wherever the file lies
