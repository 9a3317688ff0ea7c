"""`report.html`: one page that needs nothing else, of a run or of a site's own cases.

A run between hospitals has a private report: aggregates only, no picture, no case, and no value that describes fewer
than `MIN_CASES` patients. That of a simulation, whose data are one owner's, joins the sites' pictures. A site makes its
own, with its own pictures and names, from its own folder.
"""

from __future__ import annotations

from pathlib import Path

from concilium.disclosure import MIN_CASES
from concilium.errors import StudyError
from concilium.reports import _about, _case_sections, _costs, _sections, _volumes
from concilium.reports._cases import View
from concilium.reports._elements import document, e
from concilium.reports._found import Found, find
from concilium.reports._leaks import leaks

NAME = "report.html"
_STYLE = Path(__file__).with_name("report.css")


def write_report(folder: Path, *, out: Path | None = None) -> Path:
    """The report of a run, or of a site, written beside what it is made from, or to the file `out`.

    Raises:
        StudyError: the folder is neither, or what it holds is damaged.
    """
    try:
        found = find(folder)
        page = report_html(found, private=found.is_shared)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise StudyError(
            f"What {folder} holds cannot be reported ({type(error).__name__}: {error}). Expected files as this version of "
            "Concilium writes them. Make the report with the version that made the run."
        ) from error
    path = out or folder / NAME
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path


def report_html(found: Found, *, private: bool, min_cases: int = MIN_CASES) -> str:
    """The page. With `private`: no picture, no case, and no value that describes fewer than `min_cases` patients."""
    view = View(found, private, min_cases)
    sections = [
        _sections.results(view),
        _sections.comparisons(view),
        _case_sections.distribution(view),
        _sections.curves(view),
        _case_sections.pictures(view),
        _case_sections.worst(view),
        _volumes.volumes(view),
        _volumes.lesions(view),
        _case_sections.case_list(view),
        _costs.costs(view),
        leaks(view),
        _about.remarks(view),
        _case_sections.withheld(view),
        _about.plan(view),
        _about.reproduction(view),
    ]
    there = [s for s in sections if s is not None]
    links = [e("a", s[0].text, href=f"#{s.get('id')}") for s in there]
    title = f"Site {found.site}" if found.site else str(found.results["study"])
    closing = e("footer", e("p", "Made by Concilium. Research software, not a medical device."))
    return document(
        f"{title}: report",
        _STYLE.read_text(encoding="utf-8"),
        e("main", _about.heading(view), e("nav", links), there, closing),
    )
