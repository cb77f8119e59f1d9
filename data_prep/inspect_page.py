"""The page of inspect_shards.py: one file that needs nothing else, with its own style, script and plots.

Media are data URIs. A content security policy forbids everything that is not in the file, and every script but the one
below, so that text out of shards stays text even if it were not escaped.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from data_prep.inspect_samples import (
    MAX_FRAMES,
    MAX_SOUND_S,
    ORIGINAL_SIDE,
    Item,
    Mark,
    PackReport,
    Picture,
    Placeholder,
    Refused,
    Sound,
    SourceReport,
    Token,
    View,
    num_learned,
)
from mmchat.html_page import document
from mmchat.modalities.audio import SAMPLE_RATE_HZ
from mmchat.regions import Geometry

MAX_FACTS = 4000  # characters of a sample's facts
MAX_REFUSED = 50  # listed of a source
_LOSSLESS_SIDE = 128  # encoder pictures up to this side are stored as they are, larger ones as WebP
_NUM_COLOURS = 6  # of the style's --c0, --c1, ...


def page(title: str, facts: str, sources: Sequence[SourceReport], packs: Sequence[PackReport]) -> str:
    """The whole HTML; `facts` is one line about the command."""
    names = _section_names(sources)
    body = "\n".join(_source(i, names[i], report) for i, report in enumerate(sources))
    links = "".join(f'<li><a href="#source-{i}">{_(name)}</a></li>' for i, name in enumerate(names))
    if packs:
        links += '<li><a href="#packs">Packs</a></li>'
    options = "".join(f'<option value="{i}">{_(name)}</option>' for i, name in enumerate(names))
    page = f"""<a class="skip" href="#samples">Skip to the samples</a>
