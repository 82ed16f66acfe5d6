// Drawing one feature: its examples, histogram, branches and neighbors.
"use strict";

const cards = (() => {
  const { el, svg, number, percent } = atlas;

  // A light in the dark: what is not active is dimmed, what is active shows through an amber tint.
  function heatColor(v) {
    const t = v / 255, dark = 0.5 * (1 - t), tint = 0.34 * Math.sqrt(t), sum = dark + tint || 1;
    return [255 * tint / sum, 178 * tint / sum, 0, 255 * sum].map(Math.round);
  }
  const ramp = Array.from({ length: 256 }, (_, v) => heatColor(v));

  // One pixel a position, and one more around: pixels beyond the outermost positions exist too.
  function heatCanvas(d, heat) {
    const [h, w] = d.heat_shape;
    const canvas = document.createElement("canvas");
    canvas.width = w + 2;
    canvas.height = h + 2;
    const pixels = new ImageData(w + 2, h + 2);
    for (let y = 0; y < h + 2; y++) {
      const line = Math.min(Math.max(y - 1, 0), h - 1) * w;
      for (let x = 0; x < w + 2; x++) {
        pixels.data.set(ramp[heat[line + Math.min(Math.max(x - 1, 0), w - 1)]], 4 * (y * (w + 2) + x));
      }
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  }

  async function drawCrop(canvas, d, row, rank, showHeat) {
    const { place, first, corner } = row, at = 2 * rank, slot = row.slot[rank];
    const { tile, side, columns } = d.gallery;
    const per = columns * columns, sheet = await d.sheet(Math.floor(slot / per));
    await new Promise((done) => { atlas.soon(done); });
    const scale = tile / side, crop = d.crop.side;
    const [top, left] = [corner[at], corner[at + 1]];
    const x = ((slot % per) % columns) * tile + left * scale;
    const y = Math.floor((slot % per) / columns) * tile + top * scale;
    const size = canvas.width, unit = size / crop;
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(sheet, x, y, crop * scale, crop * scale, 0, 0, size, size);
    if (showHeat) {
      const [h, w] = d.heat_shape, cell = d.crop.cell;
      const hx = (d.crop.origin + cell * first[at + 1] - left) * unit;
      const hy = (d.crop.origin + cell * first[at] - top) * unit;
      context.drawImage(heatCanvas(d, row.heat.subarray(rank * h * w)), hx - cell * unit, hy - cell * unit, (w + 2) * cell * unit, (h + 2) * cell * unit);
      if (size > 100 && place[at] >= 0) mark(context, hx, hy, cell * unit, place[at + 1] - first[at + 1], place[at] - first[at]);
    }
    canvas.dataset.drawn = "yes";
  }

  // A frame around the position itself.
  function mark(context, x, y, cell, column, row) {
    context.lineWidth = 1.25;
    for (const [grow, style] of [[1.2, "rgba(0,0,0,.55)"], [0, "rgba(255,255,255,.95)"]]) {
      context.strokeStyle = style;
      context.strokeRect(x + cell * column - grow, y + cell * row - grow, cell + 2 * grow, cell + 2 * grow);
    }
  }

  // Where the position is: in an image its row and column, or a token that is no patch.
  function placed(d, [y, x]) {
    if (y < 0) return y === -1 ? "the class token (token 0)" : `token ${-1 - y}, no patch`;
    if (d.kind === "text") return `token ${y}`;
    return d.apart ? `patch row ${y}, column ${x}` : `y ${y}, x ${x}`;
  }

  function crop(d, i, rank, css) {
    const row = d.row(i), peak = row.place.subarray(2 * rank);
    const pixels = Math.round(css * Math.min(window.devicePixelRatio || 1, 2));
    const title = `${d.names[row.slot[rank]]}\nactivation ${number(row.value[rank])} at ${placed(d, peak)}`;
    const canvas = el("canvas", { width: pixels, height: pixels, title, role: "img", "aria-label": `feature ${i}: ${title}` });
    if (!d.apart) return [canvas, canvas];
    const tokens = Array.from({ length: d.apart }, (_, k) => row.apart[rank * d.apart + k]);
    const strip = el("span", { class: "apart" }, ...tokens.map((heat, k) =>
      el("i", { style: `--heat:${(heat / 255).toFixed(2)}`, class: peak[0] === -1 - k ? "peak" : null,
        title: `${k ? `token ${k}` : "class token"}: ${number((heat / 255) * row.scale[0])}` }, k ? String(k) : "class")));
    return [el("span", { class: "crop" }, canvas, strip), canvas];
  }

  // ---- texts ---------------------------------------------------------------------------

  // First and last token of the words around a token of a sample.
  function wordAround(d, slot, token) {
    const row = slot * d.length, { opens, closes } = d.vocabulary, far = 12;
    const starts = (t) => opens[d.tokens[row + t]] || closes[d.tokens[row + t - 1]];
    let first = token, last = token;
    while (first > Math.max(0, token - far) && !starts(first)) first--;
    while (last + 1 < Math.min(d.length, token + far) && !starts(last + 1)) last++;
    return [first, last];
  }

  // Tokens that begin a word, and tokens after which one begins.
  const vocabulary = (words) => ({
    opens: Uint8Array.from(words, (w) => /^[\s▁Ġ]|^[^\p{L}\p{N}#']/u.test(w)),
    closes: Uint8Array.from(words, (w) => /[^\p{L}\p{N}#'-]$/u.test(w)),
  });

  const spelled = (d, slot, first, last) =>
    Array.from(d.tokens.subarray(slot * d.length + first, slot * d.length + last + 1), (t) => d.words[t]).join("");

  // The word where a feature of texts is strongest.
  function peakWord(d, i) {
    const row = d.row(i), slot = row ? row.slot[0] : -1;
    return d.kind !== "text" || slot < 0 ? "" : spelled(d, slot, ...wordAround(d, slot, row.place[0])).trim();
  }

  function textExample(d, i, rank, showHeat, whole) {
    const row = d.row(i), slot = row.slot[rank], n = d.heat_shape[0], begin = row.first[2 * rank];
    const peak = row.place[2 * rank], end = Math.min(begin + n, d.length) - 1;
    const first = whole ? begin : Math.max(begin, wordAround(d, slot, Math.max(begin, peak - 9))[0]);
    const last = whole ? end : Math.min(end, wordAround(d, slot, Math.min(end, peak + 5))[1]);
    const name = d.names[slot];
    const line = el("p", { class: "tokens", title: `${name}\nactivation ${number(row.value[rank])}; click for the ${whole ? "excerpt" : "whole context"}` });
    if (first > 0 && !whole) line.append("… ");
    for (let t = first; t <= last; t++) {
      const heat = row.heat[rank * n + t - begin];
      const written = d.words[d.tokens[slot * d.length + t]].replaceAll("\n", "↵");
      const text = whole ? written : written.replace(/ {3,}/g, "  "), word = text.trimStart() || text;
      if (word !== text) line.append(text.slice(0, -word.length));  // a line may end there
      const token = el("span", { class: t === peak ? "peak" : null, title: heat ? `${number((heat / 255) * row.scale[0])} in ${name}` : null }, word);
      if (showHeat && heat) token.style.setProperty("--heat", (heat / 255).toFixed(3));
      line.append(token);
    }
    if (last < d.length - 1 && !whole) line.append(" …");
    line.addEventListener("click", (event) => {
      if (!line.closest("dialog")) return;
      event.stopPropagation();
      line.replaceWith(textExample(d, i, rank, showHeat, !whole));
    });
    return line;
  }

  function plainExample(d, i, rank) {
    const row = d.row(i);
    return el("li", {}, d.names[row.slot[rank]], el("span", { class: "n" }, ` ${number(row.value[rank])}`));
  }

  // Ranks of the examples that are there: the strongest, or those at quantiles.
  function ranksOf(d, i, which = "strongest") {
    const [begin, end] = which === "strongest" ? [0, d.top] : [d.top, d.shown];
    const ranks = [], { slot } = d.row(i);
    for (let rank = begin; rank < end && slot[rank] >= 0; rank++) ranks.push(rank);
    return ranks;
  }

  function exampleList(d, i, count, css, showHeat, which = "strongest") {
    if (!d.row(i)) {  // its row of a served page is on the way
      const place = el("p", { class: "empty" }, "…");
      d.need([i]).then(() => place.replaceWith(exampleList(d, i, count, css, showHeat, which)));
      return place;
    }
    const ranks = ranksOf(d, i, which).slice(0, count);
    if (!ranks.length) return el("p", { class: "empty" }, "not active in the rows read");
    if (d.kind === "image") {
      const list = el("div", { class: "crops" });
      for (const rank of ranks) {
        const [element, canvas] = crop(d, i, rank, css);
        list.append(element);
        drawCrop(canvas, d, d.row(i), rank, showHeat);
      }
      return list;
    }
    if (d.kind === "text") {
      return el("div", { class: "texts" }, ...ranks.map((rank) => textExample(d, i, rank, showHeat, false)));
    }
    return el("ol", { class: "plain" }, ...ranks.map((rank) => plainExample(d, i, rank)));
  }

  // One bar a branch: the share of the atom's length it writes; the tick is what width predicts.
  function branchBars(d, i, named) {
    const n = d.branches.length;
    if (!n) return null;
    const bars = el("div", { class: named ? "shares named" : "shares" });
    d.branches.forEach((name, b) => {
      const share = d.shares[i * n + b];
      const bar = el("span", { class: "share", title: `${name}: share ${number(share)}, its width predicts ${number(d.expected[b])}` },
        el("span", { class: `fill ${atlas.swatch(b)}`, style: `width:${(100 * share).toFixed(1)}%` }),
        el("span", { class: "tick", style: `left:${(100 * d.expected[b]).toFixed(1)}%` }));
      if (named) bars.append(el("span", { class: "label" }, name), bar, el("span", { class: "n" }, share.toFixed(2)));
      else bars.append(bar);
    });
    return bars;
  }

  function histogram(d, i) {
    const { histogram: counts, upper: [end] } = d.row(i);
    const most = Math.max(1, ...counts), width = 240, height = 84, step = width / d.bins;
    const upper = (b) => end * Math.pow(2, (b + 1 - d.bins) / d.perOctave);
    const picture = svg("svg", { viewBox: `0 -4 ${width} ${height + 20}`, class: "histogram", role: "img", "aria-label": "Histogram of activations" });
    counts.forEach((count, b) => {
      const tall = height * Math.sqrt(count / most);
      const low = b ? number(upper(b - 1)) : "0";
      picture.append(svg("rect", { x: b * step + 0.75, y: height - tall, width: step - 1.5, height: tall, rx: 1 },
        svg("title", {}, document.createTextNode(`${low} to ${number(upper(b))}: ${number(count)} rows`))));
    });
    picture.append(svg("line", { x1: 0, x2: width, y1: height, y2: height }));
    for (const b of [0, d.bins / 3, (2 * d.bins) / 3, d.bins]) {
      const anchor = b === 0 ? "start" : b === d.bins ? "end" : "middle";
      picture.append(svg("text", { x: b * step, y: height + 13, "text-anchor": anchor }, document.createTextNode(number(upper(b - 1)))));
    }
    return picture;
  }

  function facts(d, i) {
    const pairs = [["active in", `${percent(d.density[i])} of rows`], ["largest", number(d.max[i])], ["mean where active", number(d.mean[i])]];
    return el("dl", { class: "facts" }, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  function card(d, i, showHeat, open) {
    const branch = query.nearestBranch(d, i), name = labels.of(d, i).name;
    const element = el("article", { class: "card", "data-feature": i },
      el("header", {}, el("a", { href: link(d, i), "aria-label": `feature ${i}${name ? `, ${name}` : ""}` }, String(i)),
        name ? el("span", { class: "name" }, name) : null,
        el("span", { class: "brief" }, d.density[i] > 0 ? `active ${percent(d.density[i])} · max ${number(d.max[i])}` : "not active"),
        branch >= 0 && d.density[i] > 0 ? el("span", { class: "lean" }, el("i", { class: `dot ${atlas.swatch(branch)}` }), d.branches[branch]) : null));
    element.addEventListener("click", (event) => { event.preventDefault(); open(i); });
    const body = el("div", { class: "body" });
    element.append(body);
    const bars = branchBars(d, i, false);
    if (bars) element.append(bars);
    const fill = () => {
      body.replaceChildren(exampleList(d, i, d.kind === "image" ? 8 : 4, 72, showHeat));
      if (d.painted.includes(String(i))) body.prepend(painted("features", `painted${d.index}/${i}`, 156));
    };
    return [element, atlas.whenSeen(element, fill, "200px")];
  }

  const link = (d, i) => `#${encodeURIComponent(d.key).replaceAll("%2F", "/")}/${i}`;

  // A feature of any dictionary of the page, by run: its link and, where asked for, examples.
  async function mention(run, latent, name, count = 0, css = 44) {
    const d = run && atlas.features ? await atlas.features.ofRun(run) : null;
    const text = name ? `${name}/${latent}` : String(latent);
    const head = d ? el("a", { href: link(d, latent) }, text, labels.of(d, latent).name ? ` ${labels.of(d, latent).name}` : "") : el("b", {}, text);
    return el("span", { class: `mention ${d?.kind ?? ""}` }, head, d && count ? exampleList(d, latent, count, css, true) : null);
  }

  // What excites a feature most of all that can be painted.
  function painted(chapter, name, pixels) {
    const title = "activation maximization for this feature: a picture, not a claim";
    const canvas = el("canvas", { class: "painted", width: pixels, height: pixels, role: "img", title, "aria-label": title });
    paint(canvas, chapter, name);
    return canvas;
  }

  async function paint(canvas, chapter, name) {
    const bitmap = await atlas.image(chapter, name), context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  }

  // Kernel of an edge: each cell is a position of the earlier feature.
  function kernel(numbers, side) {
    const most = Math.max(...numbers.values.map(Math.abs), 1e-12);
    const cell = Math.max(3, Math.floor(side / Math.max(numbers.w, numbers.h)));
    const tall = numbers.h === 1 && numbers.w > 1 ? Math.max(cell, 16) : cell;  // a sequence is a strip
    const title = `kernel ${numbers.h} × ${numbers.w}, largest ${number(most)}`;
    const picture = el("canvas", { class: "kernel", width: numbers.w * cell, height: numbers.h * tall, role: "img", title, "aria-label": title });
    const context = picture.getContext("2d");
    numbers.values.forEach((value, k) => {
      const box = [(k % numbers.w) * cell, Math.floor(k / numbers.w) * tall, cell, tall];
      context.globalAlpha = 1;
      context.fillStyle = atlas.color("--raised");
      context.fillRect(...box);
      context.globalAlpha = Math.abs(value) / most;
      context.fillStyle = atlas.color(value < 0 ? "--branch-2" : "--branch-1");
      context.fillRect(...box);
    });
    return picture;
  }

  return { card, exampleList, ranksOf, branchBars, histogram, facts, link, mention, painted, paint, kernel, wordAround, spelled, peakWord, vocabulary, drawCrop };
})();
