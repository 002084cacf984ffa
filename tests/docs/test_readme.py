"""The links and figures of README.md lead to files, and its test command is the one of CI."""

import re

from tests.docs.commands import REPOSITORY, commands_of

README = REPOSITORY / "README.md"


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README.read_text())
    assert len(targets) > 30
    missing = [t for t in targets if "://" not in t and not (REPOSITORY / t).exists()]
    assert not missing


def test_the_two_scripts_come_first_after_the_clone():
    """CI runs the second one (.ci/run)."""
    scripts = [command.words[0] for command in commands_of(README) if command.text.startswith("scripts/")]
    assert scripts[:2] == ["scripts/quickstart.sh", "scripts/test.sh"]
    assert "scripts/test.sh" in (REPOSITORY / ".ci/run").read_text()
