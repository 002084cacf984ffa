"""Passages of a corpus, labelled with their section: probe data for the representations of any corpus."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jepa_scale.data.files.raw import RawFile, open_raw
from jepa_scale.data.prepare.aliases import ALIASES
from jepa_scale.data.prepare.base import BadRecord, PrepareOptions
from jepa_scale.data.prepare.formats.files import expand, find
from jepa_scale.data.prepare.formats.source import Items, relative
from jepa_scale.data.prepare.formats.text import is_title, read_text
from jepa_scale.data.prepare.section_options import SHARED, SectionOptions
from jepa_scale.data.sampling.rng import generator
from jepa_scale.utils.errors import InputError

_WORD = re.compile(r"\S+")
_HEADING = re.compile(r"\s*= .* =\s*")
_RULE = re.compile(r"\s*([=*~^\"#+\-`'.:_])\1{2,}\s*")
_SENTENCE_END = re.compile(r".*[.!?][\"')\]]*")
_FACTOR = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2^64: every word affects the hash


@dataclass(frozen=True, slots=True)
class Passages:
    """The passages of a corpus, and counts of its sections.

    Attributes:
        rows: ``{"text", "label"}`` each, sorted by label, then in the section's order.
        sections: number of sections in the corpus.
        too_short: number of sections with too few passages.
        unclear: number of labels left out because several sections have the same title.
    """

    rows: list[dict[str, str]]
    sections: int
    too_short: int
    unclear: int


def passages(sources: Sequence[str], options: SectionOptions) -> Passages:
    """Cut non-overlapping passages, the same number from each section. The result does not depend on the corpus's location.

    Headings name the section, so no passage contains or crosses one. Text that occurs in several sections (a chapter that is
    also part of a whole book) belongs to the shortest of them: no two passages share ``SHARED`` consecutive words.

    Args:
        sources: text files or globs, or one folder of them, or an alias whose documents have names (``python_docs``,
            ``wikitext2``). A file that begins with a WikiText title (`` = Title = ``) holds one article per title, and the
            title is the label; sub-headings don't count. Any other file is labelled with the first part of its path below
            the files' common folder: a folder's name or the file's own.

    Raises:
        InputError: a source does not exist or is not text, or fewer than two sections have enough passages.
    """
    name = ", ".join(sources)
    documents: dict[str, list[str]] = {}
    titles: Counter[str] = Counter()
    for label, text, named in _documents(sources, name):
        documents.setdefault(label, []).append(text)
        titles[label] += named
    unclear = {label for label, count in titles.items() if count > 1}  # e.g. WikiText writes <unk> for rare names
    bodies = {label: _Body.of(texts) for label, texts in sorted(documents.items()) if label not in unclear}
    found = {label: _cut(body, options) for label, body in bodies.items()}
    for label, own in _own_words(bodies).items():
        found[label] = [p for p in found[label] if own[p.start : p.stop - SHARED + 1].all()]
    enough = [label for label, of_label in found.items() if len(of_label) >= options.per_class]
    if len(enough) < 2:
        most = sorted(map(len, found.values()))[-2:]
        hint = f"lower per-class to {most[0]} or less, or min-words" if len(most) == 2 else "give a corpus with more"
        raise InputError(
            f"{name}: {len(enough)} of {len(documents)} sections have {options.per_class} passages, and two are needed; {hint}"
        )
    if len(enough) > options.max_classes:
        chosen = generator(f"sections/{options.seed}").permutation(len(enough))[: options.max_classes]
        enough = [enough[i] for i in sorted(chosen.tolist())]
    rows = []
    for label in enough:
        order = generator(f"sections/{options.seed}/{label}").permutation(len(found[label]))
        taken = sorted(order[: options.per_class].tolist())
        rows += [{"text": bodies[label].text(found[label][i]), "label": label} for i in taken]
    too_short = sum(len(of_label) < options.per_class for of_label in found.values())
    return Passages(rows, len(documents), too_short, len(unclear))


# -------------------------------------------------------------------------------------------------- from source to text


def _documents(sources: Sequence[str], name: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (label, text, named) of each document. ``named``: the label is a title, which should be unique."""
    if len(sources) == 1 and sources[0] in ALIASES:
        corpus = ALIASES[sources[0]](PrepareOptions())
        if corpus.kind != "text":
            raise InputError(f"{name}: is {corpus.kind}, not text")
        for part in corpus.parts.values():
            yield from _named(part.read(), name)
        return
    paths = []
    for source in sources:
        found = expand(source)
        if not found:
            raise InputError(f"{source}: no such file or folder; correct the path, or use python_docs or wikitext2")
        paths += found
    files = find(list(dict.fromkeys(paths)), by_name=False)
    if files.format != "text":
        raise InputError(f"{name}: holds {files.format}, not text files")
    for path in files.splits["train"]:
        if _begins_with_title(path):
            yield from _named(read_text(path, "heading"), name)
        else:
            label = relative(path, files.root).split("/")[0]
            yield from ((label, text, False) for _, text in _texts(read_text(path, "file")))


