// The certificate beside the text.
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
