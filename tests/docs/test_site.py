"""The site builds without a warning, its links and anchors lead somewhere, and nothing in it is fetched from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("sphinx", "myst_parser", "furo")
missing = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (extra docs)"),
]


class Page(HTMLParser):
    """Anchors, links and what a browser would load."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload") and values.get("href"):
            self.loaded.append(values["href"])
        elif tag in ("script", "img", "iframe") and values.get("src"):
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "trees")]
    done = subprocess.run(
        [*command, "docs", str(out / "html")], cwd=REPOSITORY, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        path.relative_to(out / "html"): Page(path.read_text()) for path in (out / "html").rglob("*.html")
    }, out / "html"


def test_every_page_is_there(site):
    pages, _ = site
    for source in (REPOSITORY / "docs").rglob("*.md"):
        assert source.relative_to(REPOSITORY / "docs").with_suffix(".html") in pages, source.name


def test_links_and_anchors_lead_somewhere(site):
    pages, root = site
    checked = 0
    for name, page in pages.items():
        for link in page.links:
            url = urlparse(link)
            if url.scheme or url.netloc:
                continue
            target = name if not url.path else Path(os.path.normpath(name.parent / unquote(url.path)))
            assert (root / target).exists(), f"{name}: {link}"
            if url.fragment and target in pages and target.suffix == ".html":
                assert not url.fragment.strip() or unquote(url.fragment) in pages[target].anchors, f"{name}: {link}"
                checked += 1
    assert checked > 50


def test_nothing_is_loaded_from_elsewhere(site):
    pages, root = site
    for name, page in pages.items():
        for source in page.loaded:
            assert not urlparse(source).netloc, f"{name}: {source}"
    for sheet in root.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_the_reference_has_what_users_build_on(site):
    pages, _ = site
    anchors = pages[Path("reference.html")].anchors
    for name in (
        "jepa_scale.inference.load",
        "jepa_scale.inference.LoadedRun.encode",
        "jepa_scale.inference.LoadedRun.generate",
        "jepa_scale.objectives.base.Objective.loss",
        "jepa_scale.engines.base.Engine.forward",
        "jepa_scale.data.base.Dataset",
        "jepa_scale.engines.ema.Teacher",
        "jepa_scale.packing.Segment",
        "jepa_scale.models.attention.packed.attention",
    ):
        assert name in anchors, name