<header>
<h1>{_(title)}</h1>
<p class="muted">{_(facts)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{_packs(packs, [source.name for report in packs for source in report.stage.data])}
<form id="controls" role="search" aria-label="Choose samples">
<label>Source <select id="source"><option value="">all</option>{options}</select></label>
<label>With <select id="with"><option value="">anything</option><option>image</option><option>video</option>
<option>audio</option><option value="text">text only</option><option value="region">regions</option></select></label>
<label>Text <input id="text" type="search" placeholder="key, words, a token id" autocomplete="off"></label>
<label><input id="boxes" type="checkbox" checked> regions</label>
<label><input id="edges" type="checkbox" checked> token edges</label>
<output id="count" aria-live="polite"></output>
</form>
<p class="legend muted"><span class="t l">learned</span> <span class="t">read only</span>
<span class="t s">special</span> <span class="chip">media tokens</span>
Point at a token, or focus a conversation and use the arrow keys, to see its id.</p>
<div id="samples" tabindex="-1">
{body}
</div>
</main>
<footer class="muted">Pictures under "encoder" are the preprocess' output with its normalisation undone; above
{_LOSSLESS_SIDE} pixels they are stored as WebP. Originals are shown within {ORIGINAL_SIDE} pixels, at most {MAX_FRAMES}
frames of a video; players hold the first {MAX_SOUND_S:.0f} s, mono at {SAMPLE_RATE_HZ // 1000} kHz as heard, as
MP3.</footer>
<div id="token" role="status" hidden></div>"""
    return document(title, _STYLE, _SCRIPT, page)


def _(text: Any) -> str:
    """Escaped for text and for quoted attributes."""
    return html.escape(str(text))


def _section_names(sources: Sequence[SourceReport]) -> list[str]:
    """Source names, with the stage where a name occurs twice."""
    counts = Counter(report.source.name for report in sources)
    return [
        report.source.name if counts[report.source.name] == 1 else f"{report.source.name} ({report.stage.name})"
        for report in sources
    ]


def _source(number: int, name: str, report: SourceReport) -> str:
    figures = report.figures
    stages = ", ".join([report.stage.name, *report.also])
    tiles = [
        ("samples", f"{report.num_samples:,}"),
        ("shards", f"{report.num_shards:,}"),
        ("looked at", f"{figures.num_drawn:,}"),
        ("refused", f"{len(figures.refused):,}"),
    ]
    if figures.tokens:
        learned = sum(share * count for share, count in zip(figures.learned, figures.tokens, strict=True))
        tiles += [
            ("tokens, median", f"{np.median(figures.tokens):,.0f}"),
            ("tokens, largest", f"{max(figures.tokens):,}"),
            ("tokens learned", f"{learned / sum(figures.tokens):.1%}"),
        ]
    shown = "".join(f"<div><dt>{_(label)}</dt><dd>{_(value)}</dd></div>" for label, value in tiles)
    cards = "\n".join(_card(number, view) for view in report.views)
    return f"""<section id="source-{number}" data-source="{number}" aria-labelledby="h-{number}">
<h2 id="h-{number}">{_(name)}</h2>
<p class="muted">task {_(report.source.task)}, weight {report.source.weight:g}, stage {_(stages)}, budget
{report.stage.batch.tokens:,} tokens and {report.stage.batch.patches:,} patches a pack</p>
<dl class="tiles">{shown}</dl>
{_plots(report)}
<div class="columns">{_top("Prompts", figures.prompts)}{_top("Answers", figures.answers)}</div>
{_refused(figures.refused)}
{cards or '<p class="muted">No sample to show.</p>'}
</section>"""


# ---- figures --------------------------------------------------------------------------------------------------------


def _plots(report: SourceReport) -> str:
    """A plot of everything that varies, and a line about what does not."""
    figures, batch = report.figures, report.stage.batch
    drawn: list[tuple[str, Sequence[float], float | None]] = [
        ("Tokens", figures.tokens, batch.tokens),
        ("Learned share of tokens, %", [100 * share for share in figures.learned], None),
        ("Turns", figures.turns, None),
        ("Regions", figures.regions, None),
        ("Encoder patches", figures.patches, batch.patches),
    ]
    drawn += [(f"Duration of {modality}, s", values, None) for modality, values in figures.durations_s.items()]
    plots = [_histogram(*one) for one in drawn if len(set(one[1])) > 1]
    plots += [_scatter(f"Size of {modality}s, pixels", sizes) for modality, sizes in figures.sizes.items()]
    same = "; ".join(f"{title.lower()}: {values[0]:.4g}" for title, values, _limit in drawn if len(set(values)) == 1)
    line = f'<p class="muted">The same in every sample: {_(same)}.</p>' if same else ""
    return f'<div class="plots">{"".join(plots)}</div>{line}'


def _histogram(title: str, values: Sequence[float], limit: float | None, bins: int = 24) -> str:
    """Bars over equal spans; whole numbers get a bar each where they are few. `limit` is drawn if it is near.

    The values differ.
    """
    low, high = min(values), max(values)
    each = all(float(value).is_integer() for value in values) and high - low < bins
    edges = np.arange(low, high + 2) - 0.5 if each else np.linspace(low, high, bins + 1)
    counts, _edges = np.histogram(values, edges)
    width, height, top = 240, 84, int(counts.max())
    step = width / len(counts)
    bars = []
    for i, count in enumerate(counts):
        here = f"{edges[i] + 0.5:g}" if each else f"{edges[i]:.4g} to {edges[i + 1]:.4g}"
        tall, wide = count / top * height, min(max(step - 1, 0.5), 40)
        bars.append(
            f'<rect class="bar" x="{(i + 0.5) * step - wide / 2:.1f}" y="{height - tall:.1f}" width="{wide:.1f}" '
            f'height="{tall:.1f}"><title>{here}: {count:,} samples</title></rect>'
        )
    if limit is not None and limit <= edges[-1]:
        x = (limit - edges[0]) / (edges[-1] - edges[0]) * width
        bars.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"><title>budget</title></line>')
    middle = float(np.median(values))
    return _figure(
        title,
        f"from {low:.4g} to {high:.4g}, median {middle:.4g}, {len(values):,} values",
        "".join(bars),
        (f"{low:.4g}", f"median {middle:.4g}", f"{high:.4g}"),
    )


def _scatter(title: str, sizes: Sequence[tuple[int, int]]) -> str:
    """Width to the right, height upwards, on the same scale; a dot's size grows with how many lie there."""
    counts = Counter(sizes)
    side = max(max(size) for size in sizes)
    dots = "".join(
        f'<circle class="dot" cx="{2 + width / side * 100:.1f}" cy="{84 - height / side * 80:.1f}" '
        f'r="{min(1.5 + math.log2(count), 8):.1f}"><title>{width} x {height}: {count:,}</title></circle>'
        for (width, height), count in counts.most_common(500)
    )
    (width, height), count = counts.most_common(1)[0]
    common = f"{width} x {height} most often ({count / len(sizes):.0%})"
    return _figure(title, f"{len(counts):,} sizes, {common}", f'<path class="axis" d="M2 0V84H240"/>{dots}', (common,))


def _figure(title: str, description: str, drawing: str, labels: Sequence[str]) -> str:
    xs, anchors = ((0, 120, 240), ("start", "middle", "end")) if len(labels) == 3 else ((0,), ("start",))
    texts = "".join(
        f'<text x="{x}" y="98" text-anchor="{anchor}">{_(label)}</text>'
        for x, anchor, label in zip(xs, anchors, labels, strict=True)
    )
    return (
        f'<figure class="plot"><figcaption>{_(title)}</figcaption><svg viewBox="0 -1 240 104" role="img" '
        f'aria-label="{_(title)}: {_(description)}">{drawing}{texts}</svg></figure>'
    )


def _top(title: str, counts: Counter[str]) -> str:
    if not counts:
        return ""
    rows = "".join(
        f'<tr><td class="number">{count / counts.total():.1%}</td><td>{_(text[:160] or "(empty)")}'
        f"{'…' if len(text) > 160 else ''}</td></tr>"
        for text, count in counts.most_common(6)
    )
    return (
        f"<div><h3>{title}</h3><p class='muted'>{len(counts):,} different of {counts.total():,}</p>"
        f"<table>{rows}</table></div>"
    )


def _refused(refused: Sequence[Refused]) -> str:
    if not refused:
        return ""
    counts = Counter(sample.reason for sample in refused)
    reasons = ", ".join(f"{count:,} x {_(reason)}" for reason, count in counts.most_common())
    rows = "".join(
        f"<tr><td>{_(one.key)}</td><td>{_(one.reason)}</td><td>{_(one.detail[:600])}</td></tr>"
        for one in refused[:MAX_REFUSED]
    )
    more = f"<p class='muted'>The first {MAX_REFUSED} of {len(refused):,}.</p>" if len(refused) > MAX_REFUSED else ""
    return (
        f'<details class="refused" open><summary>{len(refused):,} refused: {reasons}</summary><div class="scroll">'
        f"<table><tr><th>key</th><th>reason</th><th>detail</th></tr>{rows}</table></div>{more}</details>"
    )


# ---- packs ----------------------------------------------------------------------------------------------------------


def _packs(reports: Sequence[PackReport], names: Sequence[str]) -> str:
    if not reports:
        return ""
    colours = {name: (i + 1) % _NUM_COLOURS for i, name in enumerate(dict.fromkeys(names))}
    legend = "".join(f'<span class="key"><i class="c{i}"></i>{_(name)}</span>' for name, i in colours.items())
    stages = "".join(_stage_packs(report, colours) for report in reports)
    return f"""<section id="packs" aria-labelledby="h-packs"><h2 id="h-packs">How packs fill</h2>
<p class="muted">The first packs of lane 0 of each stage. A block is a sample, its lower part the share that is learned;
the thin line is encoder patches against their budget.</p><p>{legend}</p><div class="stages">{stages}</div></section>"""


def _stage_packs(report: PackReport, colours: dict[str, int]) -> str:
    batch = report.stage.batch
    rows = "".join(_pack(i, pack, batch.tokens, batch.patches, colours) for i, pack in enumerate(report.packs))
    used = sum(len(sample) for pack in report.packs for _name, sample in pack)
    capacity = batch.tokens * len(report.packs)
    facts = [f"{batch.tokens:,} tokens a pack", f"{batch.lanes} lanes"]
    if capacity:
        facts.append(f"{1 - used / capacity:.1%} padding")
    if report.num_refused:
        facts.append(f"{report.num_refused:,} samples refused on the way")
    problem = f'<p class="problem">{_(report.problem)}</p>' if report.problem else ""
    head = f"<h3>{_(report.stage.name)}</h3><p class='muted'>{', '.join(facts)}</p>{problem}"
    return f"<div>{head}<div class='packs'>{rows}</div></div>"


def _pack(number: int, pack: Sequence[tuple[str, Any]], tokens: int, patches: int, colours: dict[str, int]) -> str:
    blocks, x = [], 0
    for name, sample in pack:
        learned = num_learned(sample)
        label = f"{sample.key}: {len(sample):,} tokens, {learned:,} learned, {sample.num_patches:,} patches"
        low = 20 * learned / len(sample)
        blocks.append(
            f'<g class="c{colours[name]}"><title>{_(label)}</title><rect class="block" x="{x}" y="0" '
            f'width="{len(sample)}" height="20"/><rect class="solid" x="{x}" y="{20 - low:.2f}" width="{len(sample)}" '
            f'height="{low:.2f}"/><rect class="gap" x="{x + len(sample) - tokens / 600:.2f}" y="0" '
            f'width="{tokens / 600:.2f}" height="20"/></g>'
        )
        x += len(sample)
    num_patches = sum(sample.num_patches for _name, sample in pack)
    facts = f"{len(pack)} samples, {x:,} tokens, {1 - x / tokens:.1%} padding, {num_patches:,} patches"
    return (
        f'<div class="pack"><svg viewBox="0 0 {tokens} 24" preserveAspectRatio="none" role="img" '
        f'aria-label="Pack {number}: {facts}"><rect class="empty" width="{tokens}" height="20"/>{"".join(blocks)}'
        f'<rect class="empty" y="22" width="{tokens}" height="2"/>'
        f'<rect class="patches" y="22" width="{tokens * min(1, num_patches / patches):.2f}" height="2"/></svg>'
        f"<small>{len(pack)} samples, {1 - x / tokens:.1%} padding</small></div>"
    )


# ---- one sample -----------------------------------------------------------------------------------------------------


def _card(source: int, view: View) -> str:
    planned, sample = view.planned, view.planned.sample
    kinds: list[str] = sorted({item.modality for item in view.items}) or ["text"]
    if view.marks:
        kinds.append("region")
    gates = _gates(view)
    facts = [
        f"{len(sample):,} tokens",
        f"{view.num_learned:,} learned",
        f"{sample.num_patches:,} patches",
        *([gates] if gates else []),
    ]
    chips = "".join(f"<li>{_(fact)}</li>" for fact in facts)
    notes = "".join(f'<p class="problem">{_(note)}</p>' for note in view.notes)
    media = "".join(_item(item, view.marks) for item in view.items)
    dump = json.dumps(planned.record.facts, ensure_ascii=False, indent=1)
    cut = f"\n… {len(dump) - MAX_FACTS:,} characters more" if len(dump) > MAX_FACTS else ""
    return f"""<article class="card" data-source="{source}" data-kinds="{
        " ".join([*kinds, *(["region"] if view.marks else [])])
    }">
<header><h3>{_(planned.record.key)}</h3><ul class="chips">{chips}</ul></header>{notes}
<div class="sample{"" if media else " bare"}">{f'<div class="media">{media}</div>' if media else ""}
<div class="talk"><p class="tokens" tabindex="0" role="group" aria-label="Conversation of {_(planned.record.key)}">{
        "".join(_piece(piece, view) for piece in view.pieces)
    }</p>{_regions(view.marks)}
<details><summary>facts</summary><p class="muted">{_(planned.shard)}</p><pre>{_(dump[:MAX_FACTS])}{cut}</pre></details>
</div></div></article>"""


def _gates(view: View) -> str:
    """Which fusion adapters are open, and on which share of the tokens."""
    shares = Counter(gate for piece in view.pieces if isinstance(piece, Token) for gate in piece.gates)
    total = sum(isinstance(piece, Token) for piece in view.pieces)
    return "; ".join(
        f"{modality} adapter on " + ("every token" if count == total else f"{count / total:.0%} of tokens")
        for modality, count in shares.items()
    )


def _piece(piece: Token | Placeholder, view: View) -> str:
    if isinstance(piece, Placeholder):
        label = f"{piece.modality} {piece.media}: {piece.num_tokens:,} tokens"
        return f'<span class="chip" data-p="{piece.position}" data-media="{piece.media}">{label}</span>'
    kind = "t" + (" l" if piece.is_learned else "") + (" s" if piece.is_special else "")
    ids = " ".join(map(str, piece.ids))
    gates = f' data-g="{" ".join(piece.gates)}"' if piece.gates else ""
    text = _(piece.text).replace("\n", '<b aria-hidden="true">↵</b>\n')
    return f'<span class="{kind}" data-p="{piece.position}" data-i="{ids}"{gates}>{text}</span>'


def _regions(marks: Sequence[Mark]) -> str:
    if not marks:
        return ""
    rows = []
    for i, mark in enumerate(marks):
        region = mark.region
        pixels = region.box or region.point
        where = ", ".join(f"{number:g}" for number in pixels) if pixels else f"{len(region.tube or ())} boxes in time"
        rows.append(
            f'<tr><td><i class="c{i % _NUM_COLOURS}"></i>{i}</td><td>{mark.shape} on item {region.media}</td>'
            f"<td>{_(region.label or '')}</td><td>{where}</td>"
            f"<td>{_(mark.text) if mark.is_said else 'in the facts, not said'}</td></tr>"
        )
    return (
        '<div class="scroll"><table class="regions"><tr><th>region</th><th></th><th>label</th><th>original pixels</th>'
        f"<th>as said</th></tr>{''.join(rows)}</table></div>"
    )


def _item(item: Item, marks: Sequence[Mark]) -> str:
    name = f"{item.modality} {item.media}"
    if item.plan is None:
        return f'<div class="item"><h4>{name}</h4><p class="muted">{_(item.note)}</p></div>'
    time, height, width = item.plan.shape
    shape = f"{time} positions" if item.modality == "audio" else f"{time} x {height} x {width} features"
    facts = f"{shape}, {item.plan.num_patches:,} patches, {item.num_tokens:,} tokens"
    shown = ""
    if item.sound is not None:
        shown = _sound(item.sound, name)
    elif item.modality == "video":
        if item.num_frames > len(item.pictures):
            facts += f"; {len(item.pictures)} of {item.num_frames} frames are shown"
        shown = '<div class="strip">' + "".join(_frame(p, item, marks) for p in item.pictures) + "</div>"
    elif item.pictures:
        shown = "".join(_pair(picture, item, marks) for picture in item.pictures)
    return f'<div class="item"><h4>{name}</h4>{shown}<p class="muted">{facts}</p></div>'


def _pair(picture: Picture, item: Item, marks: Sequence[Mark]) -> str:
    geometry = _geometry(item)
    encoder = f"encoder, {picture.encoder.width} x {picture.encoder.height}"
    return (
        f'<div class="pair">{_drawn(picture.original, "original", geometry, item, marks, None)}'
        f"{_drawn(picture.encoder, encoder, geometry, item, marks, None)}</div>"
    )


def _frame(picture: Picture, item: Item, marks: Sequence[Mark]) -> str:
    geometry, time_s = _geometry(item), picture.time_s
    original = _drawn(picture.original, f"{time_s:.2f} s", geometry, item, marks, time_s)
    return f'<div class="frame">{original}{_drawn(picture.encoder, "encoder", geometry, item, marks, time_s)}</div>'


def _geometry(item: Item) -> Geometry:
    assert item.plan is not None and item.plan.geometry is not None
    return item.plan.geometry


def _drawn(
    image: Image.Image, caption: str, geometry: Geometry, item: Item, marks: Sequence[Mark], time_s: float | None
) -> str:
    """A picture with its regions; `caption` begins with "encoder" for encoder input."""
    is_encoder = caption.startswith("encoder")
    size = (geometry.input_width, geometry.input_height) if is_encoder else (geometry.width, geometry.height)
    small = max(image.size) <= _LOSSLESS_SIDE
    scale = size[0] / (100 if time_s is None else 50)  # frames are shown smaller
    shapes = "".join(
        _shape(i, mark, geometry if is_encoder else None, time_s, scale)
        for i, mark in enumerate(marks)
        if mark.region.media == item.media
    )
    if not is_encoder and image.size != size:
        caption += f", {size[0]} x {size[1]}" if time_s is None else ""
    elif not is_encoder and time_s is None:
        caption += f", {image.width} x {image.height}"
    overlay = (
        f'<svg class="marks" viewBox="0 0 {size[0]} {size[1]}" aria-hidden="true">{shapes}</svg>' if shapes else ""
    )
    alt = f"{item.modality} {item.media}, {caption}"
    return (
        f'<figure class="{"encoder" if is_encoder else "original"}"><div class="drawn{" small" if small else ""}">'
        f'<img alt="{_(alt)}" width="{image.width}" height="{image.height}" src="{_image_uri(image)}">{overlay}</div>'
        f"<figcaption>{_(caption)}</figcaption></figure>"
    )


def _shape(number: int, mark: Mark, geometry: Geometry | None, time_s: float | None, scale: float) -> str:
    """One region as SVG, in original pixels or, with a geometry, in encoder pixels."""

    def at(x: float, y: float) -> tuple[float, float]:
        return geometry.to_input(x, y) if geometry is not None else (x, y)

    region = mark.region
    kind = f'class="c{number % _NUM_COLOURS}{"" if mark.is_said else " unsaid"}" data-region="{number}"'
    title = f"<title>{number}: {_(region.label or mark.shape)}</title>"
    if region.point is not None:
        x, y = at(*region.point)
        return f'<circle {kind} cx="{x:.2f}" cy="{y:.2f}" r="{2.2 * scale:.2f}">{title}</circle>' + _label(
            number, x + 3 * scale, y + 2.5 * scale, scale
        )
    box = box_at(mark, time_s)
    if box is None:
        return ""
    (x1, y1), (x2, y2) = at(box[0], box[1]), at(box[2], box[3])
    return (
        f'<rect {kind} x="{x1:.2f}" y="{y1:.2f}" width="{max(x2 - x1, 0):.2f}" height="{max(y2 - y1, 0):.2f}">{title}'
        f"</rect>{_label(number, x1 + scale, y1 + 7 * scale, scale)}"
    )


def _label(number: int, x: float, y: float, scale: float) -> str:
    size = f'font-size="{7 * scale:.2f}"'
    return f'<text class="c{number % _NUM_COLOURS}" x="{x:.2f}" y="{y:.2f}" {size}>{number}</text>'


def box_at(mark: Mark, time_s: float | None) -> tuple[float, float, float, float] | None:
    """The box to draw on a picture, or on a video's frame at that time; None where there is none then.

    Between two boxes of a tube the box moves evenly. A box with a time of its own shows for half a second around it.
    """
    region = mark.region
    if region.tube is None:
        if time_s is not None and region.time_s is not None and abs(time_s - region.time_s) > 0.25:
            return None
        return region.box
    times = [box[0] for box in region.tube]
    if time_s is None or not times[0] <= time_s <= times[-1]:
        return None
    x1, y1, x2, y2 = (float(np.interp(time_s, times, [box[i] for box in region.tube])) for i in range(1, 5))
    return x1, y1, x2, y2


def _sound(sound: Sound, name: str) -> str:
    cut = "" if sound.duration_s <= MAX_SOUND_S else f", the first {MAX_SOUND_S:.0f} s here"
    total = sound.mels.shape[1]
    low, high = float(sound.mels.min()), float(sound.mels.max())
    kept = _spectrogram(sound.mels[:, : sound.num_kept], low, high)
    whole = _spectrogram(sound.mels, low, high)
    return (
        f'<figure class="sound"><audio controls preload="metadata" src="{_sound_uri(sound.samples)}"></audio>'
        f'<img class="mels" alt="{name}, log-mel spectrogram of what the model gets" src="{_image_uri(kept)}">'
        f"<figcaption>{sound.duration_s:.2f} s{cut}; {sound.mels.shape[0]} mels, low tones below</figcaption>"
        f'<img class="mels whole" alt="{name}, all windows of the encoder" src="{_image_uri(whole)}">'
        f"<figcaption>all the encoder works on, {sound.num_kept:,} of {total:,} spectra are kept</figcaption></figure>"
    )


# Dark to light, even to the eye and in grey.
_HEAT = np.array(
    [(4, 4, 18), (62, 15, 108), (150, 38, 112), (226, 86, 72), (252, 170, 80), (252, 250, 190)], np.float64
)


def _spectrogram(mels: np.ndarray, low: float, high: float) -> Image.Image:
    """[mels, frames] as a picture, low tones at the bottom."""
    level = (mels[::-1] - low) / max(high - low, 1e-6) * (len(_HEAT) - 1)
    channels = [np.interp(level, np.arange(len(_HEAT)), _HEAT[:, i]) for i in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8)).quantize(64)


def _image_uri(image: Image.Image) -> str:
    out = BytesIO()
    if image.mode == "P" or max(image.size) <= _LOSSLESS_SIDE:
        kind = "png"
        image.save(out, "PNG", optimize=True)
    else:
        kind = "webp"
        image.save(out, "WEBP", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def _sound_uri(samples: np.ndarray) -> str:
    out = BytesIO()
    soundfile.write(out, samples, SAMPLE_RATE_HZ, format="MP3")
    return f"data:audio/mpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


_STYLE = """
:root { color-scheme: light dark; --back: #fafaf8; --card: #fff; --text: #1c1e21; --muted: #5d646c; --line: #dfe2e5;
  --accent: #0b6e62; --learned: #c6ecd2; --learned-text: #0c3d20; --special: #e9e6f5; --special-text: #4b3f86;
  --chip: #dbe9fb; --chip-text: #16437e; --bad: #b3261e; --bar: #6a8f8a;
  --c0: #d6336c; --c1: #0b7285; --c2: #e8590c; --c3: #5f3dc4; --c4: #2b8a3e; --c5: #b08900 }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --card: #1e2125; --text: #e8e8e6; --muted: #a0a7af;
  --line: #363b41; --accent: #4fd1bd; --learned: #1d5135; --learned-text: #d3f7e0; --special: #36304f;
  --special-text: #cbc3f5; --chip: #1d3a5f; --chip-text: #cfe3fc; --bad: #ff8a80; --bar: #6fa39c;
  --c0: #ff6b9d; --c1: #3bc9db; --c2: #ff9250; --c3: #a78bfa; --c4: #69db7c; --c5: #ffd43b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Open Sans", sans-serif }
h1 { font-size: 1.6rem; margin: .5rem 0 0 } h2 { font-size: 1.3rem; margin: 2.2rem 0 0 }
h3 { font-size: 1rem; margin: 1rem 0 0 } h4 { font-size: .85rem; margin: 0 0 .3rem }
p { margin: .3rem 0 } .muted { color: var(--muted); font-size: .85rem } .problem { color: var(--bad) }
a { color: var(--accent) } .skip { position: absolute; left: -99rem } .skip:focus { left: 1rem }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
nav ul, .chips { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .4rem 0 }
h1, h2, h3, td, th, summary, .muted, .problem { overflow-wrap: anywhere }
.tiles { display: flex; flex-wrap: wrap; gap: .5rem; margin: .8rem 0 }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .35rem .8rem }
.tiles dt { color: var(--muted); font-size: .75rem } .tiles dd { margin: 0; font-size: 1.1rem;
  font-variant-numeric: tabular-nums }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 45%), 1fr)); gap: .8rem }
figure { margin: 0 } .plot figcaption { font-size: .8rem; margin-bottom: .2rem } figcaption { color: var(--muted) }
.plot svg { width: 100%; display: block } .plot text { font-size: 10px; fill: var(--muted) }
.bar { fill: var(--bar) } .dot { fill: var(--accent); fill-opacity: .55 } .axis { fill: none; stroke: var(--line) }
.limit { stroke: var(--bad); stroke-dasharray: 3 2 }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem }
table { border-collapse: collapse; font-size: .85rem } td, th { text-align: left; vertical-align: top;
  padding: .12rem .8rem .12rem 0 } th { color: var(--muted); font-weight: normal } .number { text-align: right;
  font-variant-numeric: tabular-nums; color: var(--muted) }
.scroll { overflow-x: auto } .refused { margin: .8rem 0 } .refused summary { color: var(--bad) }
.stages { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 0 2rem }
.packs { display: grid; gap: .3rem; margin: .4rem 0 } .pack { display: grid; gap: .8rem; align-items: center;
  grid-template-columns: minmax(0, 1fr) 10.5rem } .pack svg { width: 100%; height: 22px; display: block }
.pack small { color: var(--muted) } .empty { fill: var(--line); fill-opacity: .6 } .gap { fill: var(--back) }
.block { fill: var(--c); fill-opacity: .4 } .solid { fill: var(--c) } .patches { fill: var(--muted) }
.key { margin-right: 1rem } i[class^="c"] { display: inline-block; width: .75em; height: .75em; border-radius: 2px;
  background: var(--c); margin-right: .35em }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) }
.c3 { --c: var(--c3) } .c4 { --c: var(--c4) } .c5 { --c: var(--c5) }
form { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center;
  background: var(--back); border-bottom: 1px solid var(--line); padding: .6rem 0; margin-top: 1.5rem }
form input[type=search] { width: 11rem; max-width: 60vw } select, input { font: inherit }
output { color: var(--muted); margin-left: auto }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem;
  margin: .9rem 0 } .card header { display: flex; flex-wrap: wrap; gap: 0 1.2rem; align-items: baseline }
.card h3 { margin: 0 } .chips { font-size: .85rem; color: var(--muted) } .card > header .chips { margin: 0 }
.sample { display: grid; grid-template-columns: minmax(0, 27rem) minmax(0, 1fr); gap: 1.2rem; margin-top: .6rem }
.sample.bare { grid-template-columns: minmax(0, 1fr) } .item { margin-bottom: .8rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; align-items: start }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(6.2rem, 22%), 1fr)); gap: .5rem }
.frame { display: grid; gap: .2rem } .frame figcaption, .pair figcaption, .sound figcaption { font-size: .75rem }
.drawn { position: relative; line-height: 0 } .drawn img { width: 100%; height: auto; border-radius: 3px }
.drawn.small img { image-rendering: pixelated }
.marks { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden }
.marks rect, .marks circle { fill: var(--c); fill-opacity: .08; stroke: var(--c); stroke-width: 2px;
  vector-effect: non-scaling-stroke } .marks circle { fill-opacity: 1; stroke: #fff }
.marks .unsaid { stroke-dasharray: 4 3 }
.marks text { fill: var(--c); font-weight: bold; paint-order: stroke; stroke: #fff; stroke-width: .22em }
.marks, .marks * { --c0: #d6336c; --c1: #0b7285; --c2: #e8590c; --c3: #5f3dc4; --c4: #2b8a3e; --c5: #b08900 }
.no-boxes .marks { display: none }
.sound audio { width: 100%; height: 36px } .mels { width: 100%; height: 110px; display: block; margin-top: .3rem;
  border-radius: 3px; image-rendering: pixelated } .mels.whole { height: 28px }
.tokens { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13.5px/1.75 ui-monospace, "DejaVu Sans Mono",
  Menlo, Consolas, monospace; max-height: 30rem; overflow-y: auto }
.t { border-radius: 2px; padding: 1px 0 } .t b { color: var(--muted); font-weight: normal; opacity: .7 }
.l { background: var(--learned); color: var(--learned-text) }
.s { background: var(--special); color: var(--special-text); font-size: .88em }
.s.l { background: var(--learned); color: var(--special-text) }
.edges .tokens .t { box-shadow: inset -1px 0 rgb(128 128 128 / .3) }
.chip { background: var(--chip); color: var(--chip-text); border-radius: 1em; padding: 1px .7em; font-size: .88em;
  white-space: nowrap } .t.at, .chip.at { outline: 2px solid var(--accent) }
.legend { display: flex; flex-wrap: wrap; gap: .3rem .6rem; align-items: center }
.regions { margin: .5rem 0; white-space: nowrap } .regions td, .regions th { overflow-wrap: normal }
pre { overflow-x: auto; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
details { margin-top: .5rem } summary { cursor: pointer } footer { margin: 3rem 0 4rem }
#token { position: fixed; left: 50%; bottom: .8rem; transform: translateX(-50%); background: var(--text);
  color: var(--back); border-radius: .5rem; padding: .3rem .9rem; font-size: .85rem; max-width: 94vw; z-index: 3 }
[hidden] { display: none !important }
@media (max-width: 46rem) { .sample { grid-template-columns: minmax(0, 1fr) } form { position: static } }
"""

_SCRIPT = """
"use strict";
const find = (id) => document.getElementById(id);
const cards = [...document.querySelectorAll(".card")];
const words = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
const choose = () => {
  const source = find("source").value, kind = find("with").value, text = find("text").value.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    const hasId = /^[0-9]+$/.test(text) && card.querySelector(`[data-i~="${text}"]`);
    card.hidden = (source !== "" && card.dataset.source !== source)
      || (kind !== "" && !card.dataset.kinds.split(" ").includes(kind))
      || (text !== "" && !words.get(card).includes(text) && !hasId);
    shown += !card.hidden;
  }
  for (const section of document.querySelectorAll("section[data-source]"))
    section.hidden = source !== "" && section.dataset.source !== source;
  find("count").textContent = `${shown} of ${cards.length} samples`;
};
const look = () => {
  document.body.classList.toggle("no-boxes", !find("boxes").checked);
  document.body.classList.toggle("edges", find("edges").checked);
};
let at = null;
const say = (token) => {
  if (at) at.classList.remove("at");
  at = token;
  find("token").hidden = !token;
  if (!token) return;
  token.classList.add("at");
  const { p, i, g } = token.dataset, facts = [`position ${p}`];
  if (i) facts.push((i.includes(" ") ? "ids " : "id ") + i, token.classList.contains("l") ? "learned" : "not learned");
  else facts.push(token.textContent);
  if (token.classList.contains("s")) facts.push("special");
  if (g) facts.push(`adapters: ${g}`);
  find("token").textContent = facts.join(" \\u00b7 ");
};
const isToken = (target) => target.closest && target.closest(".tokens > [data-p]");
document.addEventListener("pointerover", (event) => {
  const token = isToken(event.target);
  if (token || at) say(token);
});
document.addEventListener("focusin", (event) => {
  if (event.target.classList.contains("tokens")) say(event.target.firstElementChild); else say(null);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") say(null);
  const tokens = document.activeElement;
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
  if (!tokens.classList.contains("tokens") || !step[event.key]) return;
  const next = at && at.parentElement === tokens ? at[step[event.key]] : tokens.firstElementChild;
  if (next) { say(next); next.scrollIntoView({ block: "nearest" }); }
  event.preventDefault();
});
find("controls").addEventListener("input", () => { choose(); look(); });
find("controls").addEventListener("submit", (event) => event.preventDefault());
choose();
look();
"""
