// Feeds live frames into Plotly and keeps the theme; it draws nothing itself.
// A chart is <div class="chart" data-chart="tokens" data-traces='[{"name":…,"stack":true}]'>; the
// values of a frame are frame.charts.tokens = [v, …] in the order of the traces, null for no data.
// With data-paths they are picked from the frame instead, and begin when the page is opened.
import { pick } from "./format.js";

export const DRAW_MS = 500;
export const POINTS_MAX = 600;
const WINDOW_MS_MIN = 120000;
const TABLE_ROWS = 12;

// --- pure ---------------------------------------------------------------------------------------
export function hasGap(lastSeq, seq) {
  return lastSeq !== null && seq !== lastSeq + 1;
}

export function mayDraw(lastDrawMs, nowMs) {
  return nowMs - lastDrawMs >= DRAW_MS;
}

// points [{t, values}] -> {x, y} as extendTraces takes them: one list per trace.
export function columns(points, numTraces) {
  const indexes = [...Array(numTraces).keys()];
  const x = points.map((point) => new Date(point.t));
  return {
    x: indexes.map(() => x),
    y: indexes.map((index) => points.map((point) => point.values[index] ?? null)),
  };
}

// --- page ---------------------------------------------------------------------------------------
const DASHES = ["solid", "dash", "dot", "dashdot"];
const CONFIG = {
  displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false,
  showSendToCloud: false, plotlyServerURL: "",
};

function colours() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(name).trim();
}

function layoutOf(chart) {
  const colour = colours();
  const axis = {
    gridcolor: colour("--hairline-color"), zerolinecolor: colour("--border-color"),
    tickfont: { size: 11 }, fixedrange: true, automargin: false,
  };
  const shapes = chart.line === null ? [] : [{
    type: "line", xref: "paper", x0: 0, x1: 1, y0: chart.line, y1: chart.line,
    line: { color: colour("--sw-missed"), width: 1.5, dash: "dash" },
  }];
  return {
    uirevision: "keep", showlegend: false, hovermode: "x unified", shapes,
    margin: { l: 46, r: 8, t: 6, b: 22 },
    paper_bgcolor: colour("--sw-panel"), plot_bgcolor: colour("--sw-panel"),
    font: { color: colour("--body-quiet-color"), size: 11 },
    hoverlabel: { bgcolor: colour("--darkened-bg"), font: { color: colour("--body-fg") } },
    xaxis: { ...axis, type: "date", tickformat: "%H:%M:%S", hoverformat: "%H:%M:%S", nticks: 7, range: windowOf(chart) },
    yaxis: { ...axis, rangemode: "tozero", ticksuffix: chart.suffix, nticks: 5 },
  };
}

// What is kept, at least WINDOW_MS_MIN wide, so that the first values do not fill the whole chart.
function windowOf(chart) {
  const newest = chart.points.at(-1).t;
  return [new Date(Math.min(chart.points[0].t, newest - WINDOW_MS_MIN)), new Date(newest)];
}

function tracesOf(chart, points) {
  const colour = colours();
  const { x, y } = columns(points, chart.specs.length);
  return chart.specs.map((spec, index) => ({
    type: "scatter", mode: "lines", name: spec.name, x: x[index], y: y[index],
    connectgaps: false, hovertemplate: `%{y:,.4~g}${chart.suffix}`,
    line: { color: colour(`--sw-${spec.colour}`), width: 1.6, dash: spec.stack ? "solid" : DASHES[spec.dash ?? 0] },
    ...(spec.stack ? { stackgroup: "one", line: { color: colour(`--sw-${spec.colour}`), width: 1 } } : {}),
  }));
}

const charts = typeof document === "undefined" ? [] : [...document.querySelectorAll("[data-chart]")].map((el) => ({
  el, id: el.dataset.chart, specs: JSON.parse(el.dataset.traces), paths: el.dataset.paths ? JSON.parse(el.dataset.paths) : null,
  suffix: el.dataset.suffix ?? "",
  line: el.dataset.line ? Number(el.dataset.line) : null, isDrawn: false, waiting: [], points: [],
}));
let lastSeq = null;
let lastDraw = -DRAW_MS;
let isPaused = false;
let needsHistory = true;
let isFetching = false;

