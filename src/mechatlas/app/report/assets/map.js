// The map of a dictionary: every active feature as a point or a picture, to zoom, color and lasso.
"use strict";

const map = (() => {
  const canvas = document.getElementById("map");
  if (!canvas) return null;
  const { el, number } = atlas;
  const byId = (id) => document.getElementById(id);
  const TILE = 40, CELL = TILE + 6, NEAR = 12;
  const state = { d: null, view: null, half: [0, 0], points: [], found: null, open: null, show: "examples", lasso: false, path: null, hover: null, onOpen: null, onLasso: null,
    // The points listed that are in view, with their places.
    get near() {
      const inside = ([x, y]) => x >= -TILE && y >= -TILE && x <= 2 * this.half[0] + TILE && y <= 2 * this.half[1] + TILE;
      return Array.from(this.points, (i) => [...onScreen(i), i]).filter(([x, y, i]) => inside([x, y]) && (!this.found || this.found[i] === 1));
    } };
  const thumbs = new Map();

  // ---- colors --------------------------------------------------------------------------

  // Number of points of each name, most first.
  const named = (values) => {
    const count = new Map();
    for (const value of values) if (value != null) count.set(value, (count.get(value) ?? 0) + 1);
    return [...count].sort((a, b) => b[1] - a[1]);
  };
  // Names by which points are colored; those of claims are read when they are first asked for.
  const claimed = { class: "symmetry", family: "symmetry", match: "matches" };
  const known = new Map();
  async function learn(d, by) {
    const found = by === "match" ? (await query.words(d, "is")).map((words) => words?.split(" ").includes("matched")) : await query.words(d, by);
    if (by === "match") for (let i = 0; i < d.n; i++) found[i] = found[i] ? "matched" : "not matched";
    known.set(`${d.index}/${by}`, by === "family" ? found.map((family) => family && `family ${family}`) : found);
    if (state.d === d) { paint(); redraw(); }
  }
  function nameOf(d, by) {
    if (by === "branch") return (i) => d.branches[query.nearestBranch(d, i)];
    if (by === "label") return (i) => labels.of(d, i).name;
    const names = known.get(`${d.index}/${by}`);
    if (!names) { learn(d, by); return () => null; }
    return (i) => names[i];
  }
  const measures = ["density", "max"];

  const options = (d) => [...(d.branches.length ? ["branch"] : []), ...Object.keys(claimed).filter((by) => d.has[claimed[by]]), ...measures, "label"];

  // Color of each point, and what the colors mean.
  function paint() {
    const { d, points } = state, by = byId("map-color").value, legend = byId("map-legend");
    if (measures.includes(by)) {
      const logs = Float32Array.from(points, (i) => Math.log10(d[by][i]));
      const [low, high] = logs.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
      const [from, to] = [atlas.color("--line"), atlas.color("--accent")].map(rgb);
      const shade = (t) => from.map((c, k) => Math.round(c + (to[k] - c) * t));
      state.colors = Uint32Array.from(logs, (v) => packed(shade(high > low ? (v - low) / (high - low) : 1)));
      const [pale, full] = [0, 1].map((t) => css(packed(shade(t))));
      legend.replaceChildren(el("span", {}, number(10 ** low)), el("span", { class: "ramp", style: `background:linear-gradient(90deg, ${pale}, ${full})` }), el("span", {}, `${number(10 ** high)} ${by}, logarithmic`));
      return;
    }
    const name = nameOf(d, by), of = Array.from(points, name);
    const count = new Map(named(of)), listed = by === "branch" ? d.branches.map((b) => [b, count.get(b) ?? 0]) : [...count];
    const other = atlas.color("--pale");
    const colors = new Map(listed.slice(0, atlas.categories).map(([each], k) => [each, each === "not matched" || each === "not shown" ? other : atlas.color(atlas.category(k))]));
    const numbers = new Map([...colors].map(([each, color]) => [each, packed(rgb(color))])), rest = packed(rgb(other));
    state.colors = Uint32Array.from(of, (each) => numbers.get(each) ?? rest);
    const keys = [...colors].map(([each, color], k) => el("span", {}, el("i", { class: "dot", style: `--c:${color}` }), `${each} ${number(listed[k][1])}`));
    if (listed.length > atlas.categories) keys.push(el("span", {}, el("i", { class: "dot", style: `--c:${other}` }), `${number(listed.length - atlas.categories)} more`));
    if (!listed.length) keys.push(el("span", { class: "hint" }, by === "label" ? "No feature has a name yet." : "No feature has one."));
    legend.replaceChildren(...keys);
  }

  // A color as one pixel of a canvas, and as text.
  const packed = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  const css = (pixel) => `rgb(${pixel & 255},${(pixel >> 8) & 255},${(pixel >> 16) & 255})`;
  function rgb(text) {
    const hex = text.replace("#", "");
    return [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16));
  }

  // ---- drawing -------------------------------------------------------------------------

  function fit() {
    const { d, points } = state, box = canvas.getBoundingClientRect();
    state.half = [canvas.clientWidth / 2, canvas.clientHeight / 2];
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const i of points) {
      const x = d.flat[2 * i], y = d.flat[2 * i + 1];
      if (x < x0) x0 = x;
      if (x > x1) x1 = x;
      if (y < y0) y0 = y;
      if (y > y1) y1 = y;
    }
    state.view = { x: (x0 + x1) / 2, y: (y0 + y1) / 2, scale: Math.min((box.width - 44) / (x1 - x0 || 1), (box.height - 44) / (y1 - y0 || 1)) };
  }

  const onScreen = (i) => {
    const { view, d, half } = state;
    return [half[0] + (d.flat[2 * i] - view.x) * view.scale, half[1] + (d.flat[2 * i + 1] - view.y) * view.scale];
  };

  // Small picture of the strongest example, made when nobody scrolls.
  function thumb(i) {
    const { d } = state, key = `${d.index}/${i}/${state.show}`;
    if (state.show === "visualizations" && !d.painted.includes(String(i))) return null;
    if (!thumbs.has(key)) {
      thumbs.set(key, null);
      if (thumbs.size > 2000) thumbs.delete(thumbs.keys().next().value);
      const picture = document.createElement("canvas");
      picture.width = picture.height = 2 * TILE;
      atlas.rest(async () => {
        if (state.show === "visualizations") await cards.paint(picture, "features", `painted${d.index}/${i}`);
        else {
          await d.need([i]);
          const row = d.row(i);
          if (!row || row.slot[0] < 0) return;
          await cards.drawCrop(picture, d, row, 0, false);
        }
        thumbs.set(key, picture);
        redrawLater();
      });
    }
    return thumbs.get(key);
  }

  let later = 0;
  function redrawLater() { later ||= setTimeout(() => { later = 0; redraw(); }, 200); }

  // Name or strongest word of a feature; of a served page, empty until its row is there.
  const word = (i) => labels.of(state.d, i).name || cards.peakWord(state.d, i);

  let asked = false;
  function redraw() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; if (state.d && state.points.length) render(); });
  }

  function render() {
    const ratio = Math.min(devicePixelRatio || 1, 2), [w, h] = [canvas.clientWidth, canvas.clientHeight];
    state.half = [w / 2, h / 2];
    if (canvas.width !== Math.round(w * ratio)) canvas.width = Math.round(w * ratio);
    if (canvas.height !== Math.round(h * ratio)) canvas.height = Math.round(h * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, w, h);
    const { points, colors, found, d, view } = state, image = new ImageData(canvas.width, canvas.height), pixels = new Uint32Array(image.data.buffer);
    const size = Math.max(1, Math.round(ratio * (points.length > 1e5 ? 1 : points.length > 3000 ? 3 : points.length > 800 ? 4.5 : 6)));
    const columns = Math.ceil((w + 2 * TILE) / CELL), taken = new Int32Array(columns * Math.ceil((h + 2 * TILE) / CELL)).fill(-1);
    for (const listed of found ? [false, true] : [true]) {
      for (let k = 0; k < points.length; k++) {
        const i = points[k];
        if (found && (found[i] === 1) !== listed) continue;
        const x = w / 2 + (d.flat[2 * i] - view.x) * view.scale, y = h / 2 + (d.flat[2 * i + 1] - view.y) * view.scale;  // as onScreen, without arrays
        if (x < -TILE || y < -TILE || x > w + TILE || y > h + TILE) continue;
        square(pixels, canvas.width, Math.round(x * ratio - size / 2), Math.round(y * ratio - size / 2), size, (colors[k] & 0xffffff | (listed ? 0xd9000000 : 0x1f000000)) >>> 0);
        if (!listed) continue;
        const cell = Math.floor((y + TILE) / CELL) * columns + Math.floor((x + TILE) / CELL);
        if (taken[cell] < 0 || d.density[i] > d.density[points[taken[cell]]]) taken[cell] = k;
      }
    }
    context.putImageData(image, 0, 0);
    if (state.show !== "points" && d.kind !== "array") {
      const shown = taken.filter((k) => k >= 0), missing = Array.from(shown, (k) => points[k]).filter((i) => d.kind === "text" && !d.row(i));
      if (missing.length) d.need(missing).then(redrawLater);
      const boxes = [];  // of the words so far
      for (const k of shown.toSorted((a, b) => d.density[points[b]] - d.density[points[a]])) illustrate(context, ...onScreen(points[k]), k, boxes);
    }
    if (state.open !== null && Number.isFinite(state.d.flat[2 * state.open])) ring(context, ...onScreen(state.open));
    if (state.hover !== null) ring(context, ...onScreen(state.hover));
    if (state.path?.length > 1) {
      context.strokeStyle = atlas.color("--ink");
      context.beginPath();
      state.path.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.stroke();
    }
    canvas.dataset.drawn = "yes";
  }

  function square(pixels, width, left, top, size, color) {
    const height = pixels.length / width, right = Math.min(left + size, width), bottom = Math.min(top + size, height);
    for (let y = Math.max(0, top); y < bottom; y++) pixels.fill(color, y * width + Math.max(0, left), y * width + Math.max(0, right));
  }

  function illustrate(context, x, y, k, boxes) {
    const i = state.points[k];
    if (state.d.kind === "text") {
      context.font = "11px system-ui, sans-serif";
      context.fillStyle = atlas.color("--ink");
      const text = word(i).slice(0, 14), wide = context.measureText(text).width, left = Math.min(x + 4, 2 * state.half[0] - wide - 2);
      if (boxes.some(([l, t, w]) => left < l + w + 4 && l < left + wide + 4 && Math.abs(t - y) < 13)) return;
      boxes.push([left, y, wide]);
      context.fillText(text, left, y + 4);
      return;
    }
    const picture = thumb(i);
    if (!picture) return;
    context.fillStyle = css(state.colors[k]);
    context.fillRect(x - TILE / 2 - 2, y - TILE / 2 - 2, TILE + 4, TILE + 4);
    context.drawImage(picture, x - TILE / 2, y - TILE / 2, TILE, TILE);
  }

  function ring(context, x, y) {
    context.lineWidth = 2.5;
    context.strokeStyle = atlas.color("--ink");
    context.strokeRect(x - TILE / 2 - 4, y - TILE / 2 - 4, TILE + 8, TILE + 8);
  }

  // ---- hand and eye --------------------------------------------------------------------

  function zoom(by, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const { view } = state, [dx, dy] = [x - canvas.clientWidth / 2, y - canvas.clientHeight / 2];
    state.view = { x: view.x + (dx / view.scale) * (1 - 1 / by), y: view.y + (dy / view.scale) * (1 - 1 / by), scale: view.scale * by };
    redraw();
  }

  function pan(dx, dy) {
    state.view = { ...state.view, x: state.view.x - dx / state.view.scale, y: state.view.y - dy / state.view.scale };
    redraw();
  }

  function nearest(x, y) {
    let best = null, least = (state.show !== "points" ? TILE / 2 : NEAR) ** 2;
    for (const i of state.points) {
      if (state.found && state.found[i] !== 1) continue;
      const [px, py] = onScreen(i), far = (px - x) ** 2 + (py - y) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  // Whether a point lies inside a closed path.
  function inside(path, x, y) {
    let within = false;
    for (let k = 0, j = path.length - 1; k < path.length; j = k++) {
      const [[x1, y1], [x2, y2]] = [path[k], path[j]];
      if (y1 > y !== y2 > y && x < ((x2 - x1) * (y - y1)) / (y2 - y1) + x1) within = !within;
    }
    return within;
  }

  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  let from = null, moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    from = at(event);
    moved = 0;
    canvas.setPointerCapture(event.pointerId);
    if (state.lasso) state.path = [from];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.d) return;
    const here = at(event);
    if (!from) {
      const hover = nearest(...here);
      if (hover !== state.hover) {
        state.hover = hover;
        canvas.title = hover === null ? "" : `${hover} ${labels.of(state.d, hover).name ?? word(hover)}\nactive in ${atlas.percent(state.d.density[hover])} of rows`;
        canvas.style.cursor = hover === null ? "" : "pointer";
        redraw();
      }
      return;
    }
    moved += Math.abs(here[0] - from[0]) + Math.abs(here[1] - from[1]);
    if (state.path) { state.path.push(here); redraw(); } else { pan(here[0] - from[0], here[1] - from[1]); }
    from = here;
  });
  canvas.addEventListener("pointerup", (event) => {
    const path = state.path, here = at(event);
    from = state.path = null;
    if (path && moved > 8) {
      const caught = state.points.filter((i) => inside(path, ...onScreen(i)));
      setLasso(false);
      state.onLasso(caught);
    } else if (moved <= 8) {
      const i = nearest(...here);
      if (i !== null) state.onOpen(i);
    }
    redraw();
  });
  canvas.addEventListener("pointercancel", () => { from = state.path = null; });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return;  // the page scrolls on
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 300), ...at(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const actions = { "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: whole, ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0), ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60) };
    if (!actions[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
  });

  function setLasso(on) {
    state.lasso = on;
    byId("map-lasso").setAttribute("aria-pressed", on);
    canvas.classList.toggle("lasso", on);
  }
  function whole() { fit(); redraw(); }
  byId("map-lasso").addEventListener("click", () => setLasso(!state.lasso));
  byId("map-pictures").addEventListener("change", (event) => {
    state.show = event.target.value;
    redraw();
  });
  byId("map-in").addEventListener("click", () => zoom(1.6));
  byId("map-out").addEventListener("click", () => zoom(1 / 1.6));
  byId("map-whole").addEventListener("click", whole);
  byId("map-color").addEventListener("change", () => { paint(); redraw(); });
  document.addEventListener("label", () => { if (state.d) { paint(); redraw(); } });
  document.addEventListener("theme", () => { if (state.d) { paint(); redraw(); } });
  new ResizeObserver(() => { if (state.d) whole(); }).observe(canvas);

  return {
    options,
    // Show another dictionary.
    show(d, onOpen, onLasso) {
      const points = Int32Array.from({ length: d.n }, (_, i) => i).filter((i) => Number.isFinite(d.flat[2 * i]));
      Object.assign(state, { d, points, onOpen, onLasso, found: null, open: null, hover: null });
      const before = byId("map-color").value;
      byId("map-color").replaceChildren(...options(d).map((name) => el("option", { value: name }, name)));
      if (options(d).includes(before)) byId("map-color").value = before;
      const shown = ["examples", ...(d.painted.length ? ["visualizations"] : []), "points"];
      byId("map-pictures").replaceChildren(...shown.map((name) => el("option", { value: name }, name === "examples" && d.kind === "text" ? "words" : name)));
      if (!shown.includes(state.show)) state.show = "examples";
      byId("map-pictures").value = state.show;
      paint();
      fit();
      redraw();
    },
    mark(found, open) {
      const marks = found && found.length < state.d.n ? new Uint8Array(state.d.n) : null;
      if (marks) for (const i of found) marks[i] = 1;
      Object.assign(state, { found: marks, open });
      redraw();
    },
    state,
  };
})();
