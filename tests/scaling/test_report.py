"""The report: self-contained, complete, and careful with what it claims."""

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from moescale.scaling.fit import fit
from moescale.scaling.laws import LAWS
from moescale.scaling.points import Point, variables_of
from moescale.scaling.record import Record
from moescale.scaling.report import write_report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Headings, rows, images and text of a page; checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [value for key in ("src", "href") if (value := given.get(key))]
        if tag == "h2":
            self.sections.append(given.get("id") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def report(path: Path, points: list[Point], records: dict[str, Record], **more: object) -> Page:
    content = {"title": "A study", "fits": {}, "provenance": {"code": "0.1.0"}, "warnings": []} | more
    write_report(path, points=points, records=records, **content)  # type: ignore[arg-type]
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(study: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Page:
    dense = [point for point in study.points if point.family == "dense"]
    variables, loss, _ = variables_of(dense, LAWS["chinchilla"])
    law = fit("chinchilla", variables, loss, bootstrap=20)
    path = tmp_path_factory.mktemp("report") / "report.html"
    return report(path, study.points, study.records, fits={"dense only": law}, warnings=["Mind the gap."])


def test_everything_is_there_and_inside(page: Page, study: SimpleNamespace) -> None:
    wanted = ["headline", "isoflop", "best", "compare", "curves", "domains", "noise", "router", "laws", "seeds", "runs",
              "conventions", "limits", "provenance"]  # fmt: skip
    assert page.sections == wanted
    assert len(page.sources) == 7
    for source in page.sources:
        assert source.startswith("data:image/svg+xml;base64,")
        drawing = ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
        assert drawing.tag.endswith("svg")
    text = " ".join(page.text)
    for point in study.points:
        assert point.run in text
    for part in ("Mind the gap.", "loss is not finite at step 1", "dense only: chinchilla", "42 of 43 runs finished"):
        assert part in text


def test_the_headline_says_what_was_put_in(page: Page) -> None:
    """The made-up E8G4 runs are .13 nats below dense at equal size and tokens."""
    text = " ".join(page.text)
    found = re.search(r"At 1\.0e12 FLOPs the best E8G4 model's loss is (0\.\d+) nats/token lower", text)
    assert found is not None
    assert float(found[1]) == pytest.approx(0.13, abs=0.03)
    assert "The best dense loss falls with every step in compute" in text
    assert "seed noise: unresolved" not in text


def test_hostile_names_are_shown_as_text(tmp_path: Path, study: SimpleNamespace) -> None:
    evil = "<script>alert(1)</script>"
    points = [replace(study.points[0], run=evil, family="<b>", why=evil)]
    page = report(tmp_path / "r.html", points, {}, title=evil, warnings=[evil], provenance={evil: evil})
    assert "script" not in page.open
    assert (tmp_path / "r.html").read_text().count("<script") == 0
    assert " ".join(page.text).count(evil) >= 5


def test_what_seeds_do_not_support_is_called_unresolved(tmp_path: Path, study: SimpleNamespace) -> None:
    points = [
        replace(p, loss=None if p.loss is None else p.loss + (0.2 * ((p.seed or 0) - 1) if p.seed else 0.0))
        for p in study.points
    ]
    text = " ".join(report(tmp_path / "r.html", points, {}).text)
    assert "standard deviations of the seed noise: unresolved" in text
    single = [p for p in study.points if p.seed == 0]
    text = " ".join(report(tmp_path / "r.html", single, {}).text)
    assert "No cell was run with several seeds" in text
    assert "may be chance" in text


@pytest.mark.parametrize("keep", ["nothing finished", "one run", "moe only"])
def test_poor_studies_still_make_a_page(tmp_path: Path, study: SimpleNamespace, keep: str) -> None:
    chosen = {
        "nothing finished": [p for p in study.points if p.state == "failed"],
        "one run": study.points[:1],
        "moe only": [p for p in study.points if p.family == "E8G4"],
    }[keep]
    page = report(tmp_path / "r.html", chosen, {p.run: study.records[p.run] for p in chosen})
    assert "runs" in page.sections
    assert "compare" not in page.sections


def test_a_run_that_diverged_does_not_break_the_curves(tmp_path: Path, study: SimpleNamespace) -> None:
    point = study.points[0]
    record = study.records[point.run]
    steps = [{**step, "loss": None if step["step"] > 30 else step["loss"]} for step in record.steps]
    page = report(
        tmp_path / "r.html", [replace(point, loss=math.inf, state="failed")], {point.run: Record(record.headers, steps)}
    )
    assert "curves" in page.sections
