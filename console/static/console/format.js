// Numbers as operators read them: the same wording as templatetags/units.py.
// Pure functions; null means nothing was measured and reads NO_DATA.

export const NO_DATA = "no data";

function number(value) {
  if (value === null || value === undefined || value === "" || typeof value === "boolean") return null;
  const parsed = Number(value);
  return Number.isFinite(parsed) ? parsed : null;
}

function grouped(value, digits) {
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function ms(value) {
  const n = number(value);
  if (n === null) return NO_DATA;
  if (n === 0) return "0 ms";
  if (n < 10) return `${n.toFixed(1)} ms`;
  if (n < 1000) return `${n.toFixed(0)} ms`;
  return `${(n / 1000).toFixed(n < 10000 ? 2 : 1)} s`;
}

export function rate(value) {
  const n = number(value);
  if (n === null) return NO_DATA;
  if (n === 0) return "0";
  if (n < 10) return n.toFixed(1);
  return n < 10000 ? grouped(n, 0) : `${grouped(n / 1000, 1)}k`;
}

export function count(value) {
  const n = number(value);
  return n === null ? NO_DATA : grouped(n, 0);
}

export function usd(value) {
  const n = number(value);
  if (n === null) return NO_DATA;
  if (n === 0) return "$0";
  return `$${grouped(n, n >= 1 ? 2 : n >= 0.01 ? 3 : 4)}`;
}

export function percent(ratio) {
  const n = number(ratio);
  if (n === null) return NO_DATA;
  return n === 0 || n === 1 ? `${n * 100} %` : `${(n * 100).toFixed(1)} %`;
}

// The width of a bar: nothing measured is an empty bar.
export function share(ratio) {
  const n = number(ratio) ?? 0;
  return `${(Math.min(Math.max(n, 0), 1) * 100).toFixed(1)}%`;
}

export function age(seconds) {
  const n = number(seconds);
  if (n === null) return NO_DATA;
  for (const [unit, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (n >= unit) return `${(n / unit).toFixed(0)} ${name}`;
  }
  return `${Math.max(n, 0).toFixed(0)} s`;
}

// The word behind a live path such as `classes.interactive.ttft_ms_p99`: a list of objects is
// entered by name or worker_id. Anything missing is null.
export function pick(frame, path) {
  let value = frame;
  for (const part of path.split("/")) {
    if (value === null || value === undefined) return null;
    value = Array.isArray(value)
      ? value.find((item) => (item.worker_id ?? item.name) === part)
      : value[part];
  }
  return value ?? null;
}

// Colour class and word of a status, as units.STATUS_WORDS.
export const STATUS = {
  ok: ["ok", "ok"], missed: ["missed", "missed"], no_data: ["none", "no data"],
  live: ["ok", "live"], suspect: ["warn", "suspect"], loading: ["drain", "loading"], draining: ["drain", "draining"],
  drained: ["drain", "drained"], lost: ["missed", "lost"],
};
