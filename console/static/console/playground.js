// Playground: calls /v1 with a tenant's key, streams the answer and measures it. The session cookie
// is never sent there, and model output reaches the page as textContent only.
import * as format from "./format.js";
import { quantile, split } from "./stream.js";

const GAPS_SHOWN = 60;
const byId = (id) => document.getElementById(id);
const form = byId("play");
const field = (id) => byId(id).value;
let turns = []; // {role, content}
let abort = null;

// --- request ------------------------------------------------------------------------------------
function body(messages) {
  const made = {
    model: field("model"), messages, stream: true, stream_options: { include_usage: true },
    max_tokens: Number(field("max-tokens")) || 128, temperature: Number(field("temperature")) || 0,
    service_tier: field("tier"),
  };
  if (field("seed") !== "") made.seed = Number(field("seed"));
  return made;
}

function messagesWith(prompt) {
  const system = field("system").trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...turns, { role: "user", content: prompt }];
}

function showCurl() {
  const quoted = JSON.stringify(body(messagesWith(field("prompt") || "Hello"))).replaceAll("'", "'\\''");
  byId("curl").textContent = `curl -N ${location.origin}/v1/chat/completions \\\n`
    + "  -H \"Authorization: Bearer $SLACKWATER_KEY\" -H 'Content-Type: application/json' \\\n"
    + `  -d '${quoted}'`;
}

function addTurn(role) {
  byId("turns-empty")?.remove();
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  const text = document.createElement("span");
  const meta = document.createElement("span");
  meta.className = "meta";
  turn.append(text, meta);
  byId("turns").append(turn);
  return { turn, text, meta };
}

function fail(message) {
  byId("play-error").textContent = message;
  byId("play-error").hidden = false;
}

class Meter {
  constructor() {
    this.startedAt = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.gaps = [];
    this.chunks = 0;
    this.tokens = null;
    const chosen = byId("tier").selectedOptions[0];
    this.itlTarget = Number(chosen.dataset.itl) * 1000;
    this.ttftTarget = Number(chosen.dataset.ttft) * 1000;
    byId("m-targets").textContent = `target TTFT ${format.ms(this.ttftTarget)}, ITL ${format.ms(this.itlTarget)}`;
    byId("m-link").hidden = true;
    this.show();
  }

  chunk() {
    const now = performance.now();
    if (this.firstAt === null) this.firstAt = now; else this.gaps.push(now - this.lastAt);
    this.lastAt = now;
    this.chunks += 1;
  }

  get ttft() { return this.firstAt === null ? null : this.firstAt - this.startedAt; }

  show() {
    const put = (id, text) => { byId(id).textContent = text === format.NO_DATA ? "–" : text; };
    const seconds = this.firstAt === null ? 0 : (this.lastAt - this.firstAt) / 1000;
    const tokens = this.tokens ?? this.chunks;
    put("m-ttft", format.ms(this.ttft));
    put("m-itl50", format.ms(quantile(this.gaps, 0.5)));
    put("m-itl99", format.ms(quantile(this.gaps, 0.99)));
    put("m-tokens", this.chunks ? format.count(tokens) : "–");
    put("m-rate", seconds > 0 ? format.rate((tokens - 1) / seconds) : "–");
    byId("m-ttft").classList.toggle("over", this.ttft !== null && this.ttft > this.ttftTarget);
    this.draw();
  }

  draw() {
    const shown = this.gaps.slice(-GAPS_SHOWN);
    const top = Math.max(this.itlTarget * 1.25, ...shown);
    byId("gaps").replaceChildren(...shown.map((gap, index) => {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = Math.max(1, 44 * gap / top);
      for (const [name, value] of [["x", index * 2], ["width", 1.6], ["y", 44 - height], ["height", height]]) {
        bar.setAttribute(name, value);
      }
      if (gap > this.itlTarget) bar.classList.add("over");
      return bar;
    }));
  }
}

