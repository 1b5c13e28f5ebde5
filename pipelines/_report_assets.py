"""Style sheet and script of ``report.html``, kept in Python so that every wheel carries them."""

from __future__ import annotations

STYLE = """
:root {
  --paper: #f6f5f1; --card: #ffffff; --ink: #1d2126; --soft: #626a73; --line: #dfddd5;
  --accent: #0f7173; --pale: #d5e8e4; --deep: #0a4a55; --fail: #efc9bb;
  --good: #1d7a46; --warn: #a86400; --bad: #b3261e;
  --good-bg: #e3f2e8; --warn-bg: #fbeed3; --bad-bg: #fae1dd;
  color-scheme: light;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e8e6e1; --soft: #9aa3ab; --line: #31373d;
    --accent: #4fb8b0; --pale: #1f4548; --deep: #8ee3d3; --fail: #5c3a35;
    --good: #62c98c; --warn: #e5ac4d; --bad: #f2877b;
    --good-bg: #17301f; --warn-bg: #362a12; --bad-bg: #3a1d1a;
    color-scheme: dark;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1, h2, h3, p, ul, figure { margin: 0; }
h2 { font-size: 1.3rem; line-height: 1.25; margin-bottom: .9rem; }
h3 { font-size: 1rem; }
a { color: var(--accent); }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em;
}
td code, th code { overflow-wrap: anywhere; }
.eyebrow { color: var(--soft); font-size: .9rem; }
h1 { font-size: 1.5rem; font-weight: 500; line-height: 1.15; margin: .35rem 0 .8rem; }
h1 strong {
  font-size: clamp(2.8rem, 9vw, 4.6rem); font-weight: 700; letter-spacing: -.03em;
  font-variant-numeric: tabular-nums; margin-right: .1em;
}
h1 strong span { color: var(--soft); font-weight: 300; }
.share { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; }
.share i { display: block; height: 100%; border-radius: 3px; background: var(--good); }
.share.warn i { background: var(--warn); }
.share.bad i { background: var(--bad); }
.verdicts { list-style: none; padding: 0; margin: 1rem 0; display: grid; gap: .5rem; }
.verdicts li {
  padding: .6rem .9rem; border-radius: 8px; border-left: 4px solid var(--line);
  background: var(--card);
}
.verdicts .good { background: var(--good-bg); border-color: var(--good); }
.verdicts .warn { background: var(--warn-bg); border-color: var(--warn); }
.verdicts .bad { background: var(--bad-bg); border-color: var(--bad); }
.verdicts .note::before { content: "Note: "; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: .75rem; }
.tile, section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
}
.tile { padding: .8rem .9rem; min-width: 0; }
.tile h3 { font-size: .82rem; font-weight: 500; color: var(--soft); }
.tile b { display: block; font-size: clamp(1.2rem, 1.9vw, 1.6rem); line-height: 1.5rem;
  white-space: nowrap; margin: .3rem 0; font-variant-numeric: tabular-nums; }
.tile small { font-size: .95rem; font-weight: 500; color: var(--soft); margin-left: .2em; }
.tile p { font-size: .82rem; line-height: 1.35; color: var(--soft); }
.command {
  margin: 1rem 0 0; padding: .6rem .9rem; border-radius: 8px; border: 1px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft);
}
nav {
  position: sticky; top: 0; z-index: 1100; display: flex; gap: 1.1rem; overflow-x: auto;
  scrollbar-width: none; background: var(--paper); margin: 1rem 0; padding: .6rem 0;
  border-bottom: 1px solid var(--line);
}
nav a { white-space: nowrap; text-decoration: none; font-size: .92rem; }
nav a:hover { text-decoration: underline; }
section { padding: 1.3rem 1.4rem 1.4rem; margin-bottom: 1.1rem; }
section > h3 { margin-top: 1.2rem; }
section > h2 + h3, section > .legend + h3 { margin-top: .3rem; }
section > h3 + p { color: var(--soft); margin-bottom: .6rem; }
.caption, .legend, figcaption { color: var(--soft); font-size: .88rem; }
.caption { margin-top: .5rem; }
.group + .group { margin-top: 1.4rem; }
.group h3 span {
  display: inline-block; min-width: 1.6em; padding: 0 .45em; margin-left: .25em; border-radius: 1em;
  text-align: center; font-size: .85em; color: var(--bad); background: var(--bad-bg);
}
.group > p { max-width: 70ch; }
.cards {
  list-style: none; padding: 0; margin-top: .7rem; display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr));
}
.cards li {
  display: flex; gap: .8rem; padding: .6rem; border: 1px solid var(--line); border-radius: 8px;
  min-width: 0;
}
.cards li div { min-width: 0; overflow-wrap: anywhere; }
.cards img, .blank { width: 96px; height: 72px; flex: none; border-radius: 5px; object-fit: cover; }
.blank { background: repeating-linear-gradient(45deg, var(--line) 0 1px, transparent 1px 7px); }
.cards b { font-weight: 600; font-size: .92rem; }
.cards p { color: var(--soft); font-size: .85rem; line-height: 1.4; }
.controls {
  display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1.2rem; margin-bottom: .8rem;
  font-size: .92rem;
}
.controls label { display: inline-flex; align-items: center; gap: .4rem; }
.controls #filter-count { color: var(--soft); }
input, select, button { font: inherit; color: inherit; accent-color: var(--accent); }
.controls input[type=search], .controls select, .controls button {
  background: var(--paper); border: 1px solid var(--line); border-radius: 7px;
  padding: .3rem .65rem;
}
.controls button { cursor: pointer; }
.controls input[type=search] { flex: 0 1 16rem; min-width: 0; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.chart { min-height: 300px; }
.chart.scene {
  height: min(68vh, 620px); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  background: var(--paper);
}
#chart-graph { position: relative; max-width: 760px; margin: 0 auto; }
.tip {
  position: absolute; z-index: 1200; pointer-events: none; white-space: pre-line; max-width: 90%;
  padding: .4rem .65rem; border: 1px solid var(--line); border-radius: 7px; font-size: .88rem;
  background: var(--card); overflow-wrap: anywhere; box-shadow: 0 2px 8px rgb(0 0 0 / .18);
}
.paper { display: none; }
.chart p.gone { padding: 1rem; color: var(--soft); }
.twin { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; }
.twin figure { min-width: 0; }
.twin h3 { color: var(--ink); }
.gallery {
  display: grid; gap: 1.1rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr));
}
.gallery img { display: block; width: 100%; max-width: 530px; border-radius: 6px; }
.gallery figcaption { margin-top: .3rem; }
.gallery figcaption b { color: var(--ink); }
.gallery .names { display: block; color: var(--ink); overflow-wrap: anywhere; }
.legend .line {
  display: inline-block; width: 1.6em; height: 0; border-top: 3px solid #26de81;
  vertical-align: middle; margin: 0 .25em 0 .1em;
}
.legend .outlier { border-color: #ff4040; border-top-width: 2px; margin-left: .8em; }
.scroll { overflow: auto; max-height: 36rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .34rem .55rem; text-align: left; vertical-align: baseline; }
tbody tr { border-top: 1px solid var(--line); }
tbody tr:first-child { border-top: 0; }
tbody th { font-weight: 500; overflow-wrap: anywhere; }
td { font-variant-numeric: tabular-nums; }
.n { text-align: right; }
td:not(:last-child) { white-space: nowrap; }
thead th {
  position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 500;
  box-shadow: inset 0 -1px var(--line); white-space: nowrap;
}
thead button { all: unset; cursor: pointer; }
thead button:focus-visible { outline: 2px solid var(--accent); }
thead th[aria-sort] { color: var(--accent); }
thead th[aria-sort] button::after { content: " \\2191"; }
thead th[aria-sort=descending] button::after { content: " \\2193"; }
#image-table tbody tr:hover { background: var(--paper); }
#image-table tbody th { min-width: 7rem; max-width: 26rem; }
.dot {
  display: inline-block; width: .6em; height: .6em; border-radius: 50%; margin-right: .5em;
  background: var(--good);
}
.dot.bad { background: var(--bad); }
.timings { max-width: 46rem; }
.timings th { width: 9.5rem; }
.timings .bar { width: 55%; }
.timings .bar i { display: block; height: .8rem; border-radius: 3px; background: var(--accent); }
details summary { cursor: pointer; padding: .25rem 0; }
#settings th { width: 34%; color: var(--soft); }
#settings td:last-child { white-space: normal; }
footer { color: var(--soft); font-size: .88rem; margin-top: 1.5rem; }
@media (max-width: 900px) { .tiles { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 640px) {
  main { padding: 1.1rem .8rem 2rem; }
  section { padding: 1rem .9rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .twin { grid-template-columns: 1fr; }
  .chart.scene { height: min(62vh, 440px); }
  .timings .bar { width: 40%; }
  .timings th { width: auto; }
  th, td { padding: .34rem .45rem; }
}
@media print {
  :root { --paper: #fff; color-scheme: light; }
  nav, .controls { display: none; }
  main { max-width: none; padding: 0; }
  section { border: 0; padding: .5rem 0; }
  .scroll { max-height: none; overflow: visible; }
  .paper { display: block; max-width: 100%; }
  .paper + .scene { display: none; }
  figure, .chart, .tile, .cards li, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  thead th { position: static; }
}
"""

