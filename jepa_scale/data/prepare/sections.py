"""Passages of a corpus, labelled with the section that they come from: a test of representations for any corpus."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no word's part in a hash is lost


@dataclass(frozen=True, slots=True)
class Passages:
    """Attributes:
    rows: ``{"text", "label"}``, sorted by label, in a section in its order.
    sections: of the corpus. too_short: of them without enough passages. unclear: those whose name others have, too.
    """

    rows: list[dict[str, str]]
    sections: int
    too_short: int
    unclear: int


def passages(sources: Sequence[str], options: SectionOptions) -> Passages:
    """Passages that do not overlap, as many of each section. The same corpus gives the same ones wherever it lies.

    Headings, which name the section, are in no passage, and no passage goes across one. Text that stands in several sections
    (a chapter beside the book that it is in) counts to the shortest of them: no two passages share ``SHARED`` words in a row.

    Args:
        sources: text files or globs, or one folder of them, or an alias whose documents have names (``python_docs``,
            ``wikitext2``). A file that begins with a title as WikiText has it (`` = Title = ``) holds an article a title, which
            is the label; sub-headings don't count. Any other file is labelled with the folder that it is in, counted from
            where the files have their first folder in common, or with its own name.

    Raises:
        InputError: there is nothing of that name, it is no text, or there are not two sections with enough passages.
    """
    name = ", ".join(sources)
    documents: dict[str, list[str]] = {}
    titles: Counter[str] = Counter()
    for label, text, named in _documents(sources, name):
        documents.setdefault(label, []).append(text)
        titles[label] += named
    unclear = {label for label, count in titles.items() if count > 1}  # as where WikiText has <unk> for a rare name
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
    """Label, text, and whether the label is a title, of which each should be the only one."""
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
            raise InputError(f"{source}: no such file or folder; give one, or python_docs, or wikitext2")
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
    """Documents that begin with their title, or whose record has a name after ``#``."""
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


def _begins_with_title(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return is_title(next((line for line in file if line.strip()), b""))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


# -------------------------------------------------------------------------------------------------- from text to passages


@dataclass(frozen=True, slots=True)
class _Body:
    """A section's text without headings.

    Attributes:
        blocks: what stands between headings.
        words: of all blocks, (block, first character, last one + 1) each.
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
        """The characters from a passage's first word to its last."""
        block, start, _ = self.words[passage.start]
        return self.blocks[block][start : self.words[passage.stop - 1][2]]


def _blocks(text: str) -> list[str]:
    """The text between headings: lines in equals signs, as WikiText has them, and lines that a rule underlines."""
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
    """Passages as ranges of words, one after another; each ends with the first sentence that ends at ``min_words`` or later,
    else at ``max_words``. What is left of a block, if shorter, is in none."""
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
    """Label → of each word of its section, bool: whether the ``SHARED`` words that begin with it stand here first, sections
    being gone through from the shortest to the longest."""
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
