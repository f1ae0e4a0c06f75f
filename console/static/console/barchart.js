// Draws <div class="chart" data-bars='{"x": […], "traces": [{name, colour, y}]}'> as stacked bars and
// keeps the theme. The values are the page's own; a table beside the chart shows the same.
import { usd } from "./format.js";

const CONFIG = { displayModeBar: false, displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "" };

// Local times: Plotly draws dates without a zone in UTC, so they are shifted once here.
function shifted(text) {
  const at = new Date(text);
  return new Date(at.getTime() - at.getTimezoneOffset() * 60000);
}

function draw(el) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const { x, traces } = JSON.parse(el.dataset.bars);
  const times = x.map(shifted);
  const axis = { gridcolor: colour("--hairline-color"), zerolinecolor: colour("--border-color"), tickfont: { size: 11 }, fixedrange: true };
  const layout = {
    barmode: "stack", bargap: 0.15, showlegend: false, hovermode: "x unified", margin: { l: 56, r: 8, t: 6, b: 36 },
    paper_bgcolor: colour("--sw-panel"), plot_bgcolor: colour("--sw-panel"),
    font: { color: colour("--body-quiet-color"), size: 11 },
    hoverlabel: { bgcolor: colour("--darkened-bg"), font: { color: colour("--body-fg") } },
    xaxis: { ...axis, type: "date", nticks: 8 }, yaxis: { ...axis, rangemode: "tozero", tickprefix: "$", nticks: 5 },
  };
  window.Plotly.react(el, traces.map((trace) => ({
    type: "bar", name: trace.name, x: times, y: trace.y, marker: { color: colour(`--sw-${trace.colour}`) },
    customdata: trace.y.map(usd), hovertemplate: "%{customdata}",
  })), layout, CONFIG);
  el.classList.remove("is-empty");
}

const drawAll = () => window.Plotly && document.querySelectorAll("[data-bars]").forEach(draw);
new MutationObserver(drawAll).observe(document.documentElement, { attributeFilter: ["data-theme"] });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
document.addEventListener("htmx:afterSwap", drawAll);
drawAll();
