// The browser of features: tabs, search, cards, map, the open card, links.
"use strict";

(() => {
  const root = document.getElementById("atlas");
  if (!root) return;
  const { el, number } = atlas;
  const { galleries, dictionaries } = atlas.data("features");
  const byId = (id) => document.getElementById(id);
  const PER_PAGE = 24;
  const dialog = byId("detail");
  const state = { d: null, found: [], page: 0, open: null, heat: true, rising: true, observers: [] };
  const opened = new Map();

  // Arrays of a dictionary are decoded when it is first looked at.
  function openDictionary(number_) {
    if (!opened.has(number_)) opened.set(number_, load(number_));
    return opened.get(number_);
  }

  // For other chapters: the dictionary of a run, or null if the page does not show it.
  atlas.features = {
    ofRun: (run) => {
      const index = dictionaries.findIndex((d) => d.run === run);
      return index < 0 ? null : openDictionary(index);
    },
  };

  async function load(index) {
    const facts = dictionaries[index];
    const names = ["density", "mean", "max", "histogram", "upper", "shares", "near", "cosine", "flat",
      "slot", "place", "value", "first", "corner", "heat"];
    if (facts.kind === "text") names.push("tokens");
    const arrays = await Promise.all(names.map((name) => atlas.array("features", `${index}/${name}`)));
    const d = { ...facts, heat_shape: facts.heat, index };
    names.forEach((name, k) => { d[name] = arrays[k]; });
    d.gallery = galleries[facts.gallery];
    d.names = d.gallery.names;
    d.near_n = d.near.shape[1];
    d.sheet = (k) => atlas.image("features", `${facts.gallery}/${k}`);
    return d;
  }

  function show() {
    const d = state.d, problem = byId("count");
    try {
      state.found = query.sort(query.select(byId("search").value, d), byId("sort").value, state.rising, d);
      problem.classList.remove("wrong");
    } catch (error) {
      problem.textContent = error.message;
      problem.classList.add("wrong");
      return;
    }
    problem.textContent = state.found.length === d.n
      ? `${number(d.n)} features, ${number(d.alive)} of them active in the rows read`
      : `${number(state.found.length)} of ${number(d.n)} features`;
    state.page = 0;
    showPage();
    markMap();
  }

  function showPage() {
    const pages = Math.max(1, Math.ceil(state.found.length / PER_PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    state.observers.forEach((observer) => observer.disconnect());
    const part = state.found.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
    const made = part.map((i) => cards.card(state.d, i, state.heat, openFeature));
    state.observers = made.map(([, observer]) => observer);
    byId("cards").className = `cards ${state.d.kind}`;
    byId("cards").replaceChildren(...made.map(([element]) => element));
    byId("page").textContent = `page ${number(state.page + 1)} of ${number(pages)}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page === pages - 1;
  }

  function turn(by) {
    state.page += by;
    showPage();
    byId("count").scrollIntoView({ block: "nearest" });
  }

  // ---- the map -------------------------------------------------------------------------

  const hasGl = (() => {
    try { return !!document.createElement("canvas").getContext("webgl"); } catch { return false; }
  })();

  function mapFigure() {
    const d = state.d, by = byId("map-color").value;
    const groups = by === "branch" ? d.branches.map((name) => [name, []]) : [["features", []]];
    for (let i = 0; i < d.n; i++) {
      if (!Number.isFinite(d.flat[2 * i])) continue;
      groups[by === "branch" ? Math.max(0, query.nearestBranch(d, i)) : 0][1].push(i);
    }
    const matched = state.found.length < d.n ? new Set(state.found) : null;
    const size = d.alive > 3000 ? 3.5 : d.alive > 800 ? 5 : 7;
    const data = groups.map(([name, members], g) => ({
      type: hasGl ? "scattergl" : "scatter", mode: "markers", name,
      x: members.map((i) => d.flat[2 * i]), y: members.map((i) => d.flat[2 * i + 1]),
      customdata: members,
      text: members.map((i) => `${i} · density ${number(d.density[i])}`),
      hovertemplate: "%{text}<extra></extra>",
      selectedpoints: matched ? members.flatMap((i, k) => (matched.has(i) ? [k] : [])) : null,
      unselected: { marker: { opacity: 0.07 } },
      marker: by === "branch" ? { size, opacity: 0.75, color: atlas.branchColor(g) }
        : { size, opacity: 0.8, colorscale: "Viridis", color: members.map((i) => Math.log10(d[by][i])), colorbar: scale(members.map((i) => d[by][i]), by) },
    }));
    if (state.open != null && Number.isFinite(d.flat[2 * state.open])) {
      data.push({ type: "scatter", mode: "markers", x: [d.flat[2 * state.open]], y: [d.flat[2 * state.open + 1]],
        hoverinfo: "skip", showlegend: false, marker: { size: 15, color: "rgba(0,0,0,0)", line: { width: 2.5, color: atlas.color("--ink") } } });
    }
    const bare = { visible: false, showgrid: false, zeroline: false };
    return { data, layout: {
      xaxis: bare, yaxis: { ...bare, scaleanchor: "x" }, margin: { l: 4, r: 4, t: 4, b: 4 }, hovermode: "closest",
      dragmode: "pan", showlegend: by === "branch", legend: { orientation: "h", x: 0, y: -0.02, yanchor: "top", itemsizing: "constant" }, uirevision: `${d.index}`,
    } };
  }

  // A bar of colors for the logarithm of some values, labeled with the values.
  function scale(values, title) {
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, 0]);
    const ticks = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade++) {
      for (const step of high / low > 100 ? [1] : [1, 2, 5]) {
        const value = step * Math.pow(10, decade);
        if (value >= low && value <= high) ticks.push(value);
      }
    }
    return { thickness: 8, outlinewidth: 0, title: { text: title, side: "right" },
      tickvals: ticks.map(Math.log10), ticktext: ticks.map(number) };
  }

  let mapWanted = false, mapReady = false;
  async function markMap() {
    if (!mapWanted) return;
    const element = await atlas.draw(byId("map"), mapFigure);
    if (mapReady) return;
    mapReady = true;
    element.on("plotly_click", (event) => {
      const i = event.points[0]?.customdata;
      if (i != null) openFeature(i);
    });
  }

  // ---- one feature ---------------------------------------------------------------------

  function openFeature(i, { link = true } = {}) {
    const d = state.d;
    state.open = i;
    const step = (by) => {
      const at = state.found.indexOf(i), next = state.found[at < 0 ? 0 : at + by];
      return next === undefined ? null : () => openFeature(next);
    };
    const [back, forth] = [step(-1), step(1)];
    const button = (text, label, action) =>
      el("button", { type: "button", "aria-label": label, title: label, disabled: !action, onclick: action || (() => {}) }, text);
    const heatButton = button("heat", "show or hide the heat maps", toggleHeat);
    heatButton.setAttribute("aria-pressed", state.heat);
    dialog.replaceChildren(
      el("header", {},
        el("h3", { id: "detail-title" }, `${d.key}/`, el("b", {}, String(i))),
        el("span", { class: "spacer" }),
        button("←", "previous feature", back), button("→", "next feature", forth),
        heatButton, button("✕", "close", () => dialog.close())),
      el("div", { class: `inside ${d.kind}` }, ...cards.detail(d, i, state.heat, openFeature)));
    dialog.step = (by) => step(by)?.();
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    if (link) history.replaceState(null, "", cards.link(d, i));
    markMap();
  }

  dialog.addEventListener("close", () => {
    state.open = null;
    history.replaceState(null, "", cards.link(state.d, "").slice(0, -1));
    markMap();
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  function toggleHeat() {
    state.heat = !state.heat;
    byId("heat").setAttribute("aria-pressed", state.heat);
    showPage();
    if (state.open != null) openFeature(state.open);
  }

  // ---- which dictionary ----------------------------------------------------------------

  async function choose(index) {
    if (state.d?.index === index) return;
    state.d = await openDictionary(index);
    const d = state.d;
    root.querySelectorAll("[role=tab]").forEach((tab, k) => tab.setAttribute("aria-selected", k === index));
    const option = (value, text = value) => el("option", { value }, text);
    byId("sort").replaceChildren(...["number", "density", "max", "mean", "shuffled"].map((n) => option(n)), ...d.branches.map((n) => option(n, `share of ${n}`)));
    byId("map-color").replaceChildren(...(d.branches.length ? [option("branch")] : []), option("density"), option("max"));
    byId("help-branches").textContent = d.branches.length
      ? `, ${d.branches[0]}>0.8 by number · ${d.branches.join(", ")}: features by nearest branch` : "";
    byId("map-caption").textContent =
      `${d.map} of the decoder rows of ${number(d.alive)} active features (cosine, seed 0). A picture: nearby points are similar, but distances, gaps and shapes prove nothing.`;
    root.querySelector(".notes").replaceChildren(...d.problems.map((text) => el("p", { class: "note" }, text)));
    legend(d);
    show();
  }

  function legend(d) {
    const terms = [
      ["density", "share of the store’s rows where the feature is active (above zero)"],
      ["max, mean", "largest and mean activation where it is active, in the units of the code"],
      ["heat", "brightness is the activation at every position, relative to the feature’s largest in the squares shown; dimmed positions are not active"],
      ["examples", `from ${number(d.rows)} of ${number(d.allRows)} rows, then run through the network again; the two agree within ${number(d.drift)} of each feature’s maximum`],
    ];
    if (d.branches.length) terms.push(["branch bars", "share of the atom’s length in each branch; the tick is the share expected from the branch’s width. A feature’s nearest branch exceeds its tick by the largest factor"]);
    byId("legend").replaceChildren(...terms.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]));
  }

  async function followLink() {
    const text = decodeURIComponent(location.hash.slice(1));
    const [, key, feature] = /^(.*?)(?:\/(\d+))?$/.exec(text);
    let index = dictionaries.findIndex((d) => d.key === key), i = feature;
    if (index < 0) [index, i] = [dictionaries.findIndex((d) => d.key === text), undefined];
    await choose(index < 0 ? state.d?.index ?? 0 : index);
    if (index < 0) return;
    byId("features").scrollIntoView({ behavior: "instant" });
    if (i !== undefined && Number(i) < state.d.n) openFeature(Number(i), { link: false });
  }

  // ---- events --------------------------------------------------------------------------

  root.querySelector(".tabs").append(...dictionaries.map((d, k) =>
    el("button", { type: "button", role: "tab", onclick: () => {
      choose(k);
      history.replaceState(null, "", `#${encodeURIComponent(d.key).replaceAll("%2F", "/")}`);
    } }, d.key, el("small", {}, `${number(d.n)} features`))));
  let wait = 0;
  byId("search").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(show, 80); });
  root.querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); show(); });
  byId("sort").addEventListener("change", () => {
    state.rising = ["number", "shuffled"].includes(byId("sort").value);
    byId("direction").textContent = state.rising ? "↑" : "↓";
    show();
  });
  byId("direction").addEventListener("click", () => {
    state.rising = !state.rising;
    byId("direction").textContent = state.rising ? "↑" : "↓";
    show();
  });
  byId("heat").addEventListener("click", toggleHeat);
  byId("map-color").addEventListener("change", markMap);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const actions = dialog.open
      ? { ArrowLeft: () => dialog.step(-1), ArrowRight: () => dialog.step(1), h: toggleHeat }
      : { "/": () => { byId("search").focus(); byId("search").select(); }, h: toggleHeat,
          n: () => byId("next").disabled || turn(1), p: () => byId("previous").disabled || turn(-1) };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });
  addEventListener("hashchange", followLink);
  document.addEventListener("theme", () => { if (state.d) showPage(); });
  root.hidden = false;
  atlas.whenSeen(byId("map"), () => { mapWanted = true; if (state.d) markMap(); });
  followLink();
})();
