// The page of `pldr serve`. Text of the model, of the server and of the user reaches the page through textContent only.
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

// ---- the server ----------------------------------------------------------------------------------------------------------

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

// ---- one answer ----------------------------------------------------------------------------------------------------------

// A panel with the text of one model as it comes. Tokens that begin at the same character share a span: several of them can be
// the bytes of one character.
class Answer {
  constructor(model, title, request) {
    this.model = model;
    this.title = title;
    this.most = request.max_tokens;
    this.marked = 0;       // groups that have been compared
    this.characters = [];  // by code point, as the server counts
    this.groups = [];      // {start, tokens, span}
    this.tokens = [];      // {name, logprob, top, group}
    this.reason = null;
    this.box = make("section", "card answer busy");
    this.box.setAttribute("aria-label", title);
    this.box.append(make("h2", "", title));
    this.text = make("div", "text");
    this.text.append(make("span", "given", request.prompt));
    this.completion = make("span", "completion");
    this.completion.setAttribute("role", "group");
    this.completion.setAttribute("aria-label", "Completion; arrow keys go from token to token");
    this.text.append(this.completion);
    this.state = make("div", "state", "Waiting …");
    this.box.append(this.text, this.state);
    this.asked = performance.now();
    this.first = null;
    this.last = null;
  }

  take(choice) {
    this.characters.push(...choice.text);
    const found = choice.logprobs;
    if (found) found.tokens.forEach((name, i) => this.add(name, found.token_logprobs[i], found.top_logprobs[i], found.text_offset[i]));
    this.draw(this.groups.length - 1);
    if (choice.finish_reason) this.reason = choice.finish_reason;
    this.last = performance.now();
    this.first ??= this.last;
    this.report();
  }

  add(name, logprob, top, start) {
    let group = this.groups.at(-1);
    if (!group || group.start !== start) {
      group = { start, tokens: [], span: make("span", "tok") };
      group.span.tabIndex = this.groups.length ? -1 : 0;
      this.groups.push(group);
      this.draw(this.groups.length - 2);
      this.completion.append(group.span);
      places.set(group.span, { answer: this, group, index: this.groups.length - 1 });
    }
    group.tokens.push(this.tokens.length);
    this.tokens.push({ name, logprob: logprob ?? -Infinity, top: top || {}, group });  // JSON has no infinity
  }

  // Fill in the text and color of a span, which ends where the next one begins.
  draw(index) {
    const group = this.groups[index];
    if (!group) return;
    const next = this.groups[index + 1];
    const text = this.characters.slice(group.start, next ? next.start : undefined).join("");
    group.span.textContent = text;
    group.span.classList.toggle("breaks", text.startsWith("\n"));
    const likely = group.tokens.reduce((sum, i) => sum + this.tokens[i].logprob, 0);
    group.span.style.setProperty("--doubt", Math.min(0.5, (-likely / DOUBT) * 0.5).toFixed(3));
  }

  report(words) {
    const seconds = (this.last - this.first) / 1000;
    const speed = this.tokens.length > 4 && seconds > 0.02 ? ` · ${((this.tokens.length - 1) / seconds).toFixed(0)} tokens/s` : "";
    const wait = this.first === null ? "" : ` · first after ${(this.first - this.asked).toFixed(0)} ms`;
    this.state.textContent = `${count(this.tokens.length, "token")}${speed}${wait}${words ? " · " + words : ""}`;
  }

  end(words) {
    this.box.classList.remove("busy");
    const group = this.groups.at(-1), ended = Boolean(group) && group.span.textContent === "";  // the end token has no text
    if (ended) {
      group.span.classList.add("end");
      group.span.dataset.name = this.tokens[group.tokens.at(-1)].name;
    }
    const why = this.reason === "stop" ? (ended ? "ended by the model" : "ended before a stop text")
      : this.tokens.length >= this.most ? "ended at max tokens" : "ended at the full context";
    this.report(words ?? why);
  }
}

