"""The report of a study folder, and a note beside it that says what it was made from."""

import json
from typing import Any

from ..base.files import write_atomically
from .study_folder import StudyFolder, state_digest

SUMMARY = "summary.json"


def write_report(folder: StudyFolder) -> dict[str, Any]:
    """Collect the study in ``folder`` and write ``report.html`` and ``summary.json``; returns the summary.

    Raises:
        UserError: no study there, or none of its runs has started.
    """
    from ..scaling import report
    from .collect import as_json, collect, provenance

    made_from = state_digest(*folder.open(), folder)  # before reading: what moves on meanwhile makes it out of date
    collected = collect(folder, whole=True)
    report.write_report(
        folder.report,
        title=collected.study.name,
        points=collected.points,
        records=collected.records,
        fits=collected.fits,
        provenance=provenance(collected),
        warnings=collected.warnings,
        outcomes=collected.outcomes,
    )
    summary = {**as_json(collected, folder), "report": str(folder.report)}
    write_atomically(folder.path / SUMMARY, json.dumps({"made_from": made_from, **summary}, indent=1) + "\n")
    return summary


def summary_of_report(folder: StudyFolder) -> dict[str, Any] | None:
    """The summary beside the report; None if there is no report, or what it was made from has changed."""
    try:
        content = json.loads((folder.path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not folder.report.is_file() or content.pop("made_from", None) != state_digest(*folder.open(), folder):
        return None
    return {**content, "folder": str(folder.path), "points": str(folder.points), "report": str(folder.report)}
