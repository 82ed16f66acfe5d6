// Circuits: columns of cards, one a site, and the edges between them with their kernels.
"use strict";

(() => {
  const { el, number } = atlas;
  const parts = atlas.data("circuits");
  const CELL = 7;
  const svg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const percent = (value) => (value == null ? "–" : `${(100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0)} %`);

  function kernelPicture(kernel) {
    const most = Math.max(...kernel.values.map(Math.abs), 1e-12);
    const cell = Math.max(3, Math.min(CELL, Math.floor(36 / Math.max(kernel.w, kernel.h))));
    const tall = kernel.h === 1 && kernel.w > 1 ? 3 * cell : cell;  // a sequence is a strip
    const picture = el("canvas", { class: "kernel", width: kernel.w * cell, height: kernel.h * tall });
    const context = picture.getContext("2d");
    kernel.values.forEach((value, k) => {
      const strength = Math.abs(value) / most;
      context.fillStyle = atlas.color("--raised");
      context.fillRect((k % kernel.w) * cell, Math.floor(k / kernel.w) * tall, cell, tall);
      context.globalAlpha = strength;
      context.fillStyle = atlas.color(value < 0 ? "--branch-2" : "--branch-1");
      context.fillRect((k % kernel.w) * cell, Math.floor(k / kernel.w) * tall, cell, tall);
      context.globalAlpha = 1;
    });
    return picture;
  }

  function describe(edge, fdr) {
    const effect = edge.effect == null ? "not measured" : `${number(edge.effect)} [${number(edge.effect_low)}, ${number(edge.effect_high)}]`;
    return `${edge.branch}: weight ${number(edge.weight)}, contribution ${number(edge.contribution)}, attribution ${number(edge.attribution ?? NaN)}\n`
      + `pre-activation lost when ablated: ${effect}\nq ${number(edge.q_value)}${edge.q_value <= fdr ? "" : ": not significant"}`;
  }

  function card(part, d, layer, fact) {
    const title = `${part.sites[layer]}/${fact.latent}`;
    const head = d ? el("a", { href: cards.link(d, fact.latent) }, title) : el("b", {}, title);
    const body = el("div", { class: "body" });
    const name = `${parts.indexOf(part)}/${layer}/${fact.latent}`;
    if (part.pictures.includes(name)) body.append(cards.painted("circuits", name, 112));
    if (d) body.append(cards.exampleList(d, fact.latent, d.kind === "image" ? 6 : 2, 52, true));
    const share = layer && fact.explained_by_paths != null
      ? el("p", { class: "caption", title: `by all sources kept: ${percent(fact.explained_by_kept)}; ${number(fact.places)} positions on held-out samples` },
        `${percent(fact.explained_by_paths)} of its pre-activation by the edges shown`) : null;
    return el("article", { class: "unit", "data-layer": layer, "data-latent": fact.latent }, el("header", {}, head), body, share);
  }

  // Lines from the right edge of a card to the left edge of another, a picture in the middle.
  function wire(figure, part, drawing) {
    figure.querySelectorAll("svg, .edge").forEach((old) => old.remove());
    const box = figure.getBoundingClientRect();
    const lines = svg("svg", { width: box.width, height: figure.scrollHeight, "aria-hidden": "true" });
    const unit = (layer, latent) => figure.querySelector(`.unit[data-layer="${layer}"][data-latent="${latent}"]`).getBoundingClientRect();
    const pairs = new Map();
    for (const edge of drawing.edges) {
      const key = `${edge.pair}/${edge.a}/${edge.b}`;
      if (!pairs.has(key)) pairs.set(key, []);
      pairs.get(key).push(edge);
    }
    const into = new Map();
    for (const edges of pairs.values()) {
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
      const rank = into.get(`${pair}/${b}`) ?? 0;
      into.set(`${pair}/${b}`, rank + 1);
      const t = 0.36, s = 1 - t;
      const x = s * s * s * x0 + 3 * s * s * t * (x0 + bend) + 3 * s * t * t * (x1 - bend) + t * t * t * x1;
      const y = s * s * s * y0 + 3 * s * s * t * y0 + 3 * s * t * t * y1 + t * t * t * y1;
      const label = el("div", { class: "edge", style: `left:${x}px;top:${y}px` });
      for (const edge of edges.slice(0, 2)) {
        label.append(el("span", { title: describe(edge, part.fdr) }, kernelPicture(edge.kernel), el("small", {}, edge.branch)));
      }
      label.append(el("small", { class: "n", title: "share of all contributions to the later feature, counted without signs" }, percent(share)));
      figure.append(label);
    }
    figure.prepend(lines);
    figure.dataset.drawn = "yes";
  }

  async function draw(place, part, drawing, dictionaries) {
    const figure = el("div", { class: "circuit", style: `--columns:${drawing.columns.length}` });
    drawing.columns.forEach((column, layer) =>
      figure.append(el("div", { class: "layer" }, ...column.map((fact) => card(part, dictionaries[layer], layer, fact)))));
    place.append(figure);
    const again = () => wire(figure, part, drawing);
    requestAnimationFrame(again);
    new ResizeObserver(again).observe(figure);
    document.addEventListener("theme", again);
  }

  document.querySelectorAll("section.circuits").forEach(async (section) => {
    const part = parts[Number(section.dataset.run)];
    const place = section.querySelector(".drawings");
    if (!place) return;
    const dictionaries = await Promise.all(part.runs.map((run) => (run && atlas.features ? atlas.features.ofRun(run) : null)));
    part.drawings.forEach((drawing) => {
      const last = part.names.length - 1;
      const strongest = drawing.paths[0];
      const holder = el("figure", {}, el("h4", {}, `${part.sites[last]}/${drawing.target}`,
        el("small", {}, ` strongest path ${percent(strongest.strength)}${strongest.significant ? "" : ", not significant"}`)));
      place.append(holder);
      atlas.whenSeen(holder, () => draw(holder, part, drawing, dictionaries), "400px");
    });
    place.append(el("p", { class: "caption" }, "A column is a site; the crops are the strongest of each feature, the framed picture was made from noise to excite it. Each line is a pair of features, as thick as its share of all contributions to the later one (counted without signs); orange excites, blue inhibits, dashed is not significant. On it are the kernels of the two branches that carry most: each cell is a position of the earlier feature (in a text, a token before or after; the outermost cells stand for all that lie farther). Hover for the numbers."));
  });
})();
