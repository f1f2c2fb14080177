// Cached beside live: where they differ.
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
