// The browser of features: tabs, search, cards, the open dossier, and the address of all of it.
"use strict";

(() => {
  const root = document.getElementById("atlas");
  if (!root) return;
  const { el, number } = atlas;
  const { galleries, dictionaries } = atlas.data("features");
  const byId = (id) => document.getElementById(id);
  const PER_PAGE = 24;
  const dialog = byId("detail");
  const state = { d: null, found: [], page: 0, open: null, heat: true, rising: true, lasso: null, observers: [] };
  const opened = new Map();

  // Arrays of a dictionary are decoded when it is first looked at.
  function openDictionary(index) {
    if (!opened.has(index)) opened.set(index, load(index));
    return opened.get(index);
  }

  // For other chapters: the dictionary of a run, or null if the page does not show it.
  atlas.features = {
    ofRun: (run) => {
      const index = dictionaries.findIndex((d) => d.run === run);
      return index < 0 ? null : openDictionary(index);
    },
  };

  const text = (bytes) => new TextDecoder().decode(bytes);
  const WHOLE = ["density", "mean", "max", "shares", "flat"];
  const OF_CARDS = ["histogram", "upper", "near", "cosine", "slot", "place", "value", "first", "corner", "heat", "apart", "scale"];
  const KINDS = ["is", "class", "family", "specialized", "stimulus", "origin", "raises", "lowers"];
  const MOST_BYTES = 48e6, MOST_ROWS = 8192;

  async function load(index) {
    const facts = dictionaries[index], place = (name) => `${index}/${name}`;
    const has = (name) => atlas.has("features", place(name)), read = (name) => atlas.array("features", place(name));
    const d = { ...facts, heat_shape: facts.heat, index };
    await Promise.all([...WHOLE, ...["match", "origin"].filter(has)].map(async (name) => { d[name] = await read(name); }));
    d.gallery = galleries[facts.gallery];
    d.names = d.gallery.names;
    d.sheet = (k) => atlas.image("features", `${facts.gallery}/${k}`);
    if (d.kind === "text") {
      d.words = d.gallery.words ?? [];
      d.vocabulary = (d.gallery.vocabulary ??= cards.vocabulary(d.words));
      d.tokens = d.words.length ? await atlas.array("features", `${facts.gallery}/tokens`) : new Uint32Array(0);
      d.length = d.tokens.shape?.[1] ?? 0;
    }
    d.has = {};
    if (has("kinds")) for (const kind of JSON.parse(text(await read("kinds")))) d.has[kind] = true;
    await rowsOf(d, has, read);
    listsOf(d, has, read);
    if (d.arrays) atlas.rest(() => query.warm(d));
    return d;
  }

  // d.row(i): what the card of feature i needs, by name, with its claims; null until d.need([i]) has fetched it.
  async function rowsOf(d, has, read) {
    const served = atlas.ranges("features", `${d.index}/rows`), lines = has("lines") && atlas.ranges("features", `${d.index}/lines`);
    const at = has("lines") ? await read("lines.at") : null, kept = new Map(), asked = new Map();
    const most = served ? Math.min(MOST_ROWS, Math.max(256, Math.floor(MOST_BYTES / served.shape[1]))) : MOST_ROWS;
    const keep = (i, row, claims) => {
      row.record = claims.length ? JSON.parse(text(claims)) : {};
      kept.set(i, row);
      if (kept.size > most) kept.delete(kept.keys().next().value);
      return row;
    };
    const claimsOf = (bytes, i, begin = 0) => (at ? bytes.subarray(at[i] - begin, at[i + 1] - begin) : []);
    if (!served) {
      d.arrays = Object.fromEntries(await Promise.all(OF_CARDS.map(async (name) => [name, await read(name)])));
      const bytes = at ? await read("lines") : null;
      const cut = (values, i) => { const step = values.length / d.n; return values.subarray(i * step, (i + 1) * step); };
      d.row = (i) => kept.get(i) ?? keep(i, Object.fromEntries(Object.entries(d.arrays).map(([name, values]) => [name, cut(values, i)])), claimsOf(bytes, i));
      d.need = async () => {};
      return;
    }
    const size = served.shape[1];
    const fetchRun = async (first, last) => {
      try {
        const [bytes, claims] = await Promise.all([served.read(first * size, last * size), at ? lines.read(at[first], at[last]) : null]);
        for (let i = first; i < last; i++) {
          const row = Object.fromEntries(served.layout.map(([name, kind, begin, count]) => [name, new atlas.kinds[kind](bytes.buffer, (i - first) * size + begin, count)]));
          keep(i, row, claimsOf(claims, i, at?.[first]));
        }
      } finally {
        for (let i = first; i < last; i++) asked.delete(i);
      }
    };
    d.row = (i) => kept.get(i) ?? null;
    d.need = (features) => {
      const missing = [...new Set(features)].filter((i) => !kept.has(i) && !asked.has(i)).sort((a, b) => a - b);
      for (let k = 0, begin = 0; k < missing.length; k++) {
        if (missing[k + 1] === missing[k] + 1 && k - begin < 63) continue;
        const run = fetchRun(missing[begin], missing[k] + 1);
        for (; begin <= k; begin++) asked.set(missing[begin], run);
      }
      return Promise.all(Array.from(features, (i) => asked.get(i)));
    };
  }

  // d.list(kind): the words of a kind, and of(words by number) with the features of each.
  function listsOf(d, has, read) {
    const lists = new Map();
    const served = async (kind, words) => {
      const at = await read(`${kind}.at`), features = atlas.ranges("features", `${d.index}/${kind}.feature`);
      const whole = features ? null : await read(`${kind}.feature`);
      const of = async (numbers) => {
        const runs = [];  // lists that lie close together are fetched at once
        for (const k of numbers) {
          if (runs.length && at[k] - runs.at(-1)[1] < 4096) runs.at(-1)[1] = at[k + 1];
          else runs.push([at[k], at[k + 1]]);
        }
        const fetched = whole ? [] : await Promise.all(runs.map(([from, to]) => features.read(from, to)));
        const ofWord = (k) => {
          if (whole) return whole.subarray(at[k], at[k + 1]);
          const run = runs.findIndex(([from, to]) => from <= at[k] && at[k + 1] <= to);
          return fetched[run].subarray(at[k] - runs[run][0], at[k + 1] - runs[run][0]);
        };
        return numbers.map(ofWord);
      };
      return { words, of };
    };
    const make = async (kind) => {
      if (KINDS.includes(kind)) return has(`${kind}.words`) ? served(kind, JSON.parse(text(await read(`${kind}.words`)))) : null;
      if (!d.arrays) return has(`${kind}.at`) ? served(kind, kind === "token" ? d.words.map((w) => w.trim().toLowerCase()) : d.names) : null;
      const index = query.index(d, kind), words = [...index.keys()];
      return { words, of: async (numbers) => numbers.map((k) => index.get(words[k])) };
    };
    d.list = (kind) => {
      if (!lists.has(kind)) lists.set(kind, make(kind));
      return lists.get(kind);
    };
  }

  // ---- the address ---------------------------------------------------------------------

  // #dictionary/feature?q=words&sort=density&order=falling&page=2
  function address() {
    const d = state.d, values = new URLSearchParams();
    if (byId("search").value.trim()) values.set("q", byId("search").value.trim());
    if (byId("sort").value !== "number") values.set("sort", byId("sort").value);
    if (state.rising !== risingAtFirst()) values.set("order", state.rising ? "rising" : "falling");
    if (state.page) values.set("page", state.page + 1);
    const link = state.open === null ? cards.link(d, "").slice(0, -1) : cards.link(d, state.open);
    return `${link}${values.size ? `?${values}` : ""}`;
  }
  const remember = () => history.replaceState(null, "", address());
  const risingAtFirst = () => ["number", "shuffled"].includes(byId("sort").value);

  async function followLink({ first = false } = {}) {
    const [path, values] = location.hash.slice(1).split("?"), text = decodeURIComponent(path);
    if (document.getElementById(text)?.closest("main")) {  // a chapter, or a part of one
      if (dialog.open) leave();
      if (first) await choose(0);
      return;
    }
    const [, key, feature] = /^(.*?)(?:\/(\d+))?$/.exec(text);
    let index = dictionaries.findIndex((d) => d.key === key), i = feature;
    if (index < 0) [index, i] = [dictionaries.findIndex((d) => d.key === text), undefined];
    await choose(index < 0 ? state.d?.index ?? 0 : index);
    if (index < 0) return;
    if (values) await recall(new URLSearchParams(values));
    if (!dialog.open) atlas.land(byId("features"));
    if (i !== undefined && Number(i) < state.d.n) openFeature(Number(i));
    else if (dialog.open) leave();
  }

  async function recall(values) {
    byId("search").value = values.get("q") ?? "";
    if ([...byId("sort").options].some((o) => o.value === values.get("sort"))) byId("sort").value = values.get("sort");
    setOrder(values.has("order") ? values.get("order") === "rising" : risingAtFirst());
    await show();
    state.page = Number(values.get("page") ?? 1) - 1 || 0;
    showPage();
  }

  function setOrder(rising) {
    state.rising = rising;
    byId("direction").textContent = rising ? "↑" : "↓";
  }

  // ---- the list ------------------------------------------------------------------------

  let asking = 0;
  async function show() {
    const d = state.d, place = byId("count"), mine = ++asking;
    let note = "";
    try {
      const answer = await query.select(byId("search").value, d);
      if (mine !== asking || state.d !== d) return;  // another search has begun
      const inside = state.lasso && new Set(state.lasso);
      state.found = query.sort(inside ? answer.found.filter((i) => inside.has(i)) : answer.found, byId("sort").value, state.rising, d);
      note = answer.note;
    } catch (error) {
      if (mine !== asking) return;
      place.textContent = error.message;
      place.classList.add("wrong");
      return;
    }
    place.classList.toggle("wrong", !!note);
    place.textContent = note || (state.found.length === d.n
      ? `${number(d.n)} features, ${number(d.alive)} of them active in the rows read`
      : `${number(state.found.length)} of ${number(d.n)} features`);
    if (state.lasso) place.append(" in the lasso ", el("button", { type: "button", class: "link", onclick: () => { state.lasso = null; show(); } }, "clear"));
    state.page = 0;
    showPage();
    map.mark(state.found, state.open);
  }

  function showPage() {
    const pages = Math.max(1, Math.ceil(state.found.length / PER_PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    state.observers.forEach((observer) => observer.disconnect());
    const part = state.found.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
    state.d.need(part);  // at once, where they lie side by side
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
    remember();
    byId("count").scrollIntoView({ block: "nearest" });
  }

  // ---- one feature ---------------------------------------------------------------------

  function openFeature(i) {
    const d = state.d;
    if (!d.row(i)) { d.need([i]).then(() => { if (state.d === d) openFeature(i); }); return; }
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
        heatButton,
        button("JSON", "JSON: save everything that the page knows of it", () => atlas.save(`${d.key.replaceAll("/", "_")}_${i}.json`, JSON.stringify(dossier.plain(d, i), null, 1))),
        button("✕", "close", () => dialog.close())),
      el("div", { class: `inside ${d.kind}` }, ...dossier.detail(d, i, state.heat)));
    dialog.step = (by) => step(by)?.();
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    remember();
    map.mark(state.found, i);
  }

  let leaving = false;
  function leave() {
    leaving = true;
    dialog.close();
  }
  dialog.addEventListener("close", () => {
    state.open = null;
    if (!leaving) remember();
    leaving = false;
    map.mark(state.found, null);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
    const link = event.target.closest("a[data-feature]");
    if (!link) return;
    event.preventDefault();
    openFeature(Number(link.dataset.feature));
  });

  function toggleHeat() {
    state.heat = !state.heat;
    byId("heat").setAttribute("aria-pressed", state.heat);
    showPage();
    if (state.open != null) openFeature(state.open);
  }

  // ---- which dictionary ----------------------------------------------------------------

  async function choose(index) {
    if (state.d?.index === index) return;
    const d = await openDictionary(index);
    Object.assign(state, { d, found: [], lasso: null, open: null });
    root.querySelectorAll("[role=tab]").forEach((tab, k) => tab.setAttribute("aria-selected", k === index));
    const option = (value, text = value) => el("option", { value }, text);
    const words = { match: "cosine of its match", origin: "cosine of its origin" };
    byId("sort").replaceChildren(option("number"), option("shuffled"), ...[...query.numbers(d).keys()].map((n) => option(n, words[n] ?? (d.branches.includes(n) ? `share of ${n}` : n))));
    setOrder(true);
    byId("search").placeholder = d.kind === "text" ? "Search: 123, a word or token, density>0.01, matched …"
      : d.branches.length ? `Search: 123, ${d.branches.at(-1)}, density>0.01, matched, a file name …` : "Search: 123, density>0.01, matched, a file name …";
    byId("help-branches").textContent = d.branches.length
      ? `, ${d.branches[0]} > 0.8 by number · ${d.branches.join(", ")}: features by nearest branch` : "";
    byId("map-caption").textContent =
      `${d.map} of the decoder rows of ${number(d.alive)} active features (cosine, seed 0). Click a point for its dossier; the wheel zooms once the map has the focus. A picture: nearby points are similar, but distances, gaps and shapes prove nothing.`;
    root.querySelector(".notes").replaceChildren(...d.problems.map((text) => el("p", { class: "note" }, text)));
    legend(d);
    map.show(d, openFeature, (caught) => { state.lasso = caught; show(); });
    await show();
  }

  function legend(d) {
    const terms = [
      ["active, density", "share of the store’s rows where the feature is active (above zero)"],
      ["max, mean", "largest and mean activation where it is active, in the units of the code"],
      ["heat", "brightness is the activation at every position, relative to the feature’s largest in the examples shown; dimmed positions are not active"],
      ["examples", `from ${number(d.rows)} of ${number(d.allRows)} rows, then run through the network again; nine in ten agree within ${number(d.drift)} of the feature’s maximum`],
    ];
    if (d.branches.length) terms.push(["branch bars", "share of the atom’s length in each branch; the tick is the share expected from the branch’s width. A feature’s nearest branch exceeds its tick by the largest factor"]);
    byId("legend").replaceChildren(...terms.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]));
  }

  // The features listed, as a table.
  async function table() {
    const d = state.d, values = [...query.numbers(d)], kinds = ["class", "family", "specialized", "is"];
    const [classes, families, branches, is] = await Promise.all(kinds.map((kind) => query.words(d, kind)));
    const head = ["feature", "name", "note", ...values.map(([name]) => name), "class", "family", "matched", "specialized"];
    return [head, ...Array.from(state.found, (i) => {
      const label = labels.of(d, i), matched = d.has.matches ? !!is[i]?.split(" ").includes("matched") : null;
      return [i, label.name, label.note, ...values.map(([, value]) => value(i)), classes[i], families[i], matched, branches[i]];
    })];
  }

  // ---- events --------------------------------------------------------------------------

  root.querySelector(".tabs").append(...dictionaries.map((d, k) =>
    el("button", { type: "button", role: "tab", onclick: async () => { await choose(k); remember(); } },
      d.key, el("small", {}, `${number(d.n)} features`))));
  let wait = 0;
  const again = async () => { await show(); remember(); };
  byId("search").addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(again, state.d?.n > 1e5 ? 40 : 0); });
  root.querySelector("form").addEventListener("submit", (event) => { event.preventDefault(); again(); });
  byId("sort").addEventListener("change", () => { setOrder(risingAtFirst()); again(); });
  byId("direction").addEventListener("click", () => { setOrder(!state.rising); again(); });
  byId("heat").addEventListener("click", toggleHeat);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("export-csv").addEventListener("click", async () => atlas.save(`${state.d.key.replaceAll("/", "_")}.csv`, atlas.csv(await table()), "text/csv"));
  byId("export-json").addEventListener("click", async () => {
    const [head, ...rows] = await table();
    atlas.save(`${state.d.key.replaceAll("/", "_")}.json`, JSON.stringify(rows.map((row) => Object.fromEntries(row.map((cell, k) => [head[k], cell ?? null]))), null, 1));
  });
  byId("labels-save").addEventListener("click", labels.save);
  byId("labels-load").addEventListener("change", async (event) => {
    const place = byId("count");
    try {
      const n = labels.read(await event.target.files[0].text());
      show();
      place.textContent = `${number(n)} names and notes read.`;
    } catch (error) {
      place.textContent = `No labels were read. ${error.message}`;
      place.classList.add("wrong");
    }
    event.target.value = "";
  });
  document.addEventListener("label", () => { if (state.d) showPage(); });
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
  addEventListener("hashchange", () => followLink());
  document.addEventListener("theme", () => { if (state.d) showPage(); });
  root.hidden = false;
  followLink({ first: true });
})();
