/* Tables: a click on a heading sorts, fields filter; of long ones a part is shown until asked. */
const find = id => document.getElementById(id);
const order = new Intl.Collator(undefined, {numeric: true}).compare;
const cell = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
const listing = (id, noun, wanted, most = 50) => {
  const table = find(`${id}-table`), body = table.tBodies[0], rows = Array.from(body.rows);
  const more = find(`${id}-more`);
  const update = () => {
    const found = rows.filter(wanted);
    for (const row of rows) row.hidden = true;
    for (const row of found.slice(0, most)) row.hidden = false;
    const all = `${rows.length} ${noun}${rows.length === 1 ? "" : "s"}`;
    find(`${id}-count`).textContent = found.length === rows.length ? all : `${found.length} of ${all}`;
    more.hidden = found.length <= most;
    more.textContent = `Show all ${found.length}`;
  };
  more.addEventListener("click", () => { most = Infinity; update(); });
  table.tHead.addEventListener("click", event => {
    const head = event.target.closest("th");
    if (!head) return;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.sort((a, b) => {
      const x = cell(a, head.cellIndex), y = cell(b, head.cellIndex);
      if (x === "" || y === "") return (x === "") - (y === "");  /* unknown ones last */
      return (down ? -1 : 1) * (isNaN(x) || isNaN(y) ? order(x, y) : x - y);
    });
    body.append(...rows);
    update();
  });
  update();
  return update;
};

{% if pair_data %}
/* Pairs: a row of the table, a cell of the match graph or #pair-N shows two images and their matches. */
const data = JSON.parse(find("pair-data").textContent);
const canvas = find("pair-canvas"), images = {};
let current = 0;
const ends = code => new Uint16Array(Uint8Array.from(atob(code), c => c.charCodeAt(0)).buffer);
const picture = i => images[i] ??= new Promise(done => {
  const image = new Image();
  image.onload = () => done(image);
  image.onerror = () => done(null);
  image.src = data.pictures[i];
});
const drawPair = async () => {
  const [i, j, , , outliers, code] = data.pairs[current], number = current;
  const pair = await Promise.all([picture(i), picture(j)]);
  if (number !== current) return;
  const shape = pair.map(p => p ? p.naturalWidth / p.naturalHeight : 4 / 3), gap = 4;
  const scale = devicePixelRatio || 1, width = canvas.parentNode.clientWidth;
  const below = width < 560, places = [];
  if (below) {
    const heights = shape.map(s => Math.min(width / s, 360));
    places.push([0, 0, heights[0] * shape[0], heights[0]]);
    places.push([0, heights[0] + gap, heights[1] * shape[1], heights[1]]);
  } else {
    const height = Math.min((width - gap) / (shape[0] + shape[1]), 480);
    places.push([0, 0, height * shape[0], height], [height * shape[0] + gap, 0, height * shape[1], height]);
  }
  const right = Math.max(...places.map(p => p[0] + p[2])), bottom = Math.max(...places.map(p => p[1] + p[3]));
  canvas.width = right * scale;
  canvas.height = bottom * scale;
  canvas.style.width = `${right}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pair.forEach((image, k) => {
    pen.fillStyle = "#8885";
    if (image) pen.drawImage(image, ...places[k]); else pen.fillRect(...places[k]);
  });
  const xy = ends(code);
  for (let k = 0; k < xy.length / 4; k++) {
    const good = k >= outliers;
    if (!find(good ? "pair-inliers" : "pair-outliers").checked) continue;
    const at = [0, 1].map(n => [0, 1].map(axis => places[n][axis] + xy[4 * k + 2 * n + axis] / 65535 * places[n][2 + axis]));
    pen.strokeStyle = pen.fillStyle = good ? "rgb(38,222,129)" : "rgb(255,64,64)";
    pen.globalAlpha = 0.6;
    pen.beginPath();
    pen.moveTo(...at[0]);
    pen.lineTo(...at[1]);
    pen.stroke();
    pen.globalAlpha = 1;
    for (const [x, y] of at) {
      pen.beginPath();
      pen.arc(x, y, 2, 0, 7);
      pen.fill();
    }
  }
};
const rowOf = [];
const showPair = number => {
  current = number;
  const [i, j, inliers, matches, outliers, code] = data.pairs[number], lines = atob(code).length / 8;
  find("pair-names").textContent = `${data.names[i]} — ${data.names[j]}`;
  find("pair-counts").textContent = `${inliers.toLocaleString("en")} inliers of ${matches.toLocaleString("en")} matches`
    + (lines < matches ? `; ${lines - outliers} and ${outliers} rejected ones are drawn` : "");
  for (const row of rowOf) row.classList.toggle("current", row === rowOf[number]);
  find("pair-view").hidden = false;
  drawPair();
};
const openPair = number => {
  showPair(number);
  find("pair-view").scrollIntoView({block: "nearest"});
};
const pairBody = find("pair-table").tBodies[0];
data.pairs.forEach(([i, j, inliers, matches], number) => {
  const row = pairBody.insertRow(), share = matches ? inliers / matches : 0;
  for (const [text, value] of [[data.names[i]], [data.names[j]], [inliers.toLocaleString("en"), inliers],
      [matches.toLocaleString("en"), matches], [`${(100 * share).toFixed(0)}%`, share]]) {
    const at = row.insertCell();
    at.textContent = text;
    if (value !== undefined) { at.dataset.v = value; at.className = "n"; }
  }
  row.tabIndex = 0;
  row.addEventListener("click", () => openPair(number));
  row.addEventListener("keydown", event => { if (event.key === "Enter") openPair(number); });
  rowOf.push(row);
});
const showPairs = listing("pair", "pair", row => {
  const word = find("pair-filter").value.toLowerCase();
  return [0, 1].some(column => cell(row, column).toLowerCase().includes(word));
}, 12);
find("pair-filter").addEventListener("input", showPairs);
for (const id of ["pair-inliers", "pair-outliers"]) find(id).addEventListener("change", drawPair);
addEventListener("resize", drawPair);
const fromAddress = () => {
  const asked = /^#pair-(\d+)$/.exec(location.hash);
  if (asked && data.pairs[asked[1]]) openPair(+asked[1]);
};
addEventListener("hashchange", fromAddress);
if (data.pairs.length) showPair(0);
fromAddress();
const graph = find("chart-graph");
if (graph) graph.on("plotly_click", event => {
  const wanted = [...event.points[0].pointIndex].sort((a, b) => a - b).join();
  const number = data.pairs.findIndex(p => [p[0], p[1]].sort((a, b) => a - b).join() === wanted);
  if (number >= 0) openPair(number);
});
{% endif %}
