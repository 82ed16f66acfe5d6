// Drawing one feature: its examples, histogram, branches and neighbors.
"use strict";

const cards = (() => {
  const { el, number } = atlas;

  // A light in the dark: what is not active is dimmed, what is active shows through an amber tint.
  function heatColor(v) {
    const t = v / 255, dark = 0.4 * (1 - t), tint = 0.56 * Math.sqrt(t), sum = dark + tint;
    return [255 * tint / sum, 178 * tint / sum, 0, 255 * sum].map(Math.round);
  }
  const ramp = Array.from({ length: 256 }, (_, v) => heatColor(v));

  // One pixel a position, and one more around: pixels beyond the outermost positions exist too.
  function heatCanvas(d, at) {
    const [h, w] = d.heat_shape;
    const canvas = document.createElement("canvas");
    canvas.width = w + 2;
    canvas.height = h + 2;
    const pixels = new ImageData(w + 2, h + 2);
    for (let y = 0; y < h + 2; y++) {
      const row = at * h * w + Math.min(Math.max(y - 1, 0), h - 1) * w;
      for (let x = 0; x < w + 2; x++) {
        pixels.data.set(ramp[d.heat[row + Math.min(Math.max(x - 1, 0), w - 1)]], 4 * (y * (w + 2) + x));
      }
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  }

  async function drawCrop(canvas, d, i, rank, showHeat) {
    const at = i * d.top + rank, slot = d.slot[at];
    const { tile, side, columns } = d.gallery;
    const per = columns * columns, sheet = await d.sheet(Math.floor(slot / per));
    const scale = tile / side, crop = d.crop.side;
    const [top, left] = [d.corner[2 * at], d.corner[2 * at + 1]];
    const x = ((slot % per) % columns) * tile + left * scale;
    const y = Math.floor((slot % per) / columns) * tile + top * scale;
    const size = canvas.width, unit = size / crop;
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(sheet, x, y, crop * scale, crop * scale, 0, 0, size, size);
    if (showHeat) {
      const [h, w] = d.heat_shape, cell = d.crop.cell;
      const hx = (d.crop.origin + cell * d.first[2 * at + 1] - left) * unit;
      const hy = (d.crop.origin + cell * d.first[2 * at] - top) * unit;
      context.drawImage(heatCanvas(d, at), hx - cell * unit, hy - cell * unit, (w + 2) * cell * unit, (h + 2) * cell * unit);
      if (size > 100) mark(context, hx, hy, cell * unit, d.place[2 * at + 1] - d.first[2 * at + 1], d.place[2 * at] - d.first[2 * at]);
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

  function crop(d, i, rank, css) {
    const at = i * d.top + rank;
    const name = d.names[d.slot[at]];
    const pixels = Math.round(css * Math.min(window.devicePixelRatio || 1, 2));
    const title = `${name}\nactivation ${number(d.value[at])} at y ${d.place[2 * at]}, x ${d.place[2 * at + 1]}`;
    return el("canvas", { width: pixels, height: pixels, title, role: "img", "aria-label": title });
  }

  function textExample(d, i, rank, showHeat) {
    const at = i * d.top + rank, length = d.heat_shape[0];
    const line = el("p", { class: "tokens", title: `${d.names[d.slot[at]]}\nactivation ${number(d.value[at])}` });
    const peak = d.place[2 * at] - d.first[2 * at];
    for (let t = 0; t < length; t++) {
      const heat = d.heat[at * length + t];
      const token = el("span", { class: t === peak ? "peak" : null }, d.words[d.tokens[at * length + t]].replaceAll("\n", "↵"));
      if (showHeat && heat) token.style.setProperty("--heat", (heat / 255).toFixed(3));
      line.append(token);
    }
    return line;
  }

  function plainExample(d, i, rank) {
    const at = i * d.top + rank;
    return el("li", {}, d.names[d.slot[at]], el("span", { class: "n" }, ` ${number(d.value[at])}`));
  }

  function countExamples(d, i) {
    let n = 0;
    while (n < d.top && d.slot[i * d.top + n] >= 0) n++;
    return n;
  }

  function exampleList(d, i, count, css, showHeat) {
    const there = Math.min(count, countExamples(d, i));
    if (!there) return el("p", { class: "empty" }, "never active in the rows read");
    const ranks = Array.from({ length: there }, (_, rank) => rank);
    if (d.kind === "image") {
      const list = el("div", { class: "crops" });
      for (const rank of ranks) {
        const canvas = crop(d, i, rank, css);
        list.append(canvas);
        drawCrop(canvas, d, i, rank, showHeat);
      }
      return list;
    }
    if (d.kind === "text") {
      return el("div", { class: "texts" }, ...ranks.map((rank) => textExample(d, i, rank, showHeat)));
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
        el("span", { class: `fill c${b % 8}`, style: `width:${(100 * share).toFixed(1)}%` }),
        el("span", { class: "tick", style: `left:${(100 * d.expected[b]).toFixed(1)}%` }));
      if (named) bars.append(el("span", { class: "label" }, name), bar, el("span", { class: "n" }, share.toFixed(2)));
      else bars.append(bar);
    });
    return bars;
  }

  const svg = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  function histogram(d, i) {
    const counts = d.histogram.subarray(i * d.bins, (i + 1) * d.bins);
    const most = Math.max(1, ...counts), width = 240, height = 84, step = width / d.bins;
    const upper = (b) => d.upper[i] * Math.pow(2, (b + 1 - d.bins) / d.perOctave);
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
    const pairs = [["density", number(d.density[i])], ["max", number(d.max[i])], ["mean", number(d.mean[i])]];
    return el("dl", { class: "facts" }, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  function card(d, i, showHeat, open) {
    const branch = query.nearestBranch(d, i);
    const element = el("article", { class: "card", tabindex: 0, "data-feature": i, "aria-label": `feature ${i}` },
      el("header", {}, el("a", { href: link(d, i), tabindex: -1 }, String(i)),
        el("span", { class: "brief" }, d.density[i] > 0 ? `density ${number(d.density[i])} · max ${number(d.max[i])}` : "dead"),
        branch >= 0 && d.density[i] > 0 ? el("span", { class: "lean" }, el("i", { class: `dot c${branch % 8}` }), d.branches[branch]) : null));
    element.addEventListener("click", (event) => { event.preventDefault(); open(i); });
    element.addEventListener("keydown", (event) => { if (event.key === "Enter") open(i); });
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

  function neighborList(d, i, showHeat, open) {
    const list = el("div", { class: "neighbors" });
    for (let k = 0; k < d.near_n; k++) {
      const other = d.near[i * d.near_n + k];
      if (other < 0) break;
      const cosine = d.cosine[i * d.near_n + k];
      const item = el("a", { href: link(d, other), class: cosine > d.chance ? null : "chance" },
        el("b", {}, String(other)), el("span", { class: "n" }, cosine.toFixed(2)));
      item.addEventListener("click", (event) => { event.preventDefault(); open(other); });
      if (d.kind === "image") item.append(exampleList(d, other, 3, 40, showHeat));
      list.append(item);
    }
    return list.children.length ? list : el("p", { class: "empty" }, "none");
  }

  const part = (title, caption, ...children) =>
    el("section", {}, el("h4", {}, title), ...children, el("p", { class: "caption" }, caption));

  // What excites a feature most of all that can be painted.
  function painted(chapter, name, pixels) {
    const canvas = el("canvas", { class: "painted", width: pixels, height: pixels, role: "img", title: "activation maximization for this feature: a picture, not a claim" });
    atlas.image(chapter, name).then((bitmap) => {
      const context = canvas.getContext("2d");
      context.imageSmoothingQuality = "high";
      context.drawImage(bitmap, 0, 0, pixels, pixels);
    });
    return canvas;
  }

  function paintings(d, i) {
    const names = d.painted.filter((name) => name.split("/")[0] === String(i));
    if (!names.length) return null;
    const pictures = names.map((name) => el("figure", {}, painted("features", `painted${d.index}/${name}`, 264),
      el("figcaption", {}, name.slice(String(i).length + 1) || "whole feature")));
    return part("Activation maximization", "Images optimized from noise to maximize the pre-activation at the center of the map, for the whole feature and for its part in its main branch. A picture, not a claim.",
      el("div", { class: "paintings" }, ...pictures));
  }

  function detail(d, i, showHeat, open) {
    const shown = countExamples(d, i);
    const read = d.rows < d.allRows ? `${number(d.rows)} of ${number(d.allRows)} rows` : `all ${number(d.rows)} rows`;
    const bars = branchBars(d, i, true);
    return [
      part(d.kind === "text" ? "Strongest tokens" : "Strongest examples",
        shown ? `The ${shown} strongest rows, at most one of each sample, strongest first.${d.kind === "image" ? " Crops of one photograph are different samples. Each square shows the receptive field of the position, cut to the image; brightness is the activation at every position, relative to the feature’s largest, and the frame is the position itself." : ""}` : "",
        exampleList(d, i, d.top, 132, showHeat)),
      paintings(d, i),
      el("div", { class: "columns" },
        part("Activations", `Density: share of ${read} of the store where it is active. Mean: over those rows. Bars: number of rows by activation, with ratios across and square roots up; the first bar holds everything weaker.`, facts(d, i), d.density[i] > 0 ? histogram(d, i) : null),
        bars ? part("Branches", "Length of the atom’s positive part inside each branch, relative to its whole length; squares add up to 1. The tick is the share expected from the branch’s width. A description: whether a difference stands against chance is in the chapter on branches, where “mechatlas branches” was run.", bars) : null,
        part("Nearest atoms", `Cosine of decoder rows, among features that are ever active. One shuffled atom in a hundred reaches ${number(d.chance)}; fainter ones are below that.`, neighborList(d, i, showHeat, open))),
    ];
  }

  return { card, detail, exampleList, link, painted };
})();
