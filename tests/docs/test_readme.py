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
    assert list(dict.fromkeys(scripts))[:2] == ["scripts/quickstart.sh", "scripts/test.sh"]
    assert "scripts/test.sh" in (REPOSITORY / ".ci/run").read_text()


def test_the_first_command_stands_at_the_top_with_where_it_is_typed():
    """No address of a repository is made up."""
    top = README.read_text().partition("\n## ")[0]
    assert "`git clone`" in top and "scripts/quickstart.sh" in top
    assert "REPOSITORY_URL" not in README.read_text()
