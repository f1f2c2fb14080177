// The prompt and its settings; generating, stopping, and what goes wrong.
const SETTINGS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"];
const NOT_OPENAIS = ["top_k", "min_p", "repetition_penalty"];  // its client takes them in extra_body

function read() {
  const prompt = $("prompt").value;
  if (!prompt) throw [$("prompt"), "Type a prompt first."];
  for (const id of [...SETTINGS, "seed"]) {
    const field = $(id);
    if (!field.checkValidity()) throw [field, `${document.querySelector(`label[for=${id}]`).textContent}: ${field.validationMessage}`];
  }
  const request = { prompt };
  for (const id of SETTINGS) if ($(id).value !== "") request[id] = Number($(id).value);
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
  const extra = Object.fromEntries(Object.entries(request).filter(([key]) => NOT_OPENAIS.includes(key)));
  const python = Object.entries(request).filter(([key]) => !(key in extra)).map(([key, value]) => `\n    ${key}=${JSON.stringify(value)},`).join("") +
    (Object.keys(extra).length ? `\n    extra_body=${JSON.stringify(extra)},` : "");
  $("curl").textContent = `curl ${location.origin}/v1/completions -H 'Content-Type: application/json'${token} \\\n  -d '${body}'\n\n` +
    `from openai import OpenAI\nclient = OpenAI(base_url="${location.origin}/v1", api_key="${token ? "TOKEN" : "none"}")\n` +
    `client.completions.create(${python}\n).choices[0].text`;
}
