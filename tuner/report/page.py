"""Sections as files: a PNG for each drawing, and one HTML page that holds everything and needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from tuner.report.sections import Section, Table, Value
from tuner.report.style import Drawing, colour_rules

PAGE = "index.html"


def write_page(title: str, sections: Sequence[Section], folder: Path) -> Path:
    """Write PNGs and the page into `folder`, which is made if need be; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for drawing in (*section.drawings, *section.more_drawings):
            (folder / f"{drawing.name}.png").write_bytes(drawing.png)
    page = folder / PAGE
    page.write_text(page_text(title, sections), encoding="utf-8")
    return page


def page_text(title: str, sections: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{section.slug}">{escape(section.title)}</a>' for section in sections)
    return Template(_file("page.html")).substitute(
        title=escape(title),
        links=f"<nav>{links}</nav>" if len(sections) > 1 else "",
        colours=colour_rules(),
        style=_file("page.css"),
        script=_file("page.js"),
        sections="\n".join(_section(section) for section in sections),
    )


def _section(section: Section) -> str:
    tiles = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in section.key_figures)
    parts = [
        f'<section id="{section.slug}"><h2>{escape(section.title)}</h2><p class="origin">{escape(section.origin)}</p>',
        f"<dl>{tiles}</dl>" if tiles else "",
        _figures(section.drawings),
    ]
    if section.more_drawings:
        parts.append(f"<details><summary>Other dtypes and layouts</summary>{_figures(section.more_drawings)}</details>")
    if section.table:
        parts.append(_table(section.table))
    return "".join(parts) + "</section>"


def _figures(drawings: Sequence[Drawing]) -> str:
    figures = (f'<figure tabindex="0" aria-label="{escape(drawing.title)}">{drawing.svg}</figure>' for drawing in drawings)
    return f'<div class="figures">{"".join(figures)}</div>'


def _table(table: Table) -> str:
    numeric = [all(not isinstance(row[at], str) for row in table.rows) for at in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{_kind(is_number)}><button type="button">{escape(name)}</button></th>'
        for name, is_number in zip(table.columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(_cell(value, digits, is_number) for value, digits, is_number in zip(row, table.digits, numeric, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Value, digits: int | None, is_number: bool) -> str:
    if value is None:
        return f"<td{_kind(is_number)}></td>"
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    shown = f"{value:.{digits}f}" if digits is not None else str(value)
    return f'<td{_kind(is_number)} data-value="{value!r}">{shown}</td>'


def _kind(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _file(name: str) -> str:
    return (resources.files("tuner") / "report" / name).read_text(encoding="utf-8")