async function follow(answer, request, signal) {
  try {
    for await (const event of events(await ask("/v1/completions", { ...request, model: answer.model, stream: true, logprobs: TOP }, signal))) {
      for (const choice of event.choices) answer.take(choice);
      mark();
    }
    answer.end();
  } catch (error) {
    answer.end(error.name === "AbortError" ? "stopped by you" : "broken off");
    if (error.name !== "AbortError") throw error;
  }
}

// ---- cached beside live --------------------------------------------------------------------------------------------------

let equal = 0;            // so many first tokens of both answers are the same
let comparable = false;   // whether a difference would be the models'

// Go on comparing, and mark the tokens from the first difference on. While texts still come, only what both have is compared.
function mark() {
  if (answers.length < 2 || !comparable) return;
  const [a, b] = answers.map(answer => answer.tokens), both = Math.min(a.length, b.length);
  while (equal < both && a[equal].name === b[equal].name) equal++;
  if (equal === both && (running || a.length === b.length || !answers.every(answer => answer.reason))) return;
  for (const answer of answers) {
    const from = answer.tokens[equal] && answer.groups.indexOf(answer.tokens[equal].group);
    for (let i = Math.max(from ?? Infinity, answer.marked); i < answer.groups.length; i++) answer.groups[i].span.classList.add("diff");
    answer.marked = answer.groups.length;
  }
}

function compare() {
  const box = $("compared");
  box.hidden = answers.length < 2 || !answers.every(answer => answer.tokens.length);
  if (box.hidden) return;
  box.className = "compared";
  if (!comparable) {
    box.textContent = "Not compared: the cached model's engine draws tokens in its own way, so the same seed gives other texts. Set temperature 0 to compare.";
    return;
  }
  mark();
  const [a, b] = answers.map(answer => answer.tokens);
  let far = 0;
  for (let i = 0; i < equal; i++) far = Math.max(far, Math.abs(Math.exp(a[i].logprob) - Math.exp(b[i].logprob)));
  const whole = equal === a.length && equal === b.length, cut = !answers.every(answer => answer.reason);
  const same = whole || (cut && equal === Math.min(a.length, b.length));
  const close = equal ? `; ${same ? "their probabilities" : "the probabilities before it"} differ by at most ${small(far)}` : "";
  if (whole) box.textContent = `Cached and live agree on all ${count(equal, "token")}${close}.`;
  else if (same) box.textContent = `Cached and live agree on the ${count(equal, "token")} that both gave${close}.`;
  else box.textContent = `Cached and live differ from token ${equal + 1} on${close}.`;
  box.classList.add(same ? "same" : "other");
}

// ---- the form ------------------------------------------------------------------------------------------------------------

function read() {
  const prompt = $("prompt").value;
  if (!prompt) throw [$("prompt"), "Type a prompt first."];
  for (const id of ["max_tokens", "temperature", "top_p", "top_k", "seed"]) {
    const field = $(id);
    if (!field.checkValidity()) throw [field, `${document.querySelector(`label[for=${id}]`).textContent}: ${field.validationMessage}`];
  }
  const request = { prompt };
  for (const id of ["max_tokens", "temperature", "top_p", "top_k"]) if ($(id).value !== "") request[id] = Number($(id).value);
  // One seed for both models: with equal probabilities they then draw equal tokens.
  request.seed = $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number($("seed").value);
  const stop = $("stops").value.split("\n").filter(line => line).map(line => line.replaceAll("\\n", "\n"));
  if (stop.length) request.stop = stop;
  return request;
}