def _named(items: Items, name: str) -> Iterator[tuple[str, str, bool]]:
    """Yield documents whose label is their title in the first line, or the record's name after ``#``."""
    for where, text in _texts(items):
        first = text.lstrip().partition("\n")[0]
        if is_title(first.encode()):
            yield first.strip()[1:-1].strip(), text, True
        elif "#" in where:
            yield where.partition("#")[2], text, True
        else:
            raise InputError(f"{name}: its documents have no names; give a folder of files, or WikiText")


def _texts(items: Items) -> Iterator[tuple[str, str]]:
    for item in items:
        if isinstance(item, BadRecord):
            raise InputError(str(item))
        yield item.where, item.value


def _begins_with_title(path: RawFile) -> bool:
    try:
        with open_raw(path) as file:
            return is_title(next((line for line in file if line.strip()), b""))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


# -------------------------------------------------------------------------------------------------- from text to passages


@dataclass(frozen=True, slots=True)
class _Body:
    """A section's text without headings.

    Attributes:
        blocks: the texts between headings.
        words: the words of all blocks, (block, first character, last character + 1) each.
    """

    blocks: list[str]
    words: list[tuple[int, int, int]]

    @classmethod
    def of(cls, texts: list[str]) -> _Body:
        blocks = [block for text in texts for block in _blocks(text)]
        spans = [(n, m.start(), m.end()) for n, block in enumerate(blocks) for m in _WORD.finditer(block)]
        return cls(blocks, spans)

    def word(self, number: int) -> str:
        block, start, stop = self.words[number]
        return self.blocks[block][start:stop]

    def text(self, passage: range) -> str:
        """Return the characters from a passage's first word to its last."""
        block, start, _ = self.words[passage.start]
        return self.blocks[block][start : self.words[passage.stop - 1][2]]


def _blocks(text: str) -> list[str]:
    """Split a text at its headings: lines enclosed in equals signs (WikiText), and lines underlined by a rule."""
    lines = text.splitlines()
    blocks: list[list[str]] = [[]]
    for number, line in enumerate(lines):
        after = lines[number + 1] if number + 1 < len(lines) else ""
        underlined = bool(line.strip()) and _RULE.fullmatch(after) is not None
        if _HEADING.fullmatch(line) or _RULE.fullmatch(line) or underlined:
            blocks.append([])
        else:
            blocks[-1].append(line)
    return ["\n".join(block) for block in blocks]


def _cut(body: _Body, options: SectionOptions) -> list[range]:
    """Cut a section into passages, as ranges of words.

    A passage ends at the first sentence end from ``min_words`` words on, at the latest at ``max_words``. A rest of a block
    that is shorter than ``min_words`` is left out.
    """
    found, start, n = [], 0, len(body.words)
    while start < n:
        block = body.words[start][0]
        end = start
        while end < n and end - start < options.max_words and body.words[end][0] == block:
            end += 1
            if end - start >= options.min_words and _SENTENCE_END.fullmatch(body.word(end - 1)):
                break
        if end - start >= options.min_words:
            found.append(range(start, end))
        start = end
    return found


def _own_words(bodies: dict[str, _Body]) -> dict[str, np.ndarray]:
    """Return for each label a bool array over the starts of ``SHARED`` consecutive words in its section.

    True means that these words occur here for the first time, when sections are visited from the shortest to the longest.
    """
    order = sorted(bodies, key=lambda label: (len(bodies[label].words), label))
    ids: dict[str, int] = {}
    hashes = []
    for label in order:
        words = bodies[label].words
        of_words = np.array([ids.setdefault(bodies[label].word(i), len(ids) + 1) for i in range(len(words))], np.uint64)
        total = np.zeros(max(0, len(words) - SHARED + 1), dtype=np.uint64)
        for offset in range(SHARED):
            total = total * np.uint64(_FACTOR) + of_words[offset : offset + len(total)]
        hashes.append(total)
    first = np.zeros(sum(map(len, hashes)), dtype=bool)
    first[np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]), return_index=True)[1]] = True
    ends = np.cumsum([len(h) for h in hashes])
    parts = np.split(first, ends[:-1]) if order else []
    return {label: part for label, part in zip(order, parts, strict=True)}
