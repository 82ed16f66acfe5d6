// Stabilizer functions as small polar plots, features of a class, and a wheel for each family.
"use strict";

(() => {
  const { el, svg, number, percent } = atlas;
  const facts = atlas.data("symmetry");
  const PER_PAGE = 8, WHEELS_PER_PAGE = 2;

  // Place of each element: rotations on one ring, all others on another.
  function places(f) {
    const turning = f.rotations.length ? f.rotations : f.elements.map((_, g) => g);
    const turn = new Set(turning);
    const others = f.elements.map((_, g) => g).filter((g) => !turn.has(g));
    const place = [];
    [turning, others].forEach((ring, which) => ring.forEach((g, k) => {
      place[g] = { outer: which === 0, angle: (2 * Math.PI * k) / ring.length - Math.PI / 2 };
    }));
    return { place, turning, others };
  }

  // Polar plot of the stabilizer function of a feature.
  function polar(f, s, i, radius, cx, cy, color) {
    const { place, turning, others } = places(f);
    const n = f.elements.length;
    const at = (g) => {
      const length = radius * Math.min(1.15, Math.max(0, s[i * n + g]));
      return [cx + length * Math.cos(place[g].angle), cy + length * Math.sin(place[g].angle)];
    };
    const title = f.elements.map((name, g) => `${name}: ${number(s[i * n + g])}`).join("\n");
    const group = svg("g", { class: "polar" }, svg("title", {}, title),
      svg("circle", { cx, cy, r: radius, class: "rim" }), svg("circle", { cx, cy, r: radius / 2, class: "rim faint" }));
    group.append(svg("polygon", { points: turning.map((g) => at(g).join(",")).join(" "), style: `--c: ${color}` }));
    for (const g of others) group.append(svg("circle", { cx: at(g)[0], cy: at(g)[1], r: 2.6, class: "mirror", style: `--c: ${color}` }));
    return group;
  }

  function wheel(f, t, d, family) {
    const SIZE = Math.min(460, document.documentElement.clientWidth - 72), tile = Math.round((f.elements.length > 16 ? 0.095 : 0.16) * SIZE);
    const { place, others } = places(f);
    const outer = SIZE / 2 - tile / 2 - 4, inner = outer - tile - 14;
    const color = f.colors[f.classes.indexOf(family.class)] || "var(--pale)";
    const middle = others.length ? inner - tile / 2 - 12 : outer - tile / 2 - 12;
    const picture = el("div", { class: "wheel", style: `width:${SIZE}px;height:${SIZE}px`, role: "group", "aria-label": `poses of family ${family.family}` },
      svg("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, width: SIZE, height: SIZE }, polar(f, t.s, family.reference, middle, SIZE / 2, SIZE / 2, color)));
    family.slots.forEach((feature, g) => {
      const radius = place[g].outer ? outer : inner;
      const x = SIZE / 2 + radius * Math.cos(place[g].angle), y = SIZE / 2 + radius * Math.sin(place[g].angle);
      const style = `left:${x - tile / 2}px;top:${y - tile / 2}px;width:${tile}px;height:${tile}px`;
      const present = feature >= 0;
      const similarity = feature === family.reference ? "reference" : present ? `similarity ${number(t.similarity[feature])}` : "no feature";
      const box = el(present && d ? "a" : "span", { class: present ? "slot" : "slot none", style, href: present && d ? cards.link(d, feature) : null, title: `${f.elements[g]}: ${present ? `feature ${feature}, ` : ""}${similarity}` });
      if (present && d && d.kind === "image") box.append(cards.exampleList(d, feature, 1, tile, false));
      else if (present) box.append(String(feature));
      picture.append(box, el("small", { style: `left:${x - tile / 2}px;top:${y + tile / 2 - 14}px` }, f.elements[g]));
    });
    const list = family.members.map((i, k) => `${i} (${family.poses[k]})`).join(", ");
    const likeness = family.members.filter((i) => i !== family.reference).map((i) => t.similarity[i]);
    return el("article", { class: "card still", "data-claim": true },
      el("header", {}, el("b", {}, `Family ${family.family}`), el("span", { class: "brief" }, `${number(family.size)} features · ${family.class}`)),
      picture, el("p", { class: "caption" }, `Features and poses: ${list}`),
      el("p", { class: "evidence", "data-evidence": true }, `Similarity to the reference at least ${number(Math.min(...likeness))}; unrelated features reach ${number(f.chance)}.`));
  }

  function card(f, t, d, i) {
    const color = f.colors[t.class[i]] || "var(--pale)";
    const name = d ? el("a", { href: cards.link(d, i) }, String(i)) : el("b", {}, String(i));
    const body = el("div", { class: "symmetric" },
      svg("svg", { viewBox: "0 0 120 120" }, polar(f, t.s, i, 52, 60, 60, color)),
      d ? cards.exampleList(d, i, d.kind === "image" ? 4 : 3, 72, false) : null);
    return el("article", { class: "card still", "data-claim": true },
      el("header", {}, name, el("span", { class: "brief" }, f.classes[t.class[i]])), body,
      el("p", { class: "evidence", "data-evidence": true }, `q ${number(t.q_value[i])} at a false discovery rate of ${percent(f.fdr)}; noise ceiling ${number(t.noise_ceiling[i])}`));
  }

  // For dossiers: the stabilizer function of a feature.
  atlas.symmetry = {
    polar: async (k, i) => {
      const s = await atlas.array("symmetry", `${k}/s`), of = await atlas.array("symmetry", `${k}/class`);
      return svg("svg", { viewBox: "0 0 120 120", role: "img", "aria-label": "similarity of the feature to itself under each element" },
        polar(facts[k], s, i, 52, 60, 60, facts[k].colors[of[i]] || "var(--pale)"));
    },
  };

  async function start(section) {
    const k = Number(section.dataset.run), f = facts[k];
    const keys = ["s", "q_value", "noise_ceiling", "similarity", "class"];
    const loaded = await Promise.all(keys.map((key) => atlas.array("symmetry", `${k}/${key}`)));
    const t = Object.fromEntries(keys.map((key, i) => [key, loaded[i]]));
    // The features chapter may not be on the page, or not have this dictionary.
    const d = f.run && atlas.features ? await atlas.features.ofRun(f.run) : null;
    const find = (name) => section.querySelector(name);

    const byClass = f.classes.map(() => []);
    t.class.forEach((c, i) => byClass[c].push(i));
    byClass.forEach((list) => list.sort((a, b) => (t.q_value[a] - t.q_value[b]) || (t.noise_ceiling[b] - t.noise_ceiling[a])));
    const there = byClass.map((list, c) => c).filter((c) => byClass[c].length);
    find(".which").append(...there.map((c) => el("option", { value: c }, `${f.classes[c]} (${number(byClass[c].length)})`)));
    find(".which").value = String(there[there.length > 1 ? 1 : 0]);

    function pager(list, size, names, make, target) {
      let page = 0;
      const show = () => {
        const items = list(), pages = Math.max(1, Math.ceil(items.length / size));
        page = Math.min(Math.max(page, 0), pages - 1);
        find(names[1]).textContent = `${number(page + 1)} of ${number(pages)}`;
        find(target).replaceChildren(...items.slice(page * size, (page + 1) * size).map(make));
      };
      find(names[0]).addEventListener("click", () => { page--; show(); });
      find(names[2]).addEventListener("click", () => { page++; show(); });
      show();
      return () => { page = 0; show(); };
    }

    const again = pager(() => byClass[Number(find(".which").value)], PER_PAGE, [".back", ".page", ".on"], (i) => card(f, t, d, i), ".members");
    find(".which").addEventListener("change", again);
    if (find(".wheels")) pager(() => f.families, WHEELS_PER_PAGE, [".before", ".at", ".after"], (family) => wheel(f, t, d, family), ".wheels");
    section.dataset.ready = "yes";
  }

  for (const section of document.querySelectorAll("section.symmetry")) {
    atlas.whenSeen(section.querySelector(".members"), () => atlas.rest(() => start(section)), "600px");
  }
})();
