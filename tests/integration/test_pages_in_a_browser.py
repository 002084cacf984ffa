"""The pages that people look at, in a browser: light and dark, on a desk and on a phone."""

from __future__ import annotations

import html
import re
import subprocess

import matplotlib.image
import pytest

from jepa_scale.report.compare_page import write_comparison
from jepa_scale.report.page import write_report
from tests.distributed.processes import HANG
from tests.integration.daemons import needs, program
from tests.report import test_compare as test_comparison
from tests.report import test_page as test_report

PHONE = 360
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
THEMES = {"dark": 0, "light": 1}
pytestmark = [pytest.mark.matrix, needs("chromium")]


def browser(folder, *arguments):
    """Run it with a profile of its own, and return what it prints."""
    done = subprocess.run(
        [program("chromium"), *OPTIONS, f"--user-data-dir={folder / 'profile'}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["report", "comparison"])
def page(request, tmp_path):
    if request.param == "report":
        return write_report(test_report.make_run(tmp_path / "demo"))
    jepa = [test_comparison.make_run(tmp_path, f"jepa_seed{seed}", seed, "horizon") for seed in range(2)]
    return write_comparison([test_comparison.make_run(tmp_path, "lm"), *jepa], tmp_path / "comparison.html")


@pytest.mark.parametrize("theme", THEMES)
def test_it_is_drawn_in_the_readers_colours(page, theme, tmp_path):
    picture = tmp_path / f"{theme}.png"
    browser(
        tmp_path,
        f"--blink-settings=preferredColorScheme={THEMES[theme]}",
        "--window-size=1200,2400",
        f"--screenshot={picture}",
        page.as_uri(),
    )
    brightness = matplotlib.image.imread(picture)[..., :3].mean(axis=-1)
    paper = brightness[5, 5]
    assert paper < 0.1 if theme == "dark" else paper > 0.95
    marks = abs(brightness - paper) > 0.3
    assert 0.002 < marks.mean() < 0.2, "little is drawn, or not in the page's colours"
    assert marks[:1200].any(axis=1).mean() > 0.3, "the first screen is nearly empty"


def test_on_a_phone_nothing_is_wider_than_the_screen(page, tmp_path):
    """In a frame as wide as a phone: a window of the browser's cannot be so narrow."""
    frame = html.escape(page.read_text(encoding="utf-8"), quote=True)
    (tmp_path / "phone.html").write_text(
        f'<!DOCTYPE html><iframe id="phone" style="width:{PHONE}px;height:700px;border:0" srcdoc="{frame}"></iframe>'
        "<script>onload = () => { const root = document.getElementById('phone').contentDocument.documentElement;"
        "const images = [...root.querySelectorAll('img')].filter(image => !image.closest('details'));"
        "document.title = [root.clientWidth, root.scrollWidth, images.length,"
        "images.filter(image => image.complete && image.naturalWidth > 300).length].join(' '); }</script>"
    )
    dom = browser(tmp_path, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "phone.html").as_uri())
    found = re.search(r"<title>(.*)</title>", dom)
    assert found, dom[:500]
    width, needed, images, drawn = map(int, found[1].split())
    assert needed <= width <= PHONE
    assert drawn == images > 0
