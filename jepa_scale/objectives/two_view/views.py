"""The views of ``two_view``: a fact and its reverse, or a conversation, its question and its answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_scale.data.examples import Conversation, Turn
from jepa_scale.data.prepare.encoders.chat import turn_spans
from jepa_scale.data.prepare.encoders.chat_tokens import TurnTokenizer, bos_prefix, encode_text
from jepa_scale.data.prepare.encoders.template import render, special_pattern
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.objectives.two_view.config import TwoViewOptions
from jepa_scale.packing import IGNORE, Segment, Views
from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILLER = 0
"""Token id at the positions of predictor tokens, whose embeddings replace it."""
MARK = "\ue000"
"""Placeholder for a message's content in a rendered template."""


def paired_at(options: TwoViewOptions, draw: SampleRNG) -> bool:
    """Return whether the step has a JEPA term. It depends on the step alone, so all ranks agree."""
    if options.jepa_weight_at(draw.step) == 0:
        return False
    return options.loss_dropout == 0 or draw.step_rng("loss_dropout").random() >= options.loss_dropout


def pair_rows(keys: Sequence[int], lengths: tuple[int, int] = (1, 1), predictors: Sequence[int] = ()) -> dict[str, Any]:
    """Return the rows of a sample with one pair or none.

    Args:
        keys: identity of the second view, or nothing. lengths: number of read-out positions of the first and second view.
        predictors: index of the predictor token at each of its positions.
    """
    n = len(keys)
    return {
        "key": np.asarray(keys, np.int64),
        "source_length": np.asarray(lengths[:1] * n, np.int64),
        "target_length": np.asarray(lengths[1:] * n, np.int64),
        "predictor": np.asarray(predictors, np.int64),
    }


