// The map of a dictionary: every active feature as a point or a picture, to zoom, color and lasso.
"use strict";

const map = (() => {
  const canvas = document.getElementById("map");
  if (!canvas) return null;
  const { el, number } = atlas;
  const byId = (id) => document.getElementById(id);
  const TILE = 40, NEAR = 12;
  const state = { d: null, view: null, points: [], found: null, open: null, show: "examples", lasso: false, path: null, hover: null, onOpen: null, onLasso: null };
  const thumbs = new Map();

  // ---- colors --------------------------------------------------------------------------

  const named = (values) => {
    const count = new Map();
    for (const value of values) if (value !== null) count.set(value, (count.get(value) ?? 0) + 1);
    return [...count].sort((a, b) => b[1] - a[1]);
  };
  const symmetryOf = (d, i) => d.records[i]?.symmetry?.[0];
  const groupings = {
    branch: (d) => (d.branches.length ? (i) => d.branches[query.nearestBranch(d, i)] ?? null : null),
    class: (d) => (d.has.symmetry ? (i) => symmetryOf(d, i)?.name ?? null : null),
    family: (d) => (d.has.symmetry ? (i) => (symmetryOf(d, i)?.members.length ? `family ${symmetryOf(d, i).family}` : null) : null),
    match: (d) => (d.has.matches ? (i) => (d.records[i]?.matches?.some((m) => m.matched) ? "matched" : "not matched") : null),
    label: () => (i) => labels.of(state.d, i).name || null,
  };
  const measures = { density: (d) => (i) => d.density[i], max: (d) => (i) => d.max[i] };

  function options(d) {
    const found = Object.keys(groupings).filter((name) => name !== "label" && groupings[name](d));
    return [...found, ...Object.keys(measures), "label"];
  }

  // Color of each point, and what the colors mean.
  const OF_CLAIMS = ["class", "family", "match"];
  let claimed = null;
  function paint() {
    const { d, points } = state, by = byId("map-color").value, legend = byId("map-legend");
    if (OF_CLAIMS.includes(by) && claimed !== d) { d.needClaims().then(() => { claimed = d; if (state.d === d) { paint(); redraw(); } }); }
    if (measures[by]) {
      const value = measures[by](d), logs = points.map((i) => Math.log10(value(i)));
      const [low, high] = logs.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
      const [from, to] = [atlas.color("--line"), atlas.color("--accent")].map(rgb);
      const shade = (t) => `rgb(${from.map((c, k) => Math.round(c + (to[k] - c) * t)).join(",")})`;
      state.colors = logs.map((v) => shade(high > low ? (v - low) / (high - low) : 1));
      legend.replaceChildren(el("span", {}, number(10 ** low)), el("span", { class: "ramp", style: `background:linear-gradient(90deg, ${shade(0)}, ${shade(1)})` }), el("span", {}, `${number(10 ** high)} ${by}, logarithmic`));
      return;
    }
    const group = groupings[by]?.(d) ?? (() => null), of = points.map(group);
    const listed = by === "branch" ? d.branches.map((b) => [b, of.filter((g) => g === b).length]) : named(of);
    const colors = new Map(listed.slice(0, 8).map(([name], k) => [name, atlas.color(name === "not matched" || name === "not shown" ? "--pale" : atlas.category(k))]));
    const other = atlas.color("--pale");
    state.colors = of.map((name) => colors.get(name) ?? other);
    const keys = [...colors].map(([name, color], k) => el("span", {}, el("i", { class: "dot", style: `--c:${color}` }), `${name} ${number(listed[k][1])}`));
    if (listed.length > 8) keys.push(el("span", {}, el("i", { class: "dot", style: `--c:${other}` }), `${number(listed.length - 8)} more`));
    if (!listed.length) keys.push(el("span", { class: "hint" }, by === "label" ? "No feature has a name yet." : "No feature has one."));
    legend.replaceChildren(...keys);
  }

  function rgb(text) {
    const hex = text.replace("#", "");
    return [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16));
  }

  // ---- drawing -------------------------------------------------------------------------

  function fit() {
    const { d, points } = state;
    const [x, y] = [0, 1].map((k) => points.map((i) => d.flat[2 * i + k]));
    const range = (v) => v.reduce(([a, b], w) => [Math.min(a, w), Math.max(b, w)], [Infinity, -Infinity]);
    const [[x0, x1], [y0, y1]] = [range(x), range(y)], box = canvas.getBoundingClientRect();
    state.view = { x: (x0 + x1) / 2, y: (y0 + y1) / 2, scale: Math.min((box.width - 44) / (x1 - x0 || 1), (box.height - 44) / (y1 - y0 || 1)) };
  }

  const onScreen = (i) => {
    const { view, d } = state;
    return [canvas.clientWidth / 2 + (d.flat[2 * i] - view.x) * view.scale, canvas.clientHeight / 2 + (d.flat[2 * i + 1] - view.y) * view.scale];
  };

  // Small picture of the strongest example, made when nobody scrolls.
  function thumb(i) {
    const { d } = state, key = `${d.index}/${i}/${state.show}`;
    if (state.show === "visualizations" && !d.painted.includes(String(i))) return null;
    if (!thumbs.has(key)) {
      thumbs.set(key, null);
      const picture = document.createElement("canvas");
      picture.width = picture.height = 2 * TILE;
      atlas.rest(async () => {
        if (state.show === "visualizations") await cards.paint(picture, "features", `painted${d.index}/${i}`);
        else {
          await d.need([i]);
          if (d.slot[i * d.shown] < 0) return;
          await cards.drawCrop(picture, d, i, 0, false);
        }
        thumbs.set(key, picture);
        redrawLater();
      });
    }
    return thumbs.get(key);
  }

  let later = 0;
  function redrawLater() { later ||= setTimeout(() => { later = 0; redraw(); }, 200); }

  const fetched = new Set();
  function word(i) {
    const { d } = state, named = labels.of(d, i).name;
    if (named || d.ready(i)) return named || cards.peakWord(d, i);
    const piece = `${d.index}/${Math.floor(i / d.piece)}`;
    if (!fetched.has(piece)) { fetched.add(piece); d.need([i]).then(redrawLater); }
    return "";
  }

  let asked = false;
  function redraw() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; if (state.d && state.points.length) render(); });
  }

  function render() {
    const ratio = Math.min(devicePixelRatio || 1, 2), [w, h] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== Math.round(w * ratio)) canvas.width = Math.round(w * ratio);
    if (canvas.height !== Math.round(h * ratio)) canvas.height = Math.round(h * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, w, h);
    const { points, colors, found } = state;
    const size = points.length > 3000 ? 3 : points.length > 800 ? 4.5 : 6;
    const taken = new Map(), near = [];
    points.forEach((i, k) => {
      const [x, y] = onScreen(i);
      if (x < -TILE || y < -TILE || x > w + TILE || y > h + TILE) return;
      const listed = !found || found.has(i);
      context.globalAlpha = listed ? 0.85 : 0.12;
      context.fillStyle = colors[k];
      context.fillRect(x - size / 2, y - size / 2, size, size);
      if (!listed) return;
      near.push([x, y, i]);
      const cell = `${Math.floor(x / (TILE + 6))} ${Math.floor(y / (TILE + 6))}`, before = taken.get(cell);
      if (before === undefined || state.d.density[i] > state.d.density[points[before[2]]]) taken.set(cell, [x, y, k]);
    });
    context.globalAlpha = 1;
    state.near = near;
    if (state.show !== "points" && state.d.kind !== "array") for (const place of taken.values()) illustrate(context, ...place);
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

  function illustrate(context, x, y, k) {
    const i = state.points[k];
    if (state.d.kind === "text") {
      context.font = "11px system-ui, sans-serif";
      context.fillStyle = atlas.color("--ink");
      context.fillText(word(i).slice(0, 14), x + 4, y + 4);
      return;
    }
    const picture = thumb(i);
    if (!picture) return;
    context.fillStyle = state.colors[k];
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
    for (const [px, py, i] of state.near ?? []) {
      const far = (px - x) ** 2 + (py - y) ** 2;
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
      const points = [];
      for (let i = 0; i < d.n; i++) if (Number.isFinite(d.flat[2 * i])) points.push(i);
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
    mark(found, open) { Object.assign(state, { found: found && found.length < state.d.n ? new Set(found) : null, open }); redraw(); },
    state,
  };
})();
