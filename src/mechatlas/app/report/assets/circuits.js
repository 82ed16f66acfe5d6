// Circuits: columns of cards, one a site, and the edges between them with their kernels.
"use strict";

(() => {
  const { el, svg, number, percent } = atlas;
  const parts = atlas.data("circuits");
  const narrow = matchMedia("(max-width: 760px)");

  function evidence(edge, fdr) {
    const lost = edge.effect == null ? "not measured" : `${number(edge.effect)} [${number(edge.effect_low)}, ${number(edge.effect_high)}]`;
    return `${edge.q_value <= fdr ? "Significant" : "Not significant"}: q ${number(edge.q_value)} at a false discovery rate of ${percent(fdr)}. `
      + `Weight ${number(edge.weight)}, contribution ${number(edge.contribution)}, attribution ${number(edge.attribution)}; pre-activation lost when ablated ${lost}.`;
  }

  function card(part, d, layer, fact) {
    const title = `${part.sites[layer]}/${fact.latent}`;
    const head = d ? el("a", { href: cards.link(d, fact.latent) }, title) : el("b", {}, title);
    const body = el("div", { class: "body" });
    const name = `${parts.indexOf(part)}/${layer}/${fact.latent}`;
    if (part.pictures.includes(name)) body.append(cards.painted("circuits", name, 112));
    if (d) body.append(cards.exampleList(d, fact.latent, d.kind === "image" ? 6 : 2, 80, true));
    const share = layer && fact.explained_by_paths != null
      ? el("p", { class: "caption" },
        `The edges shown account for ${percent(fact.explained_by_paths)} of its mean pre-activation, all edges kept ${percent(fact.explained_by_kept)} (${number(fact.places)} positions of held-out samples; signs count).`) : null;
    return el("article", { class: "unit", "data-layer": layer, "data-latent": fact.latent }, el("header", {}, head), body, share);
  }

  function pairsOf(drawing) {
    const pairs = new Map();
    for (const edge of drawing.edges) {
      const key = `${edge.pair}/${edge.a}/${edge.b}`;
      if (!pairs.has(key)) pairs.set(key, []);
      pairs.get(key).push(edge);
    }
    return [...pairs.values()];
  }

  // What an edge says, with its evidence; opened by a click on its kernels.
  function details(part, edges) {
    const { pair, a, b } = edges[0];
    return el("div", { class: "claim", "data-claim": true },
      el("div", { class: "says" }, `${part.sites[pair]}/${a} → ${part.sites[pair + 1]}/${b}: ${percent(edges[0].share)} of all contributions`),
      ...edges.map((edge) => el("p", { class: "evidence", "data-evidence": true }, cards.kernel(edge.kernel, 72), el("span", {}, `${edge.branch}. ${evidence(edge, part.fdr)}`))));
  }

  // Lines from the right edge of a card to the left edge of another, kernels in the middle.
  function wire(figure, part, drawing, open) {
    figure.querySelectorAll("svg, .edge").forEach((old) => old.remove());
    const box = figure.getBoundingClientRect();
    const lines = svg("svg", { width: box.width, height: figure.scrollHeight, "aria-hidden": "true" });
    const unit = (layer, latent) => figure.querySelector(`.unit[data-layer="${layer}"][data-latent="${latent}"]`).getBoundingClientRect();
    for (const edges of pairsOf(drawing)) {
      const { pair, a, b, share } = edges[0];
      const from = unit(pair, a), to = unit(pair + 1, b);
      const [x0, y0] = [from.right - box.left, from.top + from.height / 2 - box.top];
      const [x1, y1] = [to.left - box.left, to.top + to.height / 2 - box.top];
      const bend = (x1 - x0) / 2;
      const significant = edges[0].q_value <= part.fdr;  // the one that carries most
      lines.append(svg("path", {
        d: `M${x0},${y0} C${x0 + bend},${y0} ${x1 - bend},${y1} ${x1},${y1}`,
        class: share < 0 ? "minus" : "plus",
        "stroke-width": Math.max(1, Math.min(9, 28 * Math.abs(share))),
        "stroke-dasharray": significant ? "none" : "3 4",
      }));
      const t = 0.4, s = 1 - t;
      const x = s * s * s * x0 + 3 * s * s * t * (x0 + bend) + 3 * s * t * t * (x1 - bend) + t * t * t * x1;
      const y = s * s * s * y0 + 3 * s * s * t * y0 + 3 * s * t * t * y1 + t * t * t * y1;
      const label = el("button", { type: "button", class: "edge", style: `left:${x}px;top:${y}px`, onclick: () => open(edges),
        title: `numbers of the edge from ${a} to ${b}` });
      for (const edge of edges.slice(0, 2)) label.append(el("span", {}, cards.kernel(edge.kernel, 40), el("small", {}, edge.branch)));
      label.append(el("small", { class: "n" }, percent(share)));
      figure.append(label);
    }
    figure.prepend(lines);
    figure.dataset.drawn = "yes";
  }

  async function draw(place, part, drawing, dictionaries) {
    const shown = el("div", { class: "details" });
    const open = (edges) => shown.replaceChildren(details(part, edges));
    if (narrow.matches) {  // no room for columns: a list
      for (const [layer, column] of drawing.columns.entries()) for (const fact of column) place.append(card(part, dictionaries[layer], layer, fact));
      place.append(...pairsOf(drawing).map((edges) => details(part, edges)));
      place.dataset.ready = "yes";
      return;
    }
    const figure = el("div", { class: "circuit", style: `--columns:${drawing.columns.length}` });
    drawing.columns.forEach((column, layer) =>
      figure.append(el("div", { class: "layer" }, ...column.map((fact) => card(part, dictionaries[layer], layer, fact)))));
    place.append(figure, shown);
    const again = () => wire(figure, part, drawing, open);
    requestAnimationFrame(again);
    new ResizeObserver(again).observe(figure);
    document.addEventListener("theme", again);
    open(pairsOf(drawing)[0]);
    place.dataset.ready = "yes";
  }

  document.querySelectorAll("section.circuits").forEach(async (section) => {
    const part = parts[Number(section.dataset.run)];
    const place = section.querySelector(".drawings");
    if (!place) return;
    for (const drawing of part.drawings) {
      const last = part.names.length - 1, strongest = drawing.paths[0];
      const tallest = Math.max(...drawing.columns.map((column) => column.length));
      const holder = el("figure", { style: `min-height:${160 * tallest + 120}px` }, el("h4", {}, `${part.sites[last]}/${drawing.target}`,
        el("small", {}, ` strongest path ${percent(strongest.strength)}${strongest.significant ? "" : ", not significant"}`)));
      place.append(holder);
      atlas.whenSeen(holder, () => atlas.rest(async () => {
        const dictionaries = await Promise.all(part.runs.map((run) => (run && atlas.features ? atlas.features.ofRun(run) : null)));
        await draw(holder, part, drawing, dictionaries);
      }), "400px");
    }
    const painted = part.pictures.length ? " The framed picture was optimized from noise to excite the feature." : "";
    place.append(el("p", { class: "caption" }, `A column is a site; the crops are the strongest examples of each feature.${painted} Each line is a pair of features; its thickness is the pair’s share of all contributions to the later feature (absolute values). Orange excites, blue inhibits, dashed is not significant. On the line are the kernels of the two branches that carry most: each cell is a position of the earlier feature (in a text, a token before or after; the outermost cells include everything farther away). Click or tap a kernel for its numbers.`));
  });
})();
