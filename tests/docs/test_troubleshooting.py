"""The messages that docs/troubleshooting.md quotes as ours are those of the source."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
VALUE = "\0"


def strings() -> list[str]:
    """All string literals of the package, the values in f-strings replaced by a mark."""
    found = []
    for path in (REPOSITORY / "jepa_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else VALUE for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    page = (REPOSITORY / "docs/troubleshooting.md").read_text().partition("\n## Not ours")[0]
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def test_every_message_of_ours_is_in_the_source():
    messages, source = quoted(), strings()
    assert len(messages) > 25
    for message in messages:
        parts = [re.escape(part) for part in message.split("…")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in source), f"nobody says {message!r}"