async function generate() {
  if (running || !facts) return;
  problem("");
  let request;
  try {
    request = read();
  } catch (wrong) {
    if (!Array.isArray(wrong)) throw wrong;
    problem(wrong[1]);
    wrong[0].focus();
    return;
  }
  const live = facts.live !== null && $("both").checked;
  equal = 0;
  comparable = facts.same_draws || request.temperature === 0;
  answers = [new Answer(facts.name, facts.constant ? "Completion" : "Cached G_LM", request)];
  if (live) answers.push(new Answer(facts.live, "Live G_LM, deduced from the prompt", request));
  $("answers").classList.toggle("two", live);
  $("answers").replaceChildren(...answers.map(answer => answer.box));
  $("legend").hidden = false;
  $("compared").hidden = true;
  hideTip();
  running = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  status("Generating");
  const stopped = running.signal;
  const done = await Promise.allSettled(answers.map(answer => follow(answer, request, stopped)));
  running = null;
  $("go").disabled = false;
  $("stop").disabled = true;
  const failed = done.filter(one => one.status === "rejected").map(one => one.reason);
  if (failed.length) {
    failure(failed[0]);
    if (!answers.some(answer => answer.tokens.length)) nothing();
  }
  compare();
  status(failed.length ? "Failed" : stopped.aborted ? "Stopped" : `Done, ${answers.map(answer => count(answer.tokens.length, "token")).join(" and ")}. ${$("compared").hidden ? "" : $("compared").textContent}`);
  if (request.temperature > 0 && answers.length) answers[0].state.textContent += ` · seed ${request.seed}`;
  if (facts.drift) refreshDrift();
}

