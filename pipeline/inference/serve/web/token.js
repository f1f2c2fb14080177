// A token's probability: at the mouse, at a touch, and by the keys.
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
