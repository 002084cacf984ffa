"""GPT2WithJEPA's files of facts: ``train.json``, ``valid.json`` and ``vocab.json``.

``train.json`` is a list of ``{"input_text": [[e1_f, e1_l], [r], [mask]], "target_text": [[e2_f, e2_l]],
"type": "train"}`` (or ``"atomic"``), ``valid.json`` is ``{"train": [rows], "atomic": [rows], "test":
[rows]}``, where the split gives the kind. Tokens are ids or strings of ``vocab.json``; names have any number
of tokens. ``vocab.json`` maps tokens to ids or ids to tokens, or lists the tokens. Its special tokens are
found by their strings, at any id:

- ``<mask>``: the third part of every ``input_text``. If the vocabulary lacks it, its id is read from the rows.
- ``<r_0>`` and ``<r_0_inv>`` …: inverses of each other. Without such names, a relation at an even offset from
  the first relation is the inverse of its successor, as in GPT2WithJEPA.
- ``<pad>`` and ``<PRED>``: get new ids above all others if they are missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_scale.data.reversal.facts import ATOMIC, KINDS, TEST, TRAIN, Facts, Names, ReversalData
from jepa_scale.data.reversal.sentences import Sentences
from jepa_scale.data.reversal.spelling import TokenSpelling, token_strings
from jepa_scale.data.sampling.rng import generator
from jepa_scale.data.shards.locate import Located
from jepa_scale.data.shards.reader import ShardExamples
from jepa_scale.utils.errors import InputError

FILES = ("train.json", "valid.json", "vocab.json")
SPLITS = {"train": "valid_train", "atomic": "valid_atomic", "test": "test"}
"""Part of ``valid.json`` → split of prepared shards. The first two are samples of the training data."""
_RELATION = re.compile(r"<r_(\d+)(_inv)?>")
_TOO_LARGE = 2**24  # bound on ids, above any real vocabulary


def write(
    data: ReversalData, folder: str | Path, valid_train: int = 10_000, seed: int = 0, valid_samples: int | None = None
) -> None:
    """Write the three files, one row a line.

    Args:
        valid_samples: facts of each split in ``valid.json``; None = all of ``atomic`` and ``test``, and ``valid_train`` of
            ``train``. They are chosen by ``seed``.

    Raises:
        InputError: one of the files already exists, or the facts are sentences.
    """
    if isinstance(data.train, Sentences):
        raise InputError(
            "data.form: files of facts hold relation tokens, not sentences; write facts of data.form=tokens"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).exists():
            raise InputError(f"{folder / name}: already exists; remove it or choose another folder")
    sizes = {"train": valid_train} if valid_samples is None else dict.fromkeys(KINDS, valid_samples)
    splits = dict(data.splits)
    for split, size in sizes.items():
        name = f"reversal/{seed}/valid" + ("" if split == "train" else f"/{split}")
        chosen = generator(name).permutation(len(splits[split]))[:size]
        splits[split] = splits[split].select(np.sort(chosen))
    texts = {
        "train.json": f"[\n{_lines(data.train)}\n]\n",
        "valid.json": "{" + ",\n".join(f'"{k}": [\n{_lines(splits[k])}\n]' for k in KINDS) + "}\n",
        "vocab.json": json.dumps(token_strings(data.special, data.vocab_size), indent=0) + "\n",
    }
    for name, text in texts.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _lines(facts: Facts) -> str:
    names = [json.dumps(name, separators=(",", ":")) for name in facts.names]
    relations = facts.relations.tolist()
    columns = (facts.subject, facts.relation, facts.object, facts.kind)
    return ",\n".join(
        f'{{"input_text":[{names[s]},[{relations[r]}],[{facts.mask}]],"target_text":[{names[o]}],"type":"{KINDS[k]}"}}'
        for s, r, o, k in zip(*(c.tolist() for c in columns), strict=True)
    )


def read(folder: str | Path, first_relation: int | None = None) -> ReversalData:
    """Read the three files of a folder.

    Args:
        first_relation: the id of the first relation. If given, inverses are found by parity even if the vocabulary
            names them. Default: ``<r_0>`` of the vocabulary, else the smallest relation of the data.

    Raises:
        InputError: a file is missing or damaged, a row does not follow the format, or a held-out fact is also
            in the training data. The message names the file and the row (counted from 1).
    """
    folder = Path(folder)
    vocabulary = _Vocabulary(folder / "vocab.json")
    reader = _RowReader(vocabulary)
    parts = [*reader.train(folder / "train.json"), *reader.valid(folder / "valid.json")]
    return _assemble(vocabulary, reader, parts, first_relation)


def read_shards(located: Located, first_relation: int | None = None) -> ReversalData:
    """Read facts from prepared shards of such files; otherwise as :func:`read`."""
    folder = located.tokenizer()
    if located.index.kind != "reversal" or folder is None:
        raise InputError(f"data.path: {located.where} holds {located.index.kind}, not reversal")
    vocabulary = _Vocabulary(folder / "vocab.json")
    reader = _RowReader(vocabulary)
    parts: list[_Part] = []
    for split in ("train", *SPLITS.values()):
        there = split in located.index.splits
        rows: Any = ShardExamples(located, split, max_length=_TOO_LARGE, long="error") if there else []
        parts.append(reader.rows(f"{located.where}, {split}", rows, None if split == "train" else len(parts) - 1))
    return _assemble(vocabulary, reader, parts, first_relation)


def _assemble(
    vocabulary: _Vocabulary, reader: _RowReader, parts: list[_Part], first_relation: int | None
) -> ReversalData:
    """Join the parts to a data set: the training facts, then the three splits in the order of ``KINDS``."""
    trained, *valid = parts
    if not len(trained.rows):
        raise InputError(f"{trained.label}: holds no facts")
    mask = _mask(vocabulary, parts)
    relations = _relations(vocabulary, parts, first_relation)

    names = Names.from_tuples(sorted(reader.entities))
    rank = {name: i for i, name in enumerate(names)}
    row_of = np.array([rank[name] for name in reader.entities], dtype=np.int32)
    number = np.zeros(int(relations.max()) + 1, dtype=np.int32)
    number[relations] = np.arange(len(relations), dtype=np.int32)

    def facts(part: _Part) -> Facts:
        subject, relation, _, object_, kind = part.rows.T
        ends = row_of[subject], number[relation], row_of[object_]
        return Facts(names, relations, mask, *ends, kind.astype(np.uint8))

    train, splits = facts(trained), {KINDS[i]: facts(part) for i, part in enumerate(valid)}
    leaked = np.isin(splits["test"].codes(), train.codes())
    if leaked.any():
        raise InputError(
            f"{valid[TEST].row(leaked)}: this held-out fact is also in {trained.label}, as are "
            f"{int(leaked.sum()) - 1} others; remove them from one of the files, so that the test measures reversal"
        )
    special, size = vocabulary.special(mask, relations)
    spelling = TokenSpelling(vocabulary.ids, special["relations"])
    return ReversalData(names, train, splits, vocab_size=size, special=special, spelling=spelling)


class _BadRow(Exception):
    """A row that does not follow the format; the message gives the reason."""


class _Vocabulary:
    """The tokens of ``vocab.json``.

    Attributes:
        ids: token → id.
        known: (largest id + 1,) bool, whether the vocabulary has this id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids = self._ids(_load(path))
        if not self.ids:
            raise InputError(f"{path}: holds no tokens")
        self.known = np.zeros(max(self.ids.values()) + 1, dtype=bool)
        self.known[list(self.ids.values())] = True

    def _ids(self, content: Any) -> dict[str, int]:
        if isinstance(content, list):
            pairs: list[tuple[Any, Any]] = [(token, i) for i, token in enumerate(content)]
        elif isinstance(content, dict) and all(type(v) is int for v in content.values()):
            pairs = list(content.items())
        elif isinstance(content, dict):
            pairs = [(v, int(k) if k.isascii() and k.isdigit() and len(k) < 10 else k) for k, v in content.items()]
        else:
            raise InputError(f"{self.path}: must map tokens to ids or ids to tokens, or list the tokens")
        ids: dict[str, int] = {}
        for token, i in pairs:
            if not isinstance(token, str) or type(i) is not int or not 0 <= i < _TOO_LARGE:
                raise InputError(
                    f"{self.path}: entry {_show(token)} ↔ {_show(i)} is not a token string with an id below 2^24"
                )
            if token in ids:
                raise InputError(
                    f"{self.path}: token {_show(token)} is listed twice, with ids {ids[token]} and {i}; keep one"
                )
            ids[token] = i
        return ids

    def token(self, raw: Any) -> int:
        """Return the id of a token that a file gives as an id or as a string."""
        if type(raw) is int:
            if not (0 <= raw < len(self.known) and self.known[raw]):
                raise _BadRow(f"id {raw} is not in {self.path.name}")
            return raw
        if not isinstance(raw, str):
            raise _BadRow(f"{_show(raw)} is not a token; use an id or a string of {self.path.name}")
        if raw not in self.ids:
            raise _BadRow(f"token {_show(raw)} is not in {self.path.name}")
        return self.ids[raw]

    def special(self, mask: int, relations: np.ndarray) -> tuple[dict[str, Any], int]:
        """Return the special ids of a data set and the size of its vocabulary."""
        size = len(self.known)
        special: dict[str, Any] = {"mask": mask}
        for name, token in (("pad", "<pad>"), ("pred", "<PRED>")):
            special[name] = self.ids.get(token, size)
            size = max(size, special[name] + 1)
        return special | {"relations": relations.tolist()}, size


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of a file or of one of its splits.

    Attributes:
        rows: (F, 5) int64. Columns 0 and 3 are subject and object, as numbers of the reader's entities; columns 1
            and 2 are the ids of relation and mask; column 4 is the kind.
    """

    label: str
    rows: np.ndarray

    def row(self, bad: np.ndarray) -> str:
        """Return the name of the first bad row; ``bad`` is (F,) bool."""
        return f"{self.label}, row {int(np.flatnonzero(bad)[0]) + 1}"


class _RowReader:
    """Converter of rows to numbers while the JSON is parsed, so that the rows of a large file are never all in
    memory as Python objects."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.entities: dict[tuple[int, ...], int] = {}  # tokens → number
        self._names: dict[tuple[Any, ...], int] = {}  # the same, keyed by tokens as written in the file
        self._singles: dict[Any, int] = {}
        self._typed = True

    def train(self, path: Path) -> list[_Part]:
        self._typed = True
        return [self._part(str(path), _load(path, self._hook))]

    def valid(self, path: Path) -> list[_Part]:
        """Read ``valid.json``; returns its parts in the order of ``KINDS``."""
        self._typed = False
        content = _load(path, self._hook)
        if not isinstance(content, dict) or set(content) != set(KINDS):
            raise InputError(f'{path}: must be {{"train": [rows], "atomic": [rows], "test": [rows]}}')
        parts = [self._part(f"{path}, {kind}", content[kind]) for kind in KINDS]
        for kind, part in enumerate(parts):
            part.rows[:, 4] = kind
        return parts

    def rows(self, label: str, rows: Iterable[dict[str, Any]], kind: int | None) -> _Part:
        """Convert rows one by one; ``kind`` None = each row has its own ``type``."""
        self._typed = kind is None
        part = self._part(label, [self._hook(row) for row in rows])
        if kind is not None:
            part.rows[:, 4] = kind
        return part

    def _part(self, label: str, rows: Any) -> _Part:
        if not isinstance(rows, list):
            raise InputError(f"{label}: must be a list of rows")
        for i, row in enumerate(rows):
            if type(row) is not tuple:
                why = row if isinstance(row, _BadRow) else "must be a mapping with input_text and target_text"
                raise InputError(f"{label}, row {i + 1}: {why}")
        return _Part(label, np.array(rows, dtype=np.int64).reshape(-1, 5))

    def _hook(self, content: dict[str, Any]) -> Any:
        """Return a row's numbers, or a ``_BadRow`` that the caller raises with the row's number."""
        if not content.keys() & {"input_text", "target_text"}:
            return content
        try:
            return self._row(content)
        except _BadRow as why:
            return why

    def _row(self, content: dict[str, Any]) -> tuple[int, int, int, int, int]:
        for key in ("input_text", "target_text", "type") if self._typed else ("input_text", "target_text"):
            if key not in content:
                raise _BadRow(f"key {key!r} is missing")
        question, answer = content["input_text"], content["target_text"]
        if type(question) is not list or len(question) != 3:
            raise _BadRow("input_text must be [name, [relation], [mask]]")
        if type(answer) is not list or len(answer) != 1:
            raise _BadRow("target_text must be [name]")
        kind = -1
        if self._typed:
            if content["type"] not in ("train", "atomic"):
                raise _BadRow(f'type must be "train" or "atomic", got {_show(content["type"])}')
            kind = TRAIN if content["type"] == "train" else ATOMIC
        return (
            self._name(question[0], "input_text"),
            self._single(question[1], "relation"),
            self._single(question[2], "mask"),
            self._name(answer[0], "target_text"),
            kind,
        )

    def _name(self, raw: Any, where: str) -> int:
        if type(raw) is not list or not raw:
            raise _BadRow(f"the name in {where} must be a list of tokens, got {_show(raw)}")
        key = tuple(raw)
        try:
            return self._names[key]
        except (KeyError, TypeError):  # a new name, or one with an invalid token
            tokens = tuple(self.vocabulary.token(t) for t in raw)
        number = self.entities.setdefault(tokens, len(self.entities))
        self._names[key] = number
        return number

    def _single(self, raw: Any, what: str) -> int:
        if type(raw) is not list or len(raw) != 1:
            raise _BadRow(f"the {what} must be a list of one token, got {_show(raw)}")
        try:
            return self._singles[raw[0]]
        except (KeyError, TypeError):
            return self._singles.setdefault(raw[0], self.vocabulary.token(raw[0]))