// No text on the page, and where it will be.
function nothing() {
  answers = [];
  $("answers").classList.remove("two");
  $("answers").replaceChildren(make("div", "none", "The continuation appears here."));
  $("legend").hidden = true;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function failure(error) {
  if (!(error instanceof Refused)) console.error(error);
  if (error.status === 401) login();
  problem(error instanceof Refused ? error.message : `The page failed: ${error.message}`);
}

function status(text) { $("status").textContent = text; }

const stop = () => { if (running) running.abort(); };

let counting = 0;  // the newest request of the counter; older answers are dropped
async function countTokens() {
  const mine = ++counting, prompt = $("prompt").value;
  await new Promise(resume => setTimeout(resume, 250));
  if (mine !== counting || !facts) return;
  if (!prompt) { $("count").textContent = `context ${facts.context.toLocaleString("en")} tokens`; return; }
  try {
    const found = await (await ask("/tokenize", { model: facts.name, prompt })).json();
    if (mine !== counting) return;
    const room = facts.context - found.count;
    $("count").textContent = `${count(found.count, "token")}, ${room > 0 ? `room for ${room.toLocaleString("en")}` : "no room left in the context"}`;
  } catch { if (mine === counting) $("count").textContent = ""; }
}

function showCurl() {
  let request;
  try { request = { model: facts.name, ...read() }; } catch (wrong) { $("curl").textContent = Array.isArray(wrong) ? wrong[1] : String(wrong); return; }
  const token = sessionStorage.getItem("token") ? " \\\n  -H 'Authorization: Bearer TOKEN'" : "";
  const body = JSON.stringify(request).replaceAll("'", "'\\''");
  const { top_k = 0, ...plain } = request;
  const python = Object.entries(plain).map(([key, value]) => `\n    ${key}=${JSON.stringify(value)},`).join("");
  $("curl").textContent = `curl ${location.origin}/v1/completions -H 'Content-Type: application/json'${token} \\\n  -d '${body}'\n\n` +
    `from openai import OpenAI\nclient = OpenAI(base_url="${location.origin}/v1", api_key="${token ? "TOKEN" : "none"}")\n` +
    `client.completions.create(${python}\n    extra_body={"top_k": ${top_k}},\n).choices[0].text`;
}

// ---- a token's probability -----------------------------------------------------------------------------------------------

const places = new WeakMap();  // span -> {answer, group, index}

function showTip(span) {
  const place = places.get(span), tip = $("tip");
  if (!place) return;
  tip.replaceChildren();
  for (const i of place.group.tokens) {
    const token = place.answer.tokens[i], line = make("div");
    line.append(make("span", "name", shown(token.name)), " ", make("b", "", percent(token.logprob)), ` · ${token.logprob.toFixed(3)} nats`);
    tip.append(line, best(token));
  }
  const others = answers.filter(answer => answer !== place.answer);
  for (const other of others) {
    const at = place.group.tokens[0], theirs = other.tokens[at];
    if (!theirs || at > equal || !comparable) continue;
    const mine = place.answer.tokens[at];
    const words = theirs.name === mine.name ? percent(theirs.logprob) : `${shown(theirs.name)} ${percent(theirs.logprob)}`;
    tip.append(make("div", "soft", `${other.title.split(",")[0]}: ${words}`));
  }
  tip.hidden = false;
  const at = span.getClientRects()[0] || span.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = at.bottom + 8 + own.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(at.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = Math.max(8, below ? at.bottom + 8 : at.top - own.height - 8) + "px";
  span.setAttribute("aria-describedby", "tip");
}

function best(token) {
  const box = make("div", "best");
  for (const [name, logprob] of Object.entries(token.top).filter(([, logprob]) => logprob !== null).sort((a, b) => b[1] - a[1])) {
    const own = name === token.name ? " own" : "", bar = make("span"), fill = make("i");
    fill.style.width = Math.max(1, 100 * Math.exp(logprob)) + "%";
    bar.append(fill);
    box.append(make("span", "name" + own, shown(name)), bar, make("span", "n" + own, percent(logprob)));
  }
  return box;
}

function hideTip() {
  $("tip").hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
}

// One stop of the tab key for each text; arrows, Home and End move inside.
function move(event) {
  const place = places.get(event.target);
  if (!place) return;
  const { groups } = place.answer, last = groups.length - 1;
  const to = { ArrowRight: place.index + 1, ArrowLeft: place.index - 1, ArrowDown: place.index + 10, ArrowUp: place.index - 10, Home: 0, End: last }[event.key];
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  groups[Math.max(0, Math.min(last, to))].span.focus();
}

function settle(span) {
  const place = places.get(span);
  for (const group of place.answer.groups) group.span.tabIndex = -1;
  span.tabIndex = 0;
  showTip(span);
}

// ---- words ---------------------------------------------------------------------------------------------------------------

const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const shown = name => "\u201c" + name.replaceAll("\n", "\u21b5").replaceAll(" ", "\u2423") + "\u201d";

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 && p < 100 ? ">99.9 %" : p >= 0.1 ? `${p.toFixed(1)} %` : p >= 0.001 ? `${p.toFixed(3)} %` : "<0.001 %";
}

const small = x => x === 0 ? "0" : x.toExponential(0).replace("e-0", "e-").replace("e+0", "");

// ---- the certificate -----------------------------------------------------------------------------------------------------

function about() {
  document.title = `${facts.name} – pldr`;
  $("name").textContent = facts.name;
  $("sizes").textContent = facts.sizes;
  const badge = $("badge");
  badge.textContent = facts.badge.text;
  badge.className = "badge " + facts.badge.kind;
  badge.hidden = false;
  $("caution").textContent = facts.caution || "";
  $("caution").hidden = !facts.caution;
  $("both-label").hidden = facts.live === null;
  const card = make("div", "card"), verdict = make("div", "verdict " + facts.badge.kind);
  card.append(make("h2", "", "Certificate"));
  verdict.append(make("h2", "", facts.verdict), ...facts.statement.map(sentence => make("p", "", sentence)));
  card.append(verdict);
  const tiles = make("div", "tiles");
  for (const tile of facts.tiles) {
    const box = make("div", "tile");
    box.append(make("b", "", tile.value), make("span", "", tile.label));
    tiles.append(box);
  }
  card.append(tiles, links(), maps());
  if (facts.drift) card.append(make("h3", "", "Drift of served prompts"), make("dl", "drift"));
  $("about").replaceChildren(card);
  $("about").hidden = false;
  if (facts.drift) drawDrift(facts.drift);
}

function links() {
  const box = make("div", "links");
  for (const [label, path] of [...(facts.tiles.length ? [["certificate.json", "/certificate"]] : []), ["models", "/v1/models"], ["metrics", "/metrics"]]) {
    const link = make("a", "", label);
    link.href = path;
    link.target = "_blank";
    link.rel = "noopener";
    link.addEventListener("click", event => { if (sessionStorage.getItem("token")) { event.preventDefault(); openWithToken(path); } });
    box.append(link);
  }
  return box;
}

// A link cannot carry the token; a request can.
async function openWithToken(path) {
  try {
    const answer = await ask(path), kind = answer.headers.get("content-type").startsWith("application/json") ? "application/json" : "text/plain";
    const url = URL.createObjectURL(new Blob([await answer.arrayBuffer()], { type: kind }));
    window.open(url, "_blank", "noopener");
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  } catch (error) { failure(error); }
}

function maps() {
  const box = make("div"), grid = make("div", "maps");
  let heads = 0;
  for (const layer of facts.maps) {
    grid.append(make("div", "layer", `Layer ${layer.layer}`));
    for (const head of layer.heads) {
      heads++;
      const figure = make("figure");
      if (head.uri) {
        const image = make("img");
        image.src = head.uri;
        image.alt = `G_LM of layer ${layer.layer}, head ${head.head}`;
        figure.append(image);
      }
      const caption = make("figcaption");
      caption.append(make("span", "", `head ${head.head}`), make("span", "", head.uri ? "±" + head.scale : "not finite"));
      figure.append(caption);
      grid.append(figure);
    }
  }
  if (heads > 24) {
    grid.classList.add("many");
    grid.tabIndex = 0;
    grid.setAttribute("role", "region");
    grid.setAttribute("aria-label", "G_LM of each head");
  }
  const legend = make("div", "legend"), scale = make("span");
  const ramp = make("span", "ramp g");
  ramp.setAttribute("aria-hidden", "true");
  scale.append("negative", ramp, "positive");
  legend.append(scale);
  if (facts.left_out) legend.append(make("span", "", `${count(facts.left_out, "head")} that vary least are omitted`));
  box.append(make("h3", "", facts.constant ? "G_LM of each head" : "The cached G_LM of each head"), grid, legend);
  return box;
}

function drawDrift(rows) {
  const list = document.querySelector("dl.drift");
  list.replaceChildren(...rows.flatMap(row => [make("dt", "", row.label), make("dd", row.bad ? "fail" : "", row.value)]));
}

async function refreshDrift() {
  try { drawDrift(await (await ask("/page/drift")).json()); } catch { /* the next one will do */ }
}

function login() {
  sessionStorage.removeItem("token");
  $("login").hidden = false;
  $("token").focus();
}

async function begin() {
  try {
    facts = await (await ask("/page/facts")).json();
  } catch (error) {
    $("sizes").textContent = error.status === 401 ? "A token is needed." : "";
    if (error.status === 401 && !sessionStorage.getItem("token")) login();
    else failure(error);
    return;
  }
  problem("");
  $("login").hidden = true;
  about();
  nothing();
  for (const id of ["form", "answers", "elsewhere"]) $(id).hidden = false;
  $("prompt").focus();
  countTokens();
}

$("form").addEventListener("submit", event => { event.preventDefault(); generate(); });
$("stop").addEventListener("click", stop);
$("login").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("token").value = "";
  begin();
});
$("prompt").addEventListener("input", countTokens);
$("tint").addEventListener("change", () => $("answers").classList.toggle("plain", !$("tint").checked));
$("elsewhere").addEventListener("toggle", () => { if ($("elsewhere").open && facts) showCurl(); });
$("form").addEventListener("input", () => { if ($("elsewhere").open && facts) showCurl(); });
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
  else if (event.key === "Escape") { if (!$("tip").hidden) hideTip(); stop(); }
  else move(event);
});
$("answers").addEventListener("mouseover", event => { if (places.has(event.target)) showTip(event.target); });
$("answers").addEventListener("mouseout", event => { if (places.has(event.target)) hideTip(); });
$("answers").addEventListener("focusin", event => { if (places.has(event.target)) settle(event.target); });
$("answers").addEventListener("focusout", hideTip);
addEventListener("scroll", hideTip, { passive: true });
begin();