async function ask(prompt) {
  const sent = body(messagesWith(prompt));
  addTurn("user").text.textContent = prompt;
  const answer = addTurn("assistant");
  const meter = new Meter();
  abort = new AbortController();
  setBusy(true);
  let finish = "stopped";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", signal: abort.signal, credentials: "omit", cache: "no-store",
      headers: { authorization: `Bearer ${field("key").trim()}`, "content-type": "application/json" },
      body: JSON.stringify(sent),
    });
    link(response.headers.get("x-request-id"));
    if (!response.ok) throw new Error(await refusal(response));
    finish = await consume(response, answer, meter);
    turns.push({ role: "user", content: prompt }, { role: "assistant", content: answer.text.textContent });
  } catch (error) {
    if (error.name !== "AbortError") {
      finish = "failed";
      answer.turn.classList.add("is-error");
      fail(error.message);
    }
  } finally {
    setBusy(false);
    meter.show();
    byId("meter-state").textContent = finish;
    const parts = [finish, `TTFT ${format.ms(meter.ttft)}`, `${meter.tokens ?? meter.chunks} tokens`];
    answer.meta.textContent = parts.join(" · ");
  }
}

async function refusal(response) {
  const text = await response.text();
  try {
    return `${response.status}: ${JSON.parse(text).error.message}`;
  } catch (error) {
    if (!(error instanceof SyntaxError || error instanceof TypeError)) throw error;
    return `${response.status}: ${text.slice(0, 200)}`;
  }
}

async function consume(response, answer, meter) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  let finish = "ended early";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return finish;
    const [events, tail] = split(rest + decoder.decode(value, { stream: true }));
    rest = tail;
    for (const data of events) {
      if (data === "[DONE]") return finish;
      finish = take(JSON.parse(data), answer, meter) ?? finish;
    }
    meter.show();
  }
}

function take(chunk, answer, meter) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) meter.tokens = chunk.usage.completion_tokens;
  if (chunk.service_tier) byId("m-tier").textContent = chunk.service_tier;
  const choice = chunk.choices?.[0];
  if (choice?.delta?.content) {
    meter.chunk();
    const box = byId("turns");
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    answer.text.textContent += choice.delta.content;
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  }
  return choice?.finish_reason ?? null;
}

function link(id) {
  if (!id) return;
  const anchor = byId("m-link");
  anchor.href = `${form.dataset.requestUrl}${encodeURIComponent(id)}/`;
  anchor.hidden = false;
}

function setBusy(isBusy) {
  byId("send").disabled = isBusy;
  byId("stop").disabled = !isBusy;
  if (isBusy) byId("meter-state").textContent = "streaming";
}

// --- page ---------------------------------------------------------------------------------------
function send() {
  const prompt = field("prompt").trim();
  byId("play-error").hidden = true;
  if (!field("key").trim()) return fail("Enter a tenant key, or make one for this session.");
  if (!prompt || abort?.signal.aborted === false && byId("send").disabled) return undefined;
  byId("prompt").value = "";
  return ask(prompt);
}

async function makeKey() {
  const data = new FormData();
  data.set("tenant", field("tenant"));
  const response = await fetch(form.dataset.keyUrl, {
    method: "POST", body: data,
    headers: { "x-csrftoken": form.querySelector("[name=csrfmiddlewaretoken]").value },
  });
  const answer = await response.json();
  if (!response.ok) return fail(answer.error);
  byId("key").value = answer.key;
  byId("make-key").textContent = "Key made";
  return undefined;
}

form.addEventListener("submit", (event) => { event.preventDefault(); send(); });
form.addEventListener("input", showCurl);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); }
});
byId("stop").addEventListener("click", () => abort?.abort());
byId("clear").addEventListener("click", () => { turns = []; byId("turns").replaceChildren(); });
byId("make-key")?.addEventListener("click", makeKey);
showCurl();
