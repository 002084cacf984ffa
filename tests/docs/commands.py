"""The commands that README.md and the pages of docs/ show, as lists of words."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PROGRAMS = ("jepa-scale ", "python ", "torchrun ", "deepspeed ", "scripts/", "sbatch ", "kubectl ", "source ")
VARIABLE = re.compile(r"^[A-Z_]+=\S*\s+")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh", "shell", "console")


@dataclass(frozen=True, slots=True)
class Command:
    page: str
    text: str
    fenced: bool

    @property
    def words(self) -> list[str]:
        """Without where the output goes."""
        words = shlex.split(self.text, comments=True)
        return words[: words.index(">")] if ">" in words else words


def is_command(line: str) -> bool:
    bare = line
    while VARIABLE.match(bare):
        bare = VARIABLE.sub("", bare)
    return bare.startswith(PROGRAMS)


def commands_of(page: Path) -> list[Command]:
    """Every line of a fenced shell block, every indented line and every span of code that is a command with arguments."""
    text, name = page.read_text(), str(page.relative_to(REPOSITORY))
    found = []
    for language, block in FENCE.findall(text):
        if language in SHELL:
            lines = block.replace("\\\n", " ").splitlines()
            found += [Command(name, line.strip(), True) for line in lines if line.strip() and line.strip()[0] != "#"]
    rest = FENCE.sub("", text)
    found += [
        Command(name, line.strip(), True)
        for line in rest.splitlines()
        if re.match(r"^ {4}\S", line) and is_command(line.strip())
    ]
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest):
        line = " ".join(span.split())
        if is_command(line) and (" " in line or line.startswith("scripts/")):
            found.append(Command(name, line, False))
    return found


def alternatives(words: list[str]) -> list[list[str]]:
    """``ls|verify|prune`` is three commands; ``[section.key=value …]`` and ``[--resume auto|PATH]`` may be left out."""
    kept: list[str] = []
    depth = 0
    for word in words:
        opens = word.startswith("[") and word not in ("[", "[]")
        depth += opens
        if not depth:
            kept.append(word)
        if depth and word.endswith("]"):
            depth -= 1
    made: list[list[str]] = [[]]
    for word in kept:
        choices = word.split("|") if re.fullmatch(r"[a-z]+(\|[a-z]+)+", word) else [word]
        made = [[*before, choice] for before in made for choice in choices]
    return made
