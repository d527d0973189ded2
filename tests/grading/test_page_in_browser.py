"""The teacher's page in a real browser: its heat map is drawn, it sorts and searches, and it asks nobody for anything.

`make test-browser` runs this; it needs Debian's chromium and the extra `browser`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from course_utils.exercises import course_exercises
from course_utils.grading.reports import write_reports
from course_utils.grading.results import Settings
from course_utils.grading.weights import difficulty_weights
from tests.support.made_up_results import NASTY, a_class, all_of, made_up

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("page")]

N_LEARNERS = 300
EXERCISES = [exercise.name for exercise in course_exercises()["02"]]


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, open; `page.asked` are the addresses that it asked for, `page.complaints` the errors that it logged."""
    nasty = all_of(
        "02", f"zz {NASTY}", "wrong", causal_mask=made_up("causal_mask", "wrong", NASTY, f"causal_mask: {NASTY}")
    )
    results = [*a_class(N_LEARNERS - 1), dataclasses.replace(nasty, problems=(NASTY,))]
    report = write_reports(tmp_path_factory.mktemp("report"), results, difficulty_weights(), Settings())
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (page.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(report.as_uri())
    yield page
    page.close()


def names(page: Any) -> list[str]:
    return page.locator("#map-02 tbody tr:visible th").all_text_contents()


def test_the_heat_map_is_drawn(page: Any) -> None:
    cells = page.locator("#map-02 tbody td:not(.points)")
    assert cells.count() == N_LEARNERS * len(EXERCISES)
    colours = page.evaluate(
        """() => Object.fromEntries(["correct", "wrong", "unwritten", "timeout", "cheated", "error"].map(name => {
            const cell = document.querySelector(`#map-02 td.${name}`), box = cell.getBoundingClientRect();
            return [name, [getComputedStyle(cell).backgroundColor, box.width > 8 && box.height > 8]];
        }))"""
    )
    assert all(large for _, large in colours.values())
    assert len({colour for colour, _ in colours.values()}) == 6
    assert colours["correct"][0] == "rgb(0, 114, 178)" and colours["wrong"][0] == "rgb(230, 159, 0)"
    assert page.locator("#map-02 thead th").all_text_contents() == ["learner", "points", *EXERCISES]


def test_what_learners_wrote_is_text(page: Any) -> None:
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert f"zz {NASTY}" in names(page)
    assert page.get_by_role("cell", name=NASTY, exact=True).count() == 1  # the problem


def test_columns_sort_and_names_are_found(page: Any) -> None:
    in_order = names(page)
    page.get_by_role("button", name="points").first.click()
    points = page.locator("#map-02 tbody td.points").all_text_contents()
    reached = [float(text.split(" of ")[0]) for text in points]
    assert reached == sorted(reached) and len(set(reached)) > 10
    page.get_by_role("button", name="learner", exact=True).first.click()
    assert sorted(names(page)) == sorted(in_order)
    page.get_by_label("Show the learner").fill("LEARNER-007")
    assert names(page) == ["learner-007"]
    page.get_by_label("Show the learner").fill("")
    assert len(names(page)) == N_LEARNERS


def test_nothing_was_asked_for_and_nothing_went_wrong(page: Any) -> None:
    assert [address.rpartition("/")[2] for address in page.asked] == ["report.html"]
    assert page.complaints == []
