// Puts the values of live frames into the page: one websocket (htmx's), no drawing, no layout shift.
// Cells name their value: data-live="classes/interactive/ttft_ms_p99" data-format="ms".
import * as format from "./format.js";

const STALE_MS = 3500; // frames come each second
const root = document.getElementById("live");
const pill = document.getElementById("live-pill");
const alerts = document.getElementById("alerts");
let newest = null;
let heardAt = performance.now();
let isOpen = false;
let isPaused = false;

// A socket that the server refuses for good (4401 signed out, 4403 other origin) is not tried again.
const REFUSED = { 4401: "signed out", 4403: "refused" };
let refusal = "";

function setText(cell, text) {
  if (cell.textContent !== text) cell.textContent = text;
}

function showStatus(badge, value) {
  const [icon, word] = format.STATUS[value] ?? ["none", "unknown"];
  badge.className = `status is-${icon}`;
  badge.querySelector("use").setAttribute("href", `#i-${icon}`);
  setText(badge.querySelector(".status-word"), word);
}

function show(frame) {
  for (const cell of document.querySelectorAll("[data-live]")) {
    const text = format[cell.dataset.format](format.pick(frame, cell.dataset.live));
    setText(cell, text);
    if (cell.dataset.empty !== undefined) cell.classList.toggle("is-empty", text === format.NO_DATA);
    if (cell.dataset.target) {
      const target = format.pick(frame, cell.dataset.target);
      const value = format.pick(frame, cell.dataset.live);
      cell.classList.toggle("over", target !== null && value !== null && value > target);
    }
  }
  for (const bar of document.querySelectorAll("[data-live-bar]")) {
    const value = format.pick(frame, bar.dataset.liveBar);
    const whole = bar.dataset.whole ? format.pick(frame, bar.dataset.whole) : 1;
    const ratio = value === null || !whole ? null : value / whole;
    bar.firstElementChild.setAttribute("width", format.share(ratio));
    bar.classList.toggle("over", bar.dataset.whole !== undefined && ratio > 1);
  }
  for (const badge of document.querySelectorAll("[data-live-status]")) {
    const value = format.pick(frame, badge.dataset.liveStatus);
    showStatus(badge, value);
    badge.closest("[data-toned]")?.setAttribute("data-tone", value);
  }
  for (const tile of document.querySelectorAll(".tile[data-class]")) {
    const value = format.pick(frame, `classes/${tile.dataset.class}/status`);
    tile.classList.toggle("is-ok", value === "ok");
    tile.classList.toggle("is-missed", value === "missed");
  }
  showAlerts(frame);
  reloadWhatChangedShape(frame);
}

// Announced politely, and only when the list changes: never on each tick.
function showAlerts(frame) {
  if (!alerts) return;
  const lines = frame.alerts ?? [];
  const joined = JSON.stringify(lines);
  if (alerts.dataset.shown === joined) return;
  alerts.dataset.shown = joined;
  alerts.replaceChildren(...lines.map((line) => {
    const paragraph = document.createElement("p");
    paragraph.textContent = line.text;
    paragraph.className = line.level;
    return paragraph;
  }));
}

// A worker came, went or changed role: the server renders that part again (hx-trigger on the part).
function reloadWhatChangedShape(frame) {
  for (const part of document.querySelectorAll("[data-shape]")) {
    const shape = frame.shapes?.[part.dataset.shapeOf];
    if (shape === undefined || shape === part.dataset.shape) continue;
    part.dataset.shape = shape;
    window.htmx.trigger(part, "sw:shape");
  }
}

function take(text, socket) {
  const frame = JSON.parse(text);
  socket.send(JSON.stringify({ ack: frame.seq }));
  heardAt = performance.now();
  newest = frame;
  if (!isPaused) show(frame);
  document.dispatchEvent(new CustomEvent("sw:frame", { detail: { frame, isPaused } }));
  showPill();
}

function showPill() {
  if (!pill) return;
  const silent = performance.now() - heardAt;
  const isStale = !isOpen || silent > STALE_MS;
  document.body.classList.toggle("is-stale", isStale);
  pill.className = `live-pill ${isStale ? "is-stale" : isPaused ? "is-paused" : "is-live"}`;
  const state = refusal || (isStale ? `stale · ${format.age(silent / 1000)}` : isPaused ? "paused" : "live · 1 Hz");
  setText(pill, state);
}

export function togglePause() {
  const button = document.getElementById("pause");
  if (!button) return;
  isPaused = !isPaused;
  button.setAttribute("aria-pressed", String(isPaused));
  setText(button, isPaused ? "Resume" : "Pause");
  document.body.classList.toggle("is-paused", isPaused);
  if (!isPaused && newest) show(newest);
  document.dispatchEvent(new CustomEvent("sw:pause", { detail: { isPaused } }));
  showPill();
}

if (root) {
  root.addEventListener("htmx:wsOpen", () => { isOpen = true; showPill(); });
  root.addEventListener("htmx:wsClose", (event) => {
    isOpen = false;
    refusal = REFUSED[event.detail.event.code] ?? "";
    showPill();
  });
  root.addEventListener("htmx:wsBeforeMessage", (event) => {
    const { message, socketWrapper } = event.detail;
    if (message.startsWith("{")) {
      event.preventDefault();
      take(message, socketWrapper);
    } else {
      heardAt = performance.now();
      if (isPaused) event.preventDefault();
    }
  });
  document.getElementById("pause")?.addEventListener("click", togglePause);
  setInterval(showPill, 1000);
}
document.addEventListener("sw:key-pause", togglePause);
