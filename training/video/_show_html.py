"""Lays out the sheet of one video: numbers, charts as SVG, pictures; one file without scripts."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gim_hloc.pipelines._report_assets import STYLE
from gim_hloc.training.video.propagated import StartRecord, VideoFacts

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none';"
    " form-action 'none'"
)
_STYLE = """
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
svg .bar { fill: var(--accent); }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .fail { fill: var(--bad); }
.gallery { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.gallery img { max-width: none; }
.map img { width: 100%; border-radius: 6px; border: 1px solid var(--line); display: block; }
.scale {
  display: inline-block; width: 7em; height: .7em; vertical-align: baseline; border-radius: 3px;
  background: linear-gradient(90deg, #f6f5f1, #8cc8c0, #0f7173, #0a323c);
  border: 1px solid var(--line);
}
.thumbs li { display: block; }
.thumbs img { width: 100%; height: auto; object-fit: contain; margin-bottom: .4rem; }
td.wide { white-space: normal !important; }
"""
_MAX_ROWS = 240  # of the timeline
_COLOURS = ("#8cc8c0", "#0f7173", "#0a323c")  # few, medium, many labels


@dataclass(frozen=True, kw_only=True, eq=False)
class SheetData:
    """What a sheet shows.

    Attributes:
        facts: of the video.
        records: of all starts.
        rounds: names of the labelling rounds.
        settings: options of propagation.
        steps: between frames of the labels.
        notes: on the whole video.
        pairs: data URL and caption of drawn pairs.
        maps: data URLs of where labels lie in the first and in the last frames, or None.
        covered: mean share of a frame's cells with labels, first and last frames.
        sampled: pairs that the maps were made of.
        failures: data URL, what and reason.
        failed: number of failures, those not shown included.
        labelling: rows (round, step, labelled, failed, median labels) of the labels.
    """

    facts: VideoFacts
    records: Sequence[StartRecord]
    rounds: Sequence[str]
    settings: dict[str, Any]
    steps: Sequence[int]
    notes: Sequence[str]
    pairs: Sequence[tuple[str, str]]
    maps: tuple[str, str] | None
    covered: tuple[float, float]
    sampled: int
    failures: Sequence[tuple[str, str, str]]
    failed: int
    labelling: Sequence[tuple[str, int, int, int, int]]


def render_sheet(data: SheetData) -> str:
    """The whole page."""
    made = [record for record in data.records if not record.failure]
    sections = [
        ("pairs", "Pairs", "Random pairs", _pairs(data)),
        ("chains", "Chains", "How far chains reach", _chains(data, made)),
        ("timeline", "Timeline", "Where in the video", _timeline(data)),
        ("coverage", "Coverage", "Where in the frame", _coverage(data)),
        ("ends", "Ends", "Why chains end", _ends(data)),
        ("failures", "Failures", "Pairs without labels", _failures(data)),
        ("labels", "Labelling", "Labels of near frames", _labelling(data)),
        ("settings", "Settings", "Settings", _settings(data)),
    ]
    there = [section for section in sections if section[3]]
    links = "".join(f'<a href="#{key}">{link}</a>' for key, link, _, _ in there)
    bodies = "".join(
        f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, _, title, body in there
    )
    title = f"{len(made)} / {len(data.records)} starts propagated"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_esc(data.facts.video)}: {title}</title><style>{STYLE}{_STYLE}</style></head>"
        f"<body><main>{_header(data, made)}<nav aria-label=Sections>{links}</nav>{bodies}"
        "</main></body></html>\n"
    )


def _esc(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _seconds(frames: float, facts: VideoFacts) -> str:
    return f"{frames / facts.fps:,.1f} s" if facts.fps else ""


# ----------------------------------------------------------------------------------------- sections


def _header(data: SheetData, made: Sequence[StartRecord]) -> str:
    facts, total = data.facts, len(data.records)
    share = len(made) / total if total else 0.0
    level = "good" if share > 0.8 else "warn" if made else "bad"
    counts = [record.count for record in made]
    distances = [record.distance for record in made]
    about = [f"{facts.size[0]} &times; {facts.size[1]} pixels"]
    about += [f"{facts.fps:g} frames a second"] if facts.fps else []
    about += [_plural(len(data.rounds), "labelling round")]
    tiles = [
        _tile("Labels", f"{sum(counts):,}", f"in {_plural(len(made), 'pair')}"),
        _tile(
            "Labels a pair",
            f"{np.median(counts):,.0f}" if counts else "&ndash;",
            f"median; {min(counts):,} to {max(counts):,}" if counts else "",
        ),
        _tile(
            "Distance",
            f"{np.median(distances):,.0f}" if counts else "&ndash;",
            f"median; {_seconds(float(np.median(distances)), facts)}" if counts else "",
            "frames",
        ),
        _tile(
            "Longest",
            f"{max(distances):,}" if counts else "&ndash;",
            _seconds(max(distances), facts) if counts else "",
            "frames",
        ),
        _tile(
            "Coverage",
            f"{100 * min(data.covered):.0f}" if data.maps else "&ndash;",
            "of a frame's cells have labels, mean" if data.maps else "",
            "%",
        ),
        _tile("Failed", f"{total - len(made):,}", f"of {_plural(total, 'start')}"),
    ]
    notes = "".join(
        f"<li class=warn>{_esc(note[:1].upper() + note[1:])}</li>" for note in data.notes
    )
    return (
        f"<header><p class=eyebrow>Propagated labels · {_esc(facts.video)} · {' · '.join(about)}"
        f'</p><h1 class="{level}"><strong>{len(made):,} <span>/</span> {total:,}</strong>'
        f' starts propagated</h1><div class="share {level}" role=presentation>'
        f'<i style="width:{100 * share:.1f}%"></i></div><ul class=verdicts>{notes}</ul>'
        f"<div class=tiles>{''.join(tiles)}</div></header>"
    )


def _tile(title: str, value: str, text: str, unit: str = "") -> str:
    shown = f"<small>{unit}</small>" if unit and value != "&ndash;" else ""
    return f"<div class=tile><h3>{title}</h3><b>{value}{shown}</b><p>{text}</p></div>"


def _pairs(data: SheetData) -> str:
    if not data.pairs:
        return ""
    figures = "".join(
        f'<figure><img src="{url}" alt="{_esc(caption)}"><figcaption>{_esc(caption)}</figcaption>'
        "</figure>"
        for url, caption in data.pairs
    )
    return (
        "<p class=legend>A dot has the colour of its place in the first frame: right labels show "
        "the same colours on the same things. Boxes hold all labels.</p>"
        f'<div class=gallery style="margin-top:.8rem">{figures}</div>'
    )


def _chains(data: SheetData, made: Sequence[StartRecord]) -> str:
    if not made:
        return ""
    distance = _histogram([record.distance for record in made], "frames")
    count = _histogram([record.count for record in made], "labels")
    return (
        f"<div class=twin><figure><h3>Frames between the two ends</h3>{distance}</figure>"
        f"<figure><h3>Labels of a pair</h3>{count}</figure></div>"
    )


def _histogram(values: Sequence[int], unit: str) -> str:
    """Bars as SVG; the bins have round limits."""
    low, high = min(values), max(values)
    width = _round_up(max(high - low, 1) / 16)
    first = low // width * width
    bins = (high - first) // width + 1
    heights = np.bincount([(value - first) // width for value in values], minlength=bins)
    left, right, top, bottom, across, tall = 34, 8, 8, 34, 520, 230
    step = (across - left - right) / bins
    unit_height = (tall - top - bottom) / heights.max()
    bars, ticks = [], []
    for k, number in enumerate(heights.tolist()):
        x, h = left + k * step, number * unit_height
        start, end = first + k * width, first + (k + 1) * width - 1
        bars.append(
            f'<rect class=bar x="{x + 1:.1f}" y="{tall - bottom - h:.1f}"'
            f' width="{max(1, min(step - 2, 60)):.1f}" height="{h:.1f}">'
            f"<title>{start:,} to {end:,} {unit}: {number:,}</title></rect>"
        )
    every = -(-bins // 6)
    for k in range(0, bins, every):
        x = left + k * step
        ticks.append(f'<text x="{x:.1f}" y="{tall - bottom + 16}">{first + k * width:,}</text>')
    ticks.append(f'<text x="{across - right}" y="{tall - 3}" text-anchor=end>{unit}</text>')
    for number in sorted({0, int(heights.max())}):
        y = tall - bottom - number * unit_height
        ticks.append(
            f'<line class=axis x1="{left}" x2="{across - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor=end>{number:,}</text>'
        )
    return f'<svg viewBox="0 0 {across} {tall}" role=img>{"".join(ticks + bars)}</svg>'


def _round_up(value: float) -> int:
    """The next number of the row 1, 2, 5, 10, 20, 50 and so on."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= value:
                return factor * power
        power *= 10


def _timeline(data: SheetData) -> str:
    if not data.records:
        return ""
    records = data.records
    if len(records) > _MAX_ROWS:
        chosen = np.linspace(0, len(records) - 1, _MAX_ROWS).round().astype(int)
        records = [records[k] for k in chosen.tolist()]
    first = min(record.start for record in records)
    last = max([r.reached[1] for r in records if r.reached] + [r.start for r in records]) + 1
    across, left, right, top, bottom = 1080, 12, 12, 6, 24
    row = min(12.0, max(3.0, 300 / len(records)))
    tall = top + bottom + row * len(records)
    counts = sorted(record.count for record in data.records if not record.failure)
    thirds = [counts[len(counts) * k // 3] for k in (1, 2)] if counts else [0, 0]

    def place(frame: float) -> float:
        return left + (across - left - right) * (frame - first) / max(1, last - first)

    parts = []
    for k, record in enumerate(records):
        y = top + k * row
        if record.reached is None or record.failure:
            parts.append(
                f'<circle class=fail cx="{place(record.start):.1f}" cy="{y + row / 2:.1f}"'
                f' r="{min(3.0, row / 2):.1f}"><title>{record.start}: {_esc(record.failure)}'
                "</title></circle>"
            )
            continue
        i, j = record.reached
        tone = _COLOURS[sum(record.count >= limit for limit in thirds)]
        parts.append(
            f'<rect x="{place(i):.1f}" y="{y:.1f}" width="{place(j) - place(i):.1f}"'
            f' height="{max(1.5, row - 1):.1f}" rx="1" style="fill:{tone}"><title>{i} to {j}: '
            f"{_plural(record.count, 'label')}; {_esc(record.ended)}</title></rect>"
        )
    step = _round_up((last - first) / 10)
    for frame in range(-(-first // step) * step, last, step):
        x = place(frame)
        parts.insert(
            0,
            f'<line class=axis x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{tall - bottom}"/>'
            f'<text x="{x:.1f}" y="{tall - 8:.1f}" text-anchor=middle>{frame:,}</text>',
        )
    legend = [*_tones(counts, thirds), '<span style="color:var(--bad)">●</span> failed']
    shown = (
        f" {len(records):,} of {len(data.records):,} starts are shown."
        if len(records) < len(data.records)
        else ""
    )
    return (
        f"<p class=legend>One line a start, from its first to its last frame.{shown} "
        f"{' &nbsp; '.join(legend)}</p>"
        f'<svg viewBox="0 0 {across} {tall:.0f}" role=img>{"".join(parts)}</svg>'
        "<p class=caption>Frame indices.</p>"
    )


def _tones(counts: Sequence[int], thirds: Sequence[int]) -> list[str]:
    """What the colours of the lines mean; those that no line has are left out."""
    texts = (
        f"fewer than {thirds[0]:,} labels",
        f"{thirds[0]:,} labels or more",
        f"{thirds[1]:,} labels or more",
    )
    used = sorted({sum(count >= limit for limit in thirds) for count in counts})
    return [f'<span style="color:{_COLOURS[k]}">■</span> {texts[k]}' for k in used]


def _coverage(data: SheetData) -> str:
    if data.maps is None:
        return ""
    figures = "".join(
        f'<figure class=map><h3>{title}</h3><img src="{url}" alt="Coverage of the {title}">'
        f"<figcaption>{100 * share:.0f} % of the cells of a pair on average</figcaption></figure>"
        for title, url, share in zip(
            ("First frames", "Last frames"), data.maps, data.covered, strict=True
        )
    )
    return (
        f"<p class=legend>Share of pairs with a label there: 0 <span class=scale></span> all of "
        f'{_plural(data.sampled, "pair")}.</p><div class=twin style="margin-top:.8rem">{figures}'
        "</div>"
    )


def _ends(data: SheetData) -> str:
    if not data.records:
        return ""
    reasons: dict[str, Counter[str]] = {"made": Counter(), "failed": Counter()}
    for record in data.records:
        kind = "failed" if record.failure else "made"
        text = reason_kind(record.failure or record.ended)
        if record.failure and record.ended:  # what kept it from going on is the cause
            text += f"; the chain ended: {reason_kind(record.ended)}"
        reasons[kind][text] += 1
    rows = "".join(
        f"<tr><td class=n>{number:,}</td><td>{kind}</td><td class=wide>{_esc(text)}</td></tr>"
        for kind, counter in (("with labels", reasons["made"]), ("failed", reasons["failed"]))
        for text, number in counter.most_common(12)
    )
    return (
        "<div class=scroll><table><thead><tr><th class=n>Starts</th><th></th><th>Reason</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def reason_kind(reason: str) -> str:
    """A reason without what is particular to one pair: what is counted by kind."""
    reason = re.sub(r"^\d+ labels left at \d+; (\d+) needed", r"fewer than \1 labels left", reason)
    reason = re.sub(r"^no labels between \d+ and \d+", "a segment without labels", reason)
    reason = re.sub(
        r"^\d+ of \d+ labels fit one motion; (\d+) are needed",
        r"fewer than \1 fit one motion",
        reason,
    )
    return reason


def _failures(data: SheetData) -> str:
    if not data.failures:
        return ""
    items = "".join(
        f'<li><img src="{url}" alt=""><b>{_esc(what)}</b><p>{_esc(reason)}</p></li>'
        for url, what, reason in data.failures
    )
    shown = (
        f"<p class=legend>{len(data.failures):,} of {data.failed:,}.</p>"
        if data.failed > len(data.failures)
        else ""
    )
    return f'{shown}<ul class="cards thumbs">{items}</ul>'


def _labelling(data: SheetData) -> str:
    if not data.labelling:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{_esc(name)}</th><td class=n>{step}</td><td class=n>{labelled:,}</td>"
        f"<td class=n>{failed:,}</td><td class=n>{median:,}</td></tr>"
        for name, step, labelled, failed, median in data.labelling
    )
    return (
        "<div class=scroll><table><thead><tr><th>Round</th><th class=n>Frames apart</th>"
        "<th class=n>Pairs with labels</th><th class=n>Failed</th>"
        f"<th class=n>Labels, median</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _settings(data: SheetData) -> str:
    values = {
        "labelling rounds": ", ".join(data.rounds),
        "steps": ", ".join(map(str, data.steps)),
        **data.settings,
    }
    rows = "".join(
        f"<tr><th scope=row>{_esc(key.replace('_', ' '))}</th><td>{_esc(value)}</td></tr>"
        for key, value in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"