SCRIPT = r"""
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const element = id => document.getElementById(id);

  /* ---- image table: sorting and filtering ---- */
  const table = element("image-table");
  if (table) {
    const body = table.tBodies[0], rows = Array.from(body.rows);
    const compare = new Intl.Collator(undefined, {numeric: true}).compare;
    const key = (row, column, numeric) => {
      const cell = row.cells[column];
      const value = "v" in cell.dataset ? cell.dataset.v : cell.textContent;
      return numeric ? (value === "" ? null : Number(value)) : value;
    };
    table.tHead.addEventListener("click", event => {
      const head = event.target.closest("th");
      if (!head) return;
      const column = head.cellIndex;
      const numeric = rows.every(row => {
        const value = row.cells[column].dataset.v;
        return value !== undefined && !Number.isNaN(Number(value));
      });
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort((a, b) => {
        const x = key(a, column, numeric), y = key(b, column, numeric);
        if (x === null || y === null) return (x === null) - (y === null);
        const order = numeric ? x - y : compare(x, y);
        return down ? -order : order;
      });
      body.append(...rows);
    });
    const filter = () => {
      const word = element("filter-name").value.toLowerCase();
      const status = element("filter-status").value;
      let shown = 0;
      for (const row of rows) {
        const fits = row.cells[0].textContent.toLowerCase().includes(word)
          && (!status || row.cells[1].dataset.v === status);
        row.hidden = !fits;
        shown += fits;
      }
      const all = `${rows.length} image${rows.length === 1 ? "" : "s"}`;
      element("filter-count").textContent = shown === rows.length ? all : `${shown} of ${all}`;
    };
    element("filter-name").addEventListener("input", filter);
    element("filter-status").addEventListener("change", filter);
  }

  /* ---- charts ---- */
  const charts = Array.from(document.querySelectorAll(".chart"));
  if (typeof Plotly === "undefined") {
    for (const chart of charts) {
      const note = document.createElement("p");
      note.className = "gone";
      note.textContent = "The chart library is missing from this page.";
      chart.append(note);
    }
    return;
  }
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const floats = text => new Float32Array(bytes(text).buffer);
  // Plotly reads a little markup in its texts; file names must stay what they are.
  const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (text, limit) => text.length > limit ? "…" + text.slice(1 - limit) : text;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = name =>
    getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const config = {responsive: true, displaylogo: false, displayModeBar: false};
  const hoverlabel = () => ({
    bgcolor: colour("card"), bordercolor: colour("line"), font: {color: colour("ink")},
  });
  const layout = extra => Object.assign({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("soft")},
    hoverlabel: hoverlabel(), showlegend: false, dragmode: false,
  }, extra);
  const axis = (title, extra) => Object.assign({
    title: {text: title, standoff: 10}, gridcolor: colour("line"), linecolor: colour("line"),
    zerolinecolor: colour("line"), fixedrange: true, automargin: true,
  }, extra);

  const draw = {};
  if (data.tracks) draw.tracks = () => {
    const {labels, counts} = data.tracks;
    const total = counts.reduce((a, b) => a + b, 0);
    const many = counts[0] > total / 2;
    return [[{
      type: "bar", x: labels, y: counts,
      marker: {color: labels.map((_, i) => i === 0 && many ? colour("warn") : colour("accent"))},
      customdata: counts.map(count => 100 * count / total),
      hovertemplate: "seen by %{x} images: %{y:,} points (%{customdata:.1f} %)<extra></extra>",
    }], layout({
      height: 300, bargap: 0.18, margin: {l: 10, r: 10, t: 10, b: 10},
      xaxis: axis("images that see a point", {type: "category", showgrid: false, tickangle: 0}),
      yaxis: axis("points", {tickformat: "~s"}),
    })];
  };
  if (data.errors) draw.errors = () => {
    const {edges, counts} = data.errors;
    return [[{
      type: "bar", y: counts, x: counts.map((_, i) => (edges[i] + edges[i + 1]) / 2),
      width: counts.map((_, i) => edges[i + 1] - edges[i]),
      marker: {color: colour("accent"), line: {color: colour("card"), width: 1}},
      customdata: counts.map((_, i) => `${+edges[i].toFixed(3)} to ${+edges[i + 1].toFixed(3)}`),
      hovertemplate: "%{customdata} px: %{y:,} observations<extra></extra>",
    }], layout({
      height: 300, margin: {l: 10, r: 10, t: 10, b: 10},
      xaxis: axis("reprojection error (px)", {showgrid: false, rangemode: "tozero"}),
      yaxis: axis("observations", {tickformat: "~s"}),
    })];
  };

  let graph = null;
  const unpackGraph = () => {
    const {names, bits} = data.graph, n = names.length;
    const Kind = bits === 16 ? Uint16Array : Uint32Array;
    const inliers = new Kind(bytes(data.graph.inliers).buffer);
    const matches = new Kind(bytes(data.graph.matches).buffer);
    const square = () => Array.from({length: n}, () => new Array(n).fill(null));
    graph = {z: square(), inliers: square(), matches: square(), most: 1};
    for (const value of inliers) graph.most = Math.max(graph.most, value - 1);
    const top = Math.log10(1 + graph.most);
    for (let i = 0, k = 0; i < n; i++) for (let j = i + 1; j < n; j++, k++) {
      if (!inliers[k]) continue;
      const count = inliers[k] - 1;
      const z = count ? 0.06 + 0.94 * Math.log10(1 + count) / top : 0;
      graph.z[i][j] = graph.z[j][i] = z;
      graph.inliers[i][j] = graph.inliers[j][i] = count;
      graph.matches[i][j] = graph.matches[j][i] = matches[k] - 1;
    }
    graph.top = top;
  };
  if (data.graph) draw.graph = () => {
    if (!graph) unpackGraph();
    const names = data.graph.names, n = names.length;
    const places = names.map((_, i) => i);
    const width = element("chart-graph").clientWidth;
    const labelled = n <= 40 && width > 560;
    const ticks = labelled
      ? {tickvals: places, ticktext: names.map(name => plain(short(name, 22)))}
      : {showticklabels: false};
    const steps = [];
    for (let step = 1; step <= graph.most; step *= 10) {
      for (const value of [step, 3 * step]) if (value <= graph.most) steps.push(value);
    }
    const level = count => 0.06 + 0.94 * Math.log10(1 + count) / graph.top;
    const edge = {
      showgrid: false, zeroline: false, fixedrange: false, automargin: true,
      linecolor: colour("line"), mirror: true, showline: true, constrain: "domain",
    };
    return [[{
      type: "heatmap", z: graph.z, zmin: 0, zmax: 1, xgap: n <= 60 ? 1 : 0, ygap: n <= 60 ? 1 : 0,
      colorscale: [[0, colour("fail")], [0.05, colour("fail")], [0.05, colour("pale")],
        [0.55, colour("accent")], [1, colour("deep")]],
      x: places, y: places, hoverinfo: "none", hoverongaps: false,
      colorbar: {
        title: {text: "inliers", side: "right"}, thickness: 12, outlinewidth: 0, len: 0.9,
        tickvals: [0.025, ...steps.map(level)],
        ticktext: ["none", ...steps.map(value => value.toLocaleString("en"))],
      },
    }], layout({
      height: Math.min(width, 760) - 70, margin: {l: 10, r: 10, t: 10, b: 10},
      dragmode: n > 40 ? "zoom" : false,
      xaxis: Object.assign({}, edge, ticks, {tickangle: -60}),
      yaxis: Object.assign({}, edge, ticks, {autorange: "reversed", scaleanchor: "x"}),
    })];
  };

  let world = null;
  const unpackScene = () => {
    const split = flat => [0, 1, 2].map(k => {
      const axis = new Array(flat.length / 3);
      for (let i = 0; i < axis.length; i++) {
        const value = flat[3 * i + k];
        axis[i] = Number.isNaN(value) ? null : value;
      }
      return axis;
    });
    const rgb = bytes(data.scene.colours), colours = new Array(rgb.length / 3);
    for (let i = 0; i < colours.length; i++) {
      colours[i] = `rgb(${rgb[3 * i]},${rgb[3 * i + 1]},${rgb[3 * i + 2]})`;
    }
    world = {
      points: split(floats(data.scene.points)), colours,
      centers: split(floats(data.scene.cameras.centers)),
      frusta: split(floats(data.scene.cameras.frusta)),
    };
  };
  const startCamera = () => {
    // The field of view is vertical: step back where the view is narrow.
    const {clientWidth, clientHeight} = element("chart-scene");
    const back = Math.max(1, 1.5 * clientHeight / Math.max(1, clientWidth));
    const [cx, cy, cz] = data.scene.centre;
    const [x, y, z] = data.scene.eye.map(
      (value, i) => data.scene.centre[i] + back * (value - data.scene.centre[i]));
    return {
      up: {x: 0, y: 0, z: 1}, center: {x: cx, y: cy, z: cz}, eye: {x, y, z},
      projection: {type: "perspective"},
    };
  };
  if (data.scene) draw.scene = () => {
    if (!world) unpackScene();
    const names = data.scene.cameras.names;
    const hidden = range => ({
      visible: false, range, autorange: false, showspikes: false,
    });
    const trace = ([x, y, z], extra) => Object.assign({type: "scatter3d", x, y, z}, extra);
    const [rx, ry, rz] = data.scene.ranges;
    const kept = element("chart-scene").classList.contains("js-plotly-plot");
    return [[
      trace(world.points, {
        mode: "markers", hoverinfo: "skip", visible: element("show-points").checked,
        marker: {size: Number(element("point-size").value), color: world.colours, line: {width: 0}},
      }),
      trace(world.frusta, {
        mode: "lines", hoverinfo: "skip", connectgaps: false,
        visible: element("show-cameras").checked, line: {color: colour("accent"), width: 2.5},
      }),
      trace(world.centers, {
        mode: "markers", text: names.map(plain), hovertemplate: "%{text}<extra></extra>",
        visible: element("show-cameras").checked,
        marker: {size: 2.5, color: colour("accent"), line: {width: 0}},
      }),
    ], layout({
      margin: {l: 0, r: 0, t: 0, b: 0}, dragmode: "turntable", uirevision: "keep",
      scene: {
        xaxis: hidden(rx), yaxis: hidden(ry), zaxis: hidden(rz), aspectmode: "data",
        dragmode: "turntable", camera: kept ? undefined : startCamera(), uirevision: "keep",
      },
    })];
  };

  const paint = key => {
    const target = element("chart-" + key);
    if (!target) return;
    const [traces, shape] = draw[key]();
    return Plotly.react(target, traces, shape, config);
  };
  const paintAll = () => Object.keys(draw).forEach(paint);
  paintAll();
  dark.addEventListener("change", paintAll);

  const chart = element("chart-scene");
  if (chart && data.scene) {
    element("point-size").addEventListener("input", event =>
      Plotly.restyle(chart, {"marker.size": Number(event.target.value)}, [0]));
    element("show-points").addEventListener("change", event =>
      Plotly.restyle(chart, {visible: event.target.checked}, [0]));
    element("show-cameras").addEventListener("change", event =>
      Plotly.restyle(chart, {visible: event.target.checked}, [1, 2]));
    // A WebGL canvas prints blank: on paper a picture of the current view stands in for it.
    const print = new Image();
    print.className = "paper";
    print.alt = "Points and cameras";
    window.addEventListener("beforeprint", () => {
      try {
        print.src = chart._fullLayout.scene._scene.toImage("png");
        chart.before(print);
      } catch (error) {
        console.info("no picture of the 3D view for printing:", error);
      }
    });
    window.addEventListener("afterprint", () => print.remove());
    element("reset-view").addEventListener("click", () =>
      Plotly.relayout(chart, {"scene.camera": startCamera()}));
  }

  /* ---- match graph: names and counts of the cell under the pointer ---- */
  const matrix = element("chart-graph");
  if (matrix && data.graph) {
    const note = document.createElement("div");
    note.className = "tip";
    note.hidden = true;
    matrix.append(note);
    matrix.on("plotly_hover", event => {
      const {x, y} = event.points[0], names = data.graph.names;
      const matches = graph.matches[y][x].toLocaleString("en");
      const inliers = graph.inliers[y][x].toLocaleString("en");
      note.textContent = `${names[y]}\n${names[x]}\n${inliers} inliers of ${matches} matches`;
      note.hidden = false;
      const box = matrix.getBoundingClientRect();
      const left = event.event.clientX - box.left + 14;
      note.style.left = Math.max(0, Math.min(left, box.width - note.offsetWidth)) + "px";
      note.style.top = event.event.clientY - box.top + 14 + "px";
    });
    matrix.on("plotly_unhover", () => { note.hidden = true; });
  }
})();
"""