@dataclass(frozen=True, slots=True)
class FactViews:
    """View transform: a fact's forward view with predictor tokens and, for type ``train``, its reverse view (GPT2WithJEPA).

    Every fact is trained by next-token prediction in its forward view. The reverse view has no labels, because the reverse
    facts are samples of their own.
    """

    pred: int
    options: TwoViewOptions

    def __call__(self, fact: Any, draw: SampleRNG) -> Views:
        tokens, labels = fact.lm_sequence()
        k = self.options.predictor_tokens
        paired = fact.kind == "train" and paired_at(self.options, draw)
        forward = [*tokens, *[self.pred] * k]
        positions = {"source": [len(forward) - 1]} if paired else {}
        segments = [Segment(forward, "forward", labels=[*labels, *[IGNORE] * k], positions=positions)]
        if paired:
            reverse = [*fact.object, fact.inverse, fact.mask, *fact.subject]
            first = len(forward) if self.options.reverse_positions == "continued" else 0
            position_ids = range(first, first + len(reverse))
            segments.append(
                Segment(reverse, "reverse", position_ids=position_ids, positions={"target": [len(reverse) - 1]})
            )
        key = hash((fact.subject, fact.relation, fact.object)) & (2**63 - 1)
        return Views(segments, rows=pair_rows([key] if paired else []), counts={"pairs": int(paired)})

    def tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Return the most tokens that the views of a fact take: (m,) tokens of facts → (m,)."""
        return 2 * sizes + self.options.predictor_tokens


Parts = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
"""Tokens before the content of a view, of the content, and after it."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids that a chat template writes around a separate question and around a separate answer.

    A separate answer begins with the beginning-of-sequence token, if there is one, and the template's opening of an answer.
    It is not rendered as a conversation of its own, which some templates refuse, for example Gemma's.

    Attributes:
        around: tokens of ``before_question`` from its last special token on, and of ``after_question`` up to its first one. Text
            between special tokens is tokenised by itself, so a question that stands between these in a conversation has the
            tokens there that it has alone. Empty if there are no such tokens.
        alone: question → its tokens rendered alone, and the range of its content in them; None without a template.
    """

    before_question: tuple[int, ...] = ()
    after_question: tuple[int, ...] = ()
    before_answer: tuple[int, ...] = ()
    after_answer: tuple[int, ...] = ()
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    alone: Callable[[str], tuple[list[int], tuple[int, int]]] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, plain: bool) -> Frame:
        """Return the frame of a tokenizer's chat template, found by rendering placeholders.

        Args:
            plain: conversations were tokenised without a template. Then the frame has only the beginning of a sequence and the
                EOS after an answer.

        Raises:
            InputError: the template refuses a question without an answer, or leaves its text out.
        """
        if plain:
            start = tuple(bos_prefix(tokenizer))
            assert tokenizer.eos_token_id is not None
            return cls(start, (), start, (tokenizer.eos_token_id,))
        ask, answer = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}

        try:
            alone, prompted = render(tokenizer, [ask]), render(tokenizer, [ask], add_generation_prompt=True)
            whole = render(tokenizer, [ask, answer])
        except Exception as error:  # jinja2's errors, and any that the template's expressions raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"data.tokenizer: its chat template refuses a question alone: {reason}; set objective.plain_views: true"
            ) from None
        if alone.count(MARK) != 1 or whole.count(MARK) != 2 or not prompted.startswith(alone):
            raise InputError(
                "data.tokenizer: its chat template does not show question and answer unchanged; set data.plain: true or "
                "objective.plain_views: true"
            )
        before, _, after = alone.partition(MARK)
        bos = tokenizer.bos_token or ""
        opening = (bos if bos and before.startswith(bos) else "") + prompted[len(alone) :]
        texts = (before, after, opening, whole.rpartition(MARK)[2])
        before_question, after_question, before_answer, after_answer = (
            tuple(encode_text(tokenizer, text, raw=False)) for text in texts
        )
        return cls(
            before_question,
            after_question,
            before_answer,
            after_answer,
            around=_around(before_question, after_question, tokenizer),
            alone=partial(_alone, tokenizer, TurnTokenizer(tokenizer)),
        )

    def question(self, example: Conversation, turn: Turn) -> Parts:
        """Return the tokens of a question rendered alone: before its content, of it, and after it."""
        opening, closing = self.around
        tokens = example.tokens
        before = tokens[max(0, turn.start - len(opening)) : turn.start]
        after = tokens[turn.stop : turn.stop + len(closing)]
        stands_alone = opening and closing and tuple(before) == opening and tuple(after) == closing
        if self.alone is None or stands_alone:
            return self.before_question, tokens[turn.start : turn.stop], self.after_question
        ids, (start, stop) = self.alone(example.messages[example.turns.index(turn)]["content"])
        return ids[:start], ids[start:stop], ids[stop:]


def _around(
    before: Sequence[int], after: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    special = special_pattern(tokenizer)
    is_special = [
        [bool(special and special.fullmatch(str(tokenizer.convert_ids_to_tokens(i)))) for i in ids]
        for ids in (before, after)
    ]
    if True not in is_special[0] or True not in is_special[1]:
        return (), ()
    last = len(before) - 1 - is_special[0][::-1].index(True)
    return tuple(before[last:]), tuple(after[: is_special[1].index(True) + 1])


def _alone(tokenizer: PreTrainedTokenizerBase, turns: TurnTokenizer, content: str) -> tuple[list[int], tuple[int, int]]:
    message = [{"role": "user", "content": content}]
    text, spans, contents = turn_spans(
        message, partial(render, tokenizer), special_pattern(tokenizer), "a question alone"
    )
    found = turns.encode_turns(text, spans, contents, ())
    return found.ids, found.ranges[0]


def last_exchange(example: Conversation) -> tuple[Turn, Turn] | None:
    """Return the last question with tokens before a conversation's last answer, and that answer; None if either is missing."""
    answers = [n for n, turn in enumerate(example.turns) if turn.is_answer and turn.start < turn.stop]
    if not answers:
        return None
    asked = [turn for turn in example.turns[: answers[-1]] if turn.role == "user" and turn.start < turn.stop]
    return (asked[-1], example.turns[answers[-1]]) if asked else None


