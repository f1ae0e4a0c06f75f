// Tests a tenant's key where it will be used: the browser itself asks /v1/models with it.
import * as format from "./format.js";

const form = document.getElementById("key-test");
const said = document.getElementById("key-test-said");

function say(word, text) {
  said.className = `status is-${word}`;
  said.textContent = text;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = new FormData(form).get("key").trim();
  say("none", "Asking …");
  const began = performance.now();
  try {
    const answer = await fetch("/v1/models", {
      headers: { authorization: `Bearer ${key}` }, credentials: "omit", cache: "no-store",
    });
    const took = format.ms(performance.now() - began);
    const body = await answer.json();
    if (answer.ok) {
      const names = body.data.map((model) => model.id).join(", ") || "no model";
      say("ok", `The key is good: it may name ${names}. Answered in ${took}.`);
    } else {
      say("missed", `Refused with ${answer.status} ${body.error.code}: ${body.error.message}`);
    }
  } catch (error) { // no connection, a header the browser refuses, or an answer that is not JSON
    if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error;
    say("missed", `No answer that can be read: ${error.message}`);
  }
});
