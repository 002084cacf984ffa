"""Requests of lm-eval answered by the tasks of an objective: likelihoods in packed batches, and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.distributed.comm import ParallelContext, all_gather_object, all_reduce_sum
from jepa_scale.evaluation.encode import text_batches
from jepa_scale.models.generation.batches import answer, rounds
from jepa_scale.objectives.answers import sum_by_segment
from jepa_scale.objectives.tasks import Call
from jepa_scale.packing import IGNORE, Segment, Views
from jepa_scale.utils.errors import InputError

if TYPE_CHECKING:
    from lm_eval.api.model import LM

NEW_TOKENS = 256
"""Most tokens of an answer where a task names no number, as in lm-eval's own models."""


class Continuation(NamedTuple):
    """Tokens of which the last are scored, given those before them."""

    tokens: list[int]
    scored: int


@dataclass(frozen=True, slots=True)
class Continuations:
    """Continuations as :class:`~jepa_scale.data.base.Examples`; the size of one is the number of tokens to predict from."""

    rows: Sequence[Continuation]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Continuation:
        return self.rows[number]

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        return np.array([len(self.rows[number].tokens) - 1 for number in numbers.tolist()], dtype=np.int64)

    @property
    def max_size(self) -> int:
        return max(len(row.tokens) - 1 for row in self.rows)

    @property
    def mean_size(self) -> float:
        return sum(len(row.tokens) - 1 for row in self.rows) / len(self.rows)


def views(row: Continuation, draw: SampleRNG) -> Views:
    """Return the view of a continuation, with its number among the values."""
    ignored = len(row.tokens) - 1 - row.scored
    segment = Segment(row.tokens[:-1], "text", labels=[IGNORE] * ignored + row.tokens[-row.scored :])
    return Views([segment], values={"number": draw.sample})


@dataclass(frozen=True, slots=True)
class TextModel:
    """What lm-eval has to know of a model: how texts become tokens, and how many fit.

    Attributes:
        tokenizer: of the data. prefix: id of the token before a text that has no context.
        stop: ids of the tokens that end an answer.
        positions: most tokens of a segment; None = no limit.
        micro_tokens: tokens in one forward of a rank. near: put texts of near lengths together, for padded rows.
        chat: ask the tasks through the tokenizer's chat template.
    """

    tokenizer: Any
    prefix: int
    stop: tuple[int, ...]
    positions: int | None
    micro_tokens: int
    near: bool = False
    chat: bool = False

    def templated(self, messages: list[dict[str, str]], opened: bool) -> str:
        """Return the text of a conversation by the chat template, as lm-eval has it of models of transformers.

        Args:
            opened: end with the opening of an answer; else the last message is one that goes on.
        """
        from jinja2 import TemplateError

        def render(kept: list[dict[str, str]]) -> str:
            keys = {"add_generation_prompt": opened, "continue_final_message": not opened}
            return str(self.tokenizer.apply_chat_template(kept, tokenize=False, **keys))

        try:
            return render(messages)
        except TemplateError:  # of a template without a system role, most likely
            return render([message for message in messages if message["role"] != "system"])

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Tokenize as lm-eval does for models of transformers: a tokenizer's own BOS is added once."""
        if special is None:
            bos = self.tokenizer.bos_token
            special = not (bos and text.startswith(bos))
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def scored(self, context: list[int], continuation: list[int], text: str) -> Continuation:
        """Return a continuation, cut from the left where the model does not take as many tokens.

        Raises:
            InputError: there is nothing to score, or the continuation alone is too long.
        """
        if not continuation:
            raise InputError(f"the continuation {text[:40]!r} has no token of its own")
        if self.positions is not None and len(continuation) > self.positions:
            raise InputError(
                f"the continuation {text[:40]!r} has {len(continuation):,} tokens, the model takes {self.positions:,}"
            )
        tokens = [*context, *continuation]
        return Continuation(tokens if self.positions is None else tokens[-self.positions - 1 :], len(continuation))

    def windows(self, text: str) -> list[Continuation]:
        """Return a text as continuations in which each of its tokens is scored once, by windows as long as the model takes."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        tokens = self.encode(text)
        longest = self.positions or max(1, len(tokens))
        found = get_rolling_token_windows(tokens, self.prefix, max_seq_len=longest, context_len=1)
        parts = [make_disjoint_window(window) for window in found]
        return [self.scored(context, continuation, text) for context, continuation in parts]


class Wanted(NamedTuple):
    """A request to generate.

    Attributes:
        prompt: (n,) int64, n ≥ 1. new_tokens: the most tokens of the answer. until: texts before which it ends.
    """

    prompt: np.ndarray
    new_tokens: int
    until: tuple[str, ...]


def wanted(model: TextModel, context: str, options: dict[str, Any]) -> Wanted:
    """Return what a task asks to generate after a context, which is cut from the left where positions are few.

    Raises:
        InputError: the task samples or searches, or leaves no room for a context.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    keys: dict[str, Any] = dict(normalize_gen_kwargs(options, NEW_TOKENS))
    if keys.get("do_sample") or keys.get("num_beams", 1) != 1:
        raise InputError(
            "its answers are sampled or searched for (do_sample, temperature, num_beams); here they are greedy"
        )
    new = keys["max_gen_toks"]
    if model.positions is not None and new >= model.positions:
        raise InputError(
            f"its answers may have {new:,} tokens (max_gen_toks), and the model takes {model.positions:,} with the context"
        )
    tokens = model.encode(context) or [model.prefix]
    prompt = tokens if model.positions is None else tokens[new - model.positions :]
    ends = model.tokenizer.decode([model.stop[0]]) if model.stop else None
    until = tuple(text for text in handle_stop_sequences(keys["until"], eos=ends) if text)
    return Wanted(np.array(prompt, dtype=np.int64), new, until)


