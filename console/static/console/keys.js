// Keyboard, copy buttons and the help dialog of every console page. No dependency on live data.
const GO = { o: "overview", r: "requests", h: "history", w: "workers", s: "split", q: "queues", t: "routing", p: "playground", b: "batches" };
const GO_MS = 1200; // how long `g` waits for its second key
let goUntil = 0;

function isTyping(target) {
  return target.closest("input, textarea, select, [contenteditable]") !== null;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
  const key = event.key;
  if (performance.now() < goUntil && GO[key]) {
    goUntil = 0;
    document.querySelector(`.sw-nav a[data-go="${GO[key]}"]`)?.click();
    return;
  }
  goUntil = key === "g" ? performance.now() + GO_MS : 0;
  if (key === "/") {
    const field = document.querySelector("[data-filter]");
    if (field) { event.preventDefault(); field.focus(); }
  } else if (key === "?") {
    document.getElementById("help").showModal();
  } else if (key === "p") {
    document.dispatchEvent(new CustomEvent("sw:key-pause"));
  }
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) {
    const text = document.getElementById(button.dataset.copy).textContent.trim();
    const said = button.querySelector(".said");
    try {
      await navigator.clipboard.writeText(text);
      said.textContent = "Copied";
    } catch (error) { // no clipboard on plain http of another host: mark the text instead
      if (!(error instanceof DOMException || error instanceof TypeError)) throw error;
      getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
      said.textContent = "Selected";
    }
    setTimeout(() => { said.textContent = "Copy"; }, 1500);
  }
  if (event.target.closest("[data-help]")) document.getElementById("help").showModal();
});

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
});
