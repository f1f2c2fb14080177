// The page of `pldr serve`: what its parts share, and how it asks the server. The parts are one script, in the order of page.py.
// Text of the model, of the server and of the user reaches the page through textContent only.
"use strict";
const TOP = 5;            // best tokens that are named at each place
const DOUBT = 9;          // nats at which a token has its full color
const $ = id => document.getElementById(id);
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
let facts = null;         // what /page/facts said
let running = null;       // the AbortController of the answers that are on their way
let answers = [];         // the panels on the page

class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: "Bearer " + token } : {};
}

async function ask(path, body, signal) {
  let answer;
  try {
    const post = body && { method: "POST", headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(body) };
    answer = await fetch(path, { cache: "no-store", signal, ...(post || { headers: headers() }) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(`The server at ${location.origin} does not answer. It may have ended, or the connection is lost; start it again with pldr serve.`, 0);
  }
  if (answer.ok) return answer;
  throw new Refused(await reason(answer), answer.status);
}

async function reason(answer) {
  if (answer.status === 401) return "The server does not accept this token.";
  let said = "";
  try { said = (await answer.json()).error.message; } catch { /* no JSON, or none of ours */ }
  const wait = answer.headers.get("retry-after");
  const again = wait && /^\d+$/.test(wait) ? ` Try again in ${wait} s.` : "";
  const what = { 408: "It took too long", 413: "The request is too large", 429: "The server is busy",
    503: "The server is not ready" }[answer.status] || (answer.status < 500 ? "The server refused this request" : "The server failed");
  return `${what} (${answer.status})${said ? ": " + said : ""}${/[.!?]$/.test(said) ? "" : "."}${again}`;
}

// The events of a stream, each as JSON. Ends at [DONE]; a stream that ends before is an error.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done) throw new Refused("The answer broke off: the server ended, or the connection was lost. The text is not complete.", 0);
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(`The answer broke off: ${event.error.message}`, 0);
      yield event;
    }
  }
}

// Numbers and texts for people.
const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const shown = name => "\u201c" + name.replaceAll("\n", "\u21b5").replaceAll(" ", "\u2423") + "\u201d";

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 && p < 100 ? ">99.9 %" : p >= 0.1 ? `${p.toFixed(1)} %` : p >= 0.001 ? `${p.toFixed(3)} %` : "<0.001 %";
}

const small = x => x === 0 ? "0" : x.toExponential(0).replace("e-0", "e-").replace("e+0", "");