def score(
    model: TextModel, call: Call, ranks: ParallelContext, rows: Sequence[Continuation], greedy: bool
) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each continuation, and whether greedy decoding gives it. Collective; the same on every rank.

    Args:
        greedy: whether the second is wanted; it takes logits of every scored token.
    """
    sums = np.zeros((len(rows), 2))
    for batch in text_batches(
        Continuations(rows), views, 0, model.micro_tokens, ranks, tokens=lambda sizes: sizes, near=model.near
    ):
        log_probs, hits = call("label_scores", batch) if greedy else (call("label_log_probs", batch), None)
        if not len(log_probs):
            continue
        of_batch = [log_probs, torch.zeros_like(log_probs) if hits is None else hits]
        numbers = batch.values["number"].cpu().numpy()
        for column, values in enumerate(of_batch):
            sums[numbers, column] = sum_by_segment(values.cpu().double().numpy(), batch)
    whole = all_reduce_sum(torch.from_numpy(sums).to(ranks.device)).tolist()  # each row comes from one rank
    return [(total, hits == row.scored) for (total, hits), row in zip(whole, rows, strict=True)]


def generate(model: TextModel, call: Call, ranks: ParallelContext, asked: Sequence[Wanted]) -> list[str]:
    """Return the greedy answer to each request, cut where it is to end. Collective; the same on every rank."""
    from lm_eval.models.utils import postprocess_generated_text

    kinds: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for number, each in enumerate(asked):
        kinds.setdefault((each.new_tokens, each.until), []).append(number)
    mine = []
    for (new, until), numbers in kinds.items():
        prompts = [asked[number].prompt for number in numbers]
        longest = max(map(len, prompts)) + new
        size = max(1, model.micro_tokens // longest) * ranks.dp_size
        for part in rounds([len(p) for p in prompts], new, model.positions, size):
            for found in answer(call, prompts, part, model.stop, ranks, ended_by(model, until)):
                text = postprocess_generated_text(model.decode(found.tokens), list(until), None)
                mine.append((numbers[found.number], text))
    return [text for _, text in sorted(row for of_rank in all_gather_object(mine) for row in of_rank)]


def ended_by(model: TextModel, until: tuple[str, ...]) -> Callable[[Tensor], Tensor] | None:
    """Return a function from generated tokens, (B, n), to whether each row has come to one of the texts, (B,) bool."""
    if not until:
        return None
    last = (
        max(len(text.encode()) for text in until) + 2
    )  # a token has a byte at least, and the first may be half a character

    def ended(tokens: Tensor) -> Tensor:
        texts = model.tokenizer.batch_decode(tokens[:, -last:], skip_special_tokens=True)
        return torch.tensor([any(end in text for end in until) for text in texts], device=tokens.device)

    return ended


def harness_model(model: TextModel, call: Call | None, ranks: ParallelContext) -> LM:
    """Return what lm-eval takes for a model. Every rank gives it the same requests; the ranks share the forwards.

    Args:
        call: None = requests are tokenized and checked, and no answer is computed.
    """
    from lm_eval.api.model import TemplateLM

    def scores(rows: Sequence[Continuation], greedy: bool) -> list[tuple[float, bool]]:
        if call is None:
            return [(-float(row.scored), False) for row in rows]
        return score(model, call, ranks, rows, greedy)

    class Model(TemplateLM):
        tokenizer = model.tokenizer
        eot_token_id = model.prefix
        prefix_token_id = model.prefix
        tokenizer_name = str(getattr(model.tokenizer, "name_or_path", ""))  # in lm-eval's cache, which is not used

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return model.templated(chat_history, add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return model.encode(string, add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            rows = [model.scored(context, continuation, texts[1]) for texts, context, continuation in requests]
            return scores(rows, greedy=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            windows = [model.windows(request.args[0]) for request in requests]
            found = iter(scores([window for of_text in windows for window in of_text], greedy=False))
            return [sum(next(found)[0] for _ in of_text) for of_text in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            asked = [wanted(model, *request.args) for request in requests]
            return ["" for _ in asked] if call is None else generate(model, call, ranks, asked)

    return Model()