@dataclass(frozen=True, slots=True)
class ChatViews:
    """View transform: a conversation for next-token prediction, and the views of its last question and answer.

    Attributes:
        closing: ids that end an answer; they belong to the template, not to the content.
        pad: id that LLM-JEPA's code pads with; with ``legacy_loss`` it is never predicted.
    """

    options: TwoViewOptions
    frame: Frame
    closing: frozenset[int]
    pad: int | None

    def __call__(self, example: Any, draw: SampleRNG) -> Views:
        tokens, labels = example.lm_sequence()
        if self.options.legacy_loss:
            following = np.asarray(tokens[1:], np.int64)
            labels = np.append(np.where(following == self.pad, IGNORE, following), IGNORE)
        paired = isinstance(example, Conversation) and paired_at(self.options, draw)
        exchange = last_exchange(example) if paired else None
        answer = self._answer(tokens, exchange[1]) if exchange else None
        if exchange is None or answer is None:
            return Views([Segment(tokens[:-1], "text", labels=labels[:-1])], rows=pair_rows([]), counts={"pairs": 0})
        o, k = self.options, self.options.predictor_tokens
        question = self.frame.question(example, exchange[0])
        first, second = (answer, question) if o.swap_views else (question, answer)
        if o.shared_prefix:
            segments, read = self._branch(tokens[:-1], labels[:-1], exchange[0], k)
            predictors = list(range(k))
        else:
            ids, predictors, read = self._view(first, k)
            positions = {"predictor": predictors, "source": read}
            segments = [Segment(tokens[:-1], "text", labels=labels[:-1]), Segment(ids, "source", positions=positions)]
        ids, _, seen = self._view(second, 0)
        sequence = "targets" if o.target == "ema" else "main"
        segments.append(Segment(ids, "target", sequence=sequence, positions={"target": seen}))
        # the order of LLM-JEPA's code, so that its trained tokens can be used
        order = range(k) if o.predictor_place == "front" else range(k - 1, -1, -1)
        which = [0 if o.same_predictor else n for n in order][: len(predictors)]
        rows = pair_rows([_key(second[1])], (len(read), len(seen)), which)
        return Views(segments, rows=rows, counts={"pairs": 1})

    def tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Return the most tokens that the views of a conversation take: (m,) tokens of conversations → (m,). Question and
        answer are repeated, each with the template's tokens around it."""
        added = (
            self.frame.before_question,
            self.frame.after_question,
            self.frame.before_answer,
            self.frame.after_answer,
        )
        return 2 * sizes + sum(map(len, added)) + self.options.predictor_tokens

    def _answer(self, tokens: np.ndarray, answer: Turn) -> Parts | None:
        """Return the tokens of an answer alone: before its content, of it without the token that closes it, and after it; None
        if it is empty."""
        stop = min(answer.stop, len(tokens))
        if stop > answer.start and int(tokens[stop - 1]) in self.closing:
            stop -= 1
        if stop <= answer.start:
            return None
        return self.frame.before_answer, tokens[answer.start : stop], self.frame.after_answer

    def _view(self, parts: Parts, k: int) -> tuple[list[int], list[int], list[int]]:
        """Return a view's tokens up to its last read-out position, the positions of its predictor tokens, and its read-out
        positions. Later tokens are left out: attention is causal, so they have no effect on the read-out.

        Args:
            parts: tokens before the content, of the content, and after it.
        """
        before, content, after = parts
        front = k if self.options.predictor_place == "front" else 0
        back = k - front
        begin = len(before) + front
        end = begin + len(content) + back  # end of the content with its predictor tokens
        tokens = [*before, *[FILLER] * front, *map(int, content), *[FILLER] * back, *after]
        predictors = [*range(len(before), begin), *range(end - back, end)]
        if self.options.last_token is not None:
            read = [max(0, len(tokens) + self.options.last_token)]
        elif self.options.readout == "mean":
            read = list(range(begin, end))
        else:
            read = [end if self.options.readout == "closing" and len(after) else end - 1]
        cut = read[-1] + 1
        return tokens[:cut], [p for p in predictors if p < cut], read

    def _branch(
        self, tokens: Sequence[int], labels: Sequence[int], question: Turn, k: int
    ) -> tuple[list[Segment], list[int]]:
        """Return the segments of a first view that shares the conversation's prefix, and its read-out positions. With k
        predictor tokens these are a branch that begins after the question; without, the read-out is in the conversation."""
        mean = self.options.readout == "mean"
        if k == 0:
            read = list(range(question.start, question.stop)) if mean else [question.stop - 1]
            return [Segment(tokens, "text", labels=labels, positions={"source": read})], read
        asked = list(range(question.start, question.stop)) if mean else []
        added = list(range(k)) if mean else [k - 1]
        text = Segment(tokens, "text", labels=labels, positions={"source": asked} if mean else {})
        branch = Segment(
            [FILLER] * k,
            "source",
            prefix=("text", question.stop),
            positions={"predictor": list(range(k)), "source": added},
        )
        return [text, branch], [*asked, *added]


def _key(content: Sequence[int] | np.ndarray) -> int:
    """Return a hash of the tokens that is the same in every process."""
    digest = hashlib.blake2b(np.ascontiguousarray(content, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)
