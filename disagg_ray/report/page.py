"""Writes one HTML page about a batch: timeline, tables, failures, and each video with its prompt.

It loads nothing but the videos: links are relative, the drawing is inside, and there is no script. Whatever came from
a user or an error passes `escape` or, as a link, `quote`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from disagg_ray.batch.records import Record
from disagg_ray.text import human_size, medium

NUM_PREVIEWS = 1000
"""Videos of which a browser may load the first frame, once they are in sight; older browsers load all of these at once.
Further videos load only when they are played."""
NUM_OPEN = 10
"""With more failures than this, their table is collapsed."""
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; padding: 0 1.5rem; max-width: 1600px }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem } p { margin: .2rem 0 }
p.chart svg { width: 100%; border-radius: 6px; background: #fff }
.sheets { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start }
table { border-collapse: collapse } th, td { padding: .15rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left; padding-left: 0 } thead th { border-bottom: 1px solid #8888 }
.failed { table-layout: fixed; width: 100% } .failed th:first-child { width: 15% } .failed .prompt { margin: 0 }
.failed th, .failed td { text-align: left; vertical-align: top; overflow-wrap: anywhere; border-top: 1px solid #8884 }
summary { font-size: 1.1rem; font-weight: bold; margin: 1.6rem 0 .5rem; cursor: pointer }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 1.2rem }
article { content-visibility: auto; contain-intrinsic-size: auto 320px; min-width: 0 }
article .show { display: block; width: 100%; aspect-ratio: var(--shape, 16 / 9); background: #8883; border-radius: 6px }
article img.show, article video.show { object-fit: contain; max-height: 300px }
article audio { width: 100% }
a.show { box-sizing: border-box; padding: 1rem; overflow-wrap: anywhere }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 7.3em; overflow-y: auto; margin: .4rem 0 0 }
.about { font-size: .8rem; opacity: .7; overflow-wrap: anywhere }
"""
LEGEND = (
    "A pull that hid behind the computing of another request is not seen. wait: nothing to do, and the next request on "
    "its way from another stage or queue; idle: no request to be seen. Failed attempts are not recorded and look idle."
)
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src 'self' file:; media-src 'self' file:; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)


PICTURES = (".gif", ".png", ".webp", ".jpg", ".jpeg")
"""Suffixes of what a browser shows as an image."""


@dataclass(frozen=True)
class Sheet:
    """A table for people; the first column names its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def made_by(records: Iterable[Record]) -> Literal["video", "image"]:
    """Return what a run made."""
    return next((medium(record.request.num_frames) for record in records if record.request is not None), "video")


def render(
    title: str, notes: Iterable[str], sheets: Iterable[Sheet], drawing: str, records: Sequence[Record], videos: str
) -> bytes:
    """Return the page; `drawing` is an `<svg>` element, `videos` the path from the page to the records' files."""
    done = [record for record in records if record.status == "done"]
    failed = [record for record in records if record.status != "done"]
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        '<meta name="referrer" content="no-referrer"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        f'<p class="chart">{drawing}</p>',
        f'<p class="about">{escape(LEGEND)}</p>',
        '<div class="sheets">', *map(_sheet, sheets), "</div>", _failed(failed),
        f'<h2>{made_by(records).title()}s</h2><div class="videos">',
        *(_card(record, videos, preview=index < NUM_PREVIEWS) for index, record in enumerate(done)),
        "</div></body></html>",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part).encode(errors="replace")


def _sheet(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in sheet.columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in sheet.rows)
    return (
        f"<section><h2>{escape(sheet.title)}</h2>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _failed(records: Sequence[Record]) -> str:
    if not records:
        return ""
    rows = "".join(
        f'<tr><td>{escape(r.id)}</td><td><div class="prompt" dir="auto">{escape(str(r.error))}</div></td>'
        f'<td><div class="prompt" dir="auto">{_prompt(r)}</div></td></tr>'
        for r in records
    )
    return (
        f"<details{' open' if len(records) <= NUM_OPEN else ''}><summary>{len(records)} failed</summary>"
        f'<table class="failed"><tr><th>request</th><th>error</th><th>prompt</th></tr>{rows}</table></details>'
    )


def _card(record: Record, videos: str, *, preview: bool) -> str:
    request = record.request
    about = [record.id]
    if request is not None:
        about += [
            *human_size(request.width, request.height, request.num_frames).split(", "),
            f"{request.num_inference_steps} steps", f"seed {request.seed}",
        ]  # fmt: skip
    if record.seconds is not None:
        about.append(f"{record.seconds:.1f}\u00a0s")
    return (
        f'<article>{_video(record, videos, preview=preview)}<p class="prompt" dir="auto">{_prompt(record)}</p>'
        f'<p class="about">{escape(" · ".join(about))}</p></article>'
    )


def _prompt(record: Record) -> str:
    return escape(record.request.prompt or "") if record.request else ""


def _video(record: Record, videos: str, *, preview: bool) -> str:
    name = record.file or ""
    link = _link(videos, name)
    suffix = Path(name).suffix.lower()
    if suffix == ".mp4":
        load = "metadata" if preview else "none"
        return f'<video class="show" controls loop playsinline loading="lazy" preload="{load}" src="{link}"></video>'
    if suffix in PICTURES:
        return f'<img class="show" loading="lazy" alt="" src="{link}">'
    heard = ""
    if record.sound_file:
        heard = f'<audio controls preload="none" src="{_link(videos, record.sound_file)}"></audio>'
    return f'<a class="show" href="{link}">{escape(name)}</a>{heard}'


def _link(videos: str, name: str) -> str:
    return quote(f"{videos}/{name}", errors="replace")
