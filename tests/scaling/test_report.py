"""The report: self-contained, complete, and careful with what it claims."""

import base64
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from moescale.scaling.analysis import analyse
from moescale.scaling.findings import findings
from moescale.scaling.fit import fit
from moescale.scaling.laws import LAWS
from moescale.scaling.limits import limits
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
        self.empty: list[str] = []  # sections whose heading is followed by nothing
        self.content = True
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [value for key in ("src", "href") if (value := given.get(key))]
        if tag in ("li", "tr", "p", "img", "dt"):
            self.content = True
        if tag == "h2":
            self.content = False
            self.sections.append(given.get("id") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section" and not self.content:
            self.empty.append(self.sections[-1])

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
    variables, loss, used = variables_of(dense, LAWS["chinchilla"])
    law = fit("chinchilla", variables, loss, bootstrap=20, names=[point.run for point in used])
    path = tmp_path_factory.mktemp("report") / "report.html"
    return report(path, study.points, study.records, fits={"dense only": law}, warnings=["Mind the gap."])


def test_everything_is_there_and_inside(page: Page, study: SimpleNamespace) -> None:
    wanted = ["findings", "limits", "headline", "isoflop", "best", "compare", "saved", "sparsity", "granularity",
              "growth", "frontier", "laws", "seeds", "noise", "curves",
              "domains", "router", "runs", "conventions", "provenance"]  # fmt: skip
    assert page.sections == wanted
    assert [source for source in page.sources if source.startswith("#")] == [f"#{key}" for key in wanted]
    drawings = [source for source in page.sources if not source.startswith("#")]
    assert len(drawings) == 11
    for source in drawings:
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
    assert "At equal shape and equal seeds (3 pairs, 3.0e11 FLOPs) dense minus E8G4" in text
    assert "Higher granularity alone, E8G2 to E8G4 (G 2 to 4 at S 0.875" in text
    assert "The learning rate was not checked for dense, E8G2 and E8G4" in text
    assert "of 43 runs finished" in text


def test_a_rate_check_has_a_section_and_stays_out_of_the_rest(tmp_path: Path, study: SimpleNamespace) -> None:
    base = next(p for p in study.points if p.run == "dense-3e+11-w48-s0")
    checks = [
        replace(base, run=f"check x{factor}", check="lr", lr=(base.lr or 0.0) * factor, loss=(base.loss or 0.0) + by)
        for factor, by in ((0.5, 0.05), (2.0, -1.0))
    ]
    page = report(tmp_path / "r.html", [*study.points, *checks], {})
    text = " ".join(page.text)
    assert "rates" in page.sections
    assert text.count("2 times the rule's learning rate is better by 1.000 nats/token") == 2  # finding and warning
    assert "only checks" in text
    assert "learning rate was not checked for E8G2 and E8G4" in text
    compared = [sentence for sentence in findings(analyse(study.points, {}, {})) if sentence.startswith("At 1.0e12")]
    assert compared
    assert all(sentence in text for sentence in compared)


def test_hostile_names_are_shown_as_text(tmp_path: Path, study: SimpleNamespace) -> None:
    evil = "<script>alert(1)</script>"
    points = [replace(study.points[0], run=evil, family="<b>", why=evil)]
    page = report(tmp_path / "r.html", points, {}, title=evil, warnings=[evil], provenance={evil: evil})
    assert "script" not in page.open
    assert (tmp_path / "r.html").read_text().count("<script") == 0
    assert " ".join(page.text).count(evil) >= 5


def test_what_seeds_do_not_support_is_called_unresolved(study: SimpleNamespace) -> None:
    points = [
        replace(p, loss=None if p.loss is None else p.loss + (0.2 * ((p.seed or 0) - 1) if p.seed else 0.0))
        for p in study.points
    ]
    assert "The gap is within its seed noise: unresolved" in " ".join(findings(analyse(points, {}, {})))
    single = analyse([p for p in study.points if p.seed == 0], {}, {})
    text = " ".join([*findings(single), *limits(single)])
    assert "No cell was run with several seeds" in text
    assert "may be chance" in text
    assert "Each of the 36 cells was run with one seed" in text


def failed(points: list[Point]) -> list[Point]:
    return [p for p in points if p.state == "failed"]


POOR: dict[str, Callable[[list[Point]], list[Point]]] = {
    "nothing finished": failed,
    "one run": lambda points: points[:1],
    "one mixture run": lambda points: [p for p in points if p.family == "E8G4"][:1],
    "moe only": lambda points: [p for p in points if p.family == "E8G4"],
    "dense only": lambda points: [p for p in points if p.family == "dense"],
    "one budget": lambda points: [p for p in points if p.c and 2e11 < p.c < 5e11],
    "one size a family": lambda points: [p for p in points if "1e+11-w32" in p.run],
    "no shared budget": lambda points: [p for p in points if (p.family == "dense") == ("1e+11" in p.run)],
    "half failed": lambda points: [
        p if i % 2 else replace(p, state="failed", why="out of memory", loss=None, c=None, d=None, b=None, lr=None)
        for i, p in enumerate(points)
    ],
    "a bare table": lambda points: [
        Point(run=p.run, family=p.family, loss=p.loss, c=p.c, d=p.d, n_active=p.n_active) for p in points if p.loss
    ],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("keep", POOR)
def test_poor_studies_still_make_a_page(tmp_path: Path, study: SimpleNamespace, keep: str) -> None:
    chosen = POOR[keep](study.points)
    records = {} if keep == "a bare table" else {p.run: study.records[p.run] for p in chosen}
    page = report(tmp_path / "r.html", chosen, records)
    assert {"findings", "runs", "limits"} <= set(page.sections)
    assert page.empty == []
    families = {p.family for p in chosen if p.state == "done"}
    assert ("compare" in page.sections) == (len(families) > 1 and keep != "no shared budget")
    text = " ".join(page.text)
    assert re.search(r"\bNone\b|\bnan\b|\binf\b|\{", text) is None
    if keep == "half failed":
        assert text.count("out of memory") == sum(p.state == "failed" and p.why == "out of memory" for p in chosen)
    if keep == "one budget":
        assert "All runs share one budget" in text
        assert "decades" not in text


def test_a_run_that_diverged_does_not_break_the_curves(tmp_path: Path, study: SimpleNamespace) -> None:
    point = study.points[0]
    record = study.records[point.run]
    steps = [{**step, "loss": None if step["step"] > 30 else step["loss"]} for step in record.steps]
    page = report(
        tmp_path / "r.html", [replace(point, loss=math.inf, state="failed")], {point.run: Record(record.headers, steps)}
    )
    assert "curves" in page.sections
