// A text as it comes: its tokens, their colors, and what is said of it.
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
