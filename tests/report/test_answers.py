"""Generated answers on the page of a run."""

from __future__ import annotations

import json
import re
from html import unescape

from jepa_scale.evaluation.chat import save
from jepa_scale.evaluation.generations import generations_file, newest_generations
from jepa_scale.report.answers import LONGEST, answers_section
from jepa_scale.report.page import write_report
from jepa_scale.telemetry import load_run
from tests.report.test_page import Page, make_run


def answer(row, **changes):
    found = {"row": row, "prompt": f"ask {row}", "wanted": f"say {row}", "generated": f"said {row}", "tokens": 2}
    return found | {"stopped": True, "values": {"exact_match": row % 2}, "notes": {}, "unscored": ""} | changes


def table(html):
    """Cells of each row of the first table, as text."""
    body = html.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = body.split("</tr>")[:-1]
    return [
        [unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", r, re.S)] for r in rows
    ]


def test_a_chat_run_shows_ten_answers_with_their_prompts(tmp_path):
    run = make_run(tmp_path / "chat")
    save(generations_file(run, 3, "valid"), [answer(row, generated="an earlier one") for row in range(40)])
    save(generations_file(run, 6, "valid"), [answer(row) for row in range(40)])
    save(generations_file(run, 9, "valid"), [answer(row, generated="after the run's last row") for row in range(40)])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Answers: valid" in page.words and "10 of 40, generated after step 6." in page.words
    shown = table("".join(answers_section(load_run(run))))
    assert shown == [[str(n), f"ask {n}", f"say {n}", f"said {n}", f"exact_match {n % 2}"] for n in range(0, 40, 4)]


def test_what_was_not_generated_or_not_scored_is_told_and_texts_are_texts(tmp_path):
    run = make_run(tmp_path / "chat")
    records = [
        answer(0, prompt="<script>alert(1)</script>\u2028& more", generated=None, tokens=None, unscored="it is cut"),
        answer(1, prompt="x" * (LONGEST + 1234), wanted="a\nb"),
        {"row": 2, "prompt": "of another program"},
    ]
    save(generations_file(run, 6, "valid"), records)
    with generations_file(run, 6, "valid").open("a") as file:
        file.write('{"row": 3, "pro')
    assert len(newest_generations(run, 6)["valid"][1]) == 2
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    first, second = table("".join(answers_section(load_run(run))))
    assert first == ["0", "<script>alert(1)</script>\u2028& more", "say 0", "none", "unscored: it is cut"]
    assert second[1] == "x" * LONGEST + " … 1,234 more characters" and second[2] == "a\nb"


def test_a_run_without_answers_has_no_such_section(tmp_path):
    run = make_run(tmp_path / "lm")
    assert answers_section(load_run(run)) == []
    save(generations_file(run, 6, "valid"), [])
    assert answers_section(load_run(run)) == []


def test_each_split_shows_its_newest_answers_up_to_a_step(tmp_path):
    for step, split in ((5, "valid"), (10, "valid"), (5, "test_2"), (20, "test_2")):
        path = generations_file(tmp_path, step, split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(answer(step)) + "\n")
    newest = {
        split: (step, [r["row"] for r in records])
        for split, (step, records) in newest_generations(tmp_path, 12).items()
    }
    assert newest == {"test_2": (5, [5]), "valid": (10, [10])}