// Local times: Plotly draws dates without a zone in UTC, so they are shifted once here.
function shifted(t) {
  return t - new Date(t).getTimezoneOffset() * 60000;
}

async function loadHistory() {
  if (isFetching) return;
  isFetching = true;
  try {
    const answer = await fetch(charts[0].el.dataset.history, { headers: { accept: "application/json" } });
    if (!answer.ok) return; // the next frame asks again
    const history = await answer.json();
    for (const chart of charts.filter((one) => !one.paths)) {
      const rows = history.charts[chart.id] ?? [];
      chart.points = history.t.map((t, index) => ({ t: shifted(t), values: rows[index] ?? [] }));
      chart.waiting = [];
    }
    lastSeq = history.seq;
    needsHistory = false;
    drawWhole();
  } finally {
    isFetching = false;
  }
}

function drawWhole() {
  for (const chart of charts) {
    if (!chart.points.length) continue;
    window.Plotly.react(chart.el, tracesOf(chart, chart.points), layoutOf(chart), CONFIG);
    if (!chart.isDrawn) bindHover(chart);
    chart.isDrawn = true;
    chart.el.classList.remove("is-empty");
    fillTable(chart);
  }
  lastDraw = performance.now();
}

function drawNew() {
  for (const chart of charts) {
    if (!chart.waiting.length) continue;
    chart.points = chart.points.concat(chart.waiting).slice(-POINTS_MAX);
    if (chart.isDrawn) {
      chart.el.layout.xaxis.range = windowOf(chart); // extendTraces draws the axis anew with it
      const indexes = chart.specs.map((_, index) => index);
      window.Plotly.extendTraces(chart.el, columns(chart.waiting, chart.specs.length), indexes, POINTS_MAX);
    }
    chart.waiting = [];
    fillTable(chart);
  }
  if (charts.some((chart) => !chart.isDrawn)) drawWhole();
  lastDraw = performance.now();
}

// One crosshair for all charts of the page.
function bindHover(chart) {
  chart.el.on("plotly_hover", (event) => {
    if (!event.event) return; // raised by us
    const pointNumber = event.points[0].pointIndex;
    for (const other of charts) {
      if (other === chart || !other.isDrawn || pointNumber >= other.el.data[0].x.length) continue;
      window.Plotly.Fx.hover(other.el, other.specs.map((_, curveNumber) => ({ curveNumber, pointNumber })));
    }
  });
}

function fillTable(chart) {
  const details = chart.el.parentElement.querySelector(".chart-table");
  if (!details?.open) return;
  const rows = chart.points.slice(-TABLE_ROWS).reverse().map((point) => {
    const row = document.createElement("tr");
    const cells = [new Date(point.t).toISOString().slice(11, 19),
      ...chart.specs.map((_, index) => point.values[index] === null || point.values[index] === undefined
        ? "no data" : `${Number(point.values[index].toPrecision(4))}${chart.suffix}`)];
    row.append(...cells.map((text, index) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      if (index) cell.className = "num";
      return cell;
    }));
    return row;
  });
  details.querySelector("tbody").replaceChildren(...rows);
}

function take({ frame }) {
  if (!frame.charts) return;
  if (hasGap(lastSeq, frame.seq)) needsHistory = true;
  lastSeq = frame.seq;
  for (const chart of charts) {
    const values = chart.paths ? chart.paths.map((path) => pick(frame, path)) : frame.charts[chart.id];
    chart.waiting = [...chart.waiting, { t: shifted(frame.t), values: values ?? [] }].slice(-POINTS_MAX);
  }
  if (document.hidden || isPaused || !window.Plotly || !mayDraw(lastDraw, performance.now())) return;
  if (needsHistory) loadHistory(); else drawNew();
}

if (charts.length) {
  document.addEventListener("sw:frame", (event) => take(event.detail));
  document.addEventListener("sw:pause", (event) => { isPaused = event.detail.isPaused; });
  document.addEventListener("visibilitychange", () => { needsHistory = true; });
  for (const chart of charts) {
    chart.el.parentElement.querySelector(".chart-table")?.addEventListener("toggle", () => fillTable(chart));
  }
  const repaint = () => window.Plotly && drawWhole();
  new MutationObserver(repaint).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  loadHistory();
}