def _mask(vocabulary: _Vocabulary, parts: list[_Part]) -> int:
    mask = vocabulary.ids.get("<mask>", int(parts[0].rows[0, 2]))
    for part in parts:
        bad = part.rows[:, 2] != mask
        if bad.any():
            raise InputError(
                f"{part.row(bad)}: token {int(part.rows[bad][0, 2])} is in the mask's position, expected {mask}"
            )
    return mask


def _relations(vocabulary: _Vocabulary, parts: list[_Part], first: int | None) -> np.ndarray:
    """Return the ids of the relations, (2R,) int32; relation number i ^ 1 is the inverse of number i."""
    matches = [(_RELATION.fullmatch(token), i) for token, i in vocabulary.ids.items()]
    named = {(int(m[1]), bool(m[2])): i for m, i in matches if m}
    used = np.unique(np.concatenate([part.rows[:, 1] for part in parts]))
    if first is None and any(inverse for _, inverse in named):
        numbers = sorted({n for n, _ in named})
        for n in numbers:
            if (n, False) not in named or (n, True) not in named:
                raise InputError(
                    f"{vocabulary.path}: relation <r_{n}> and its inverse <r_{n}_inv> must both exist; add the missing one"
                )
        relations = np.array([named[n, inverse] for n in numbers for inverse in (False, True)])
    else:
        first = named.get((0, False), int(used[0])) if first is None else first
        pairs = np.unique((used[used >= first] - first) // 2)
        relations = (first + 2 * pairs[:, None] + [0, 1]).reshape(-1)
        there = relations < len(vocabulary.known)
        there[there] = vocabulary.known[relations[there]]
        if not there.all():
            missing = int(relations[~there][0])
            raise InputError(
                f"{vocabulary.path}: has no id {missing}, but by parity from the first relation {first} it "
                f"is the inverse of a relation of the data; name the relations <r_0>, <r_0_inv>, … in that file "
                f"or set the id of the first relation (data.first_relation_token_id)"
            )
    for part in parts:
        bad = ~np.isin(part.rows[:, 1], relations)
        if bad.any():
            raise InputError(f"{part.row(bad)}: token {int(part.rows[bad][0, 1])} is not a relation of the vocabulary")
    return relations.astype(np.int32)


def _load(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_hook=hook)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a folder of facts holds {', '.join(FILES)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except ValueError as error:  # e.g. a number with thousands of digits
        raise InputError(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: lists are nested too deeply to be rows of facts") from None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
