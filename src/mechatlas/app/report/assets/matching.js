// Pair cards: both features' strongest examples side by side, with the evidence for the pair.
"use strict";

(() => {
  const { el, number, percent } = atlas;
  const PER_PAGE = 6;
  const facts = atlas.data("matching");

  // The features chapter may not be on the page, or not have these dictionaries.
  async function side(run, name, latent) {
    const d = run && atlas.features ? await atlas.features.ofRun(run) : null;
    const head = el("h5", {}, d ? el("a", { href: cards.link(d, latent) }, `${name} / ${latent}`) : `${name} / ${latent}`);
    return el("div", {}, head, d ? cards.exampleList(d, latent, d.kind === "image" ? 4 : 3, 72, true) : null);
  }

  async function start(section) {
    const k = Number(section.dataset.run), { names, runs, fdr } = facts[k];
    const keys = ["pair", "latent_a", "latent_b", "cosine", "q_value", "cost"];
    const loaded = await Promise.all(keys.map((key) => atlas.array("matching", `${k}/${key}`)));
    const t = Object.fromEntries(keys.map((key, i) => [key, loaded[i]]));
    const find = (name) => section.querySelector(name);
    find(".which").append(...names.slice(1).map((name, p) => el("option", { value: p }, `${names[p]} → ${name}`)));
    let page = 0;

    async function show() {
      const p = Number(find(".which").value), direction = Number(find(".order").value);
      const rows = Array.from(t.pair.keys()).filter((i) => t.pair[i] === p)
        .sort((x, y) => direction * (t.cosine[y] - t.cosine[x]));
      const pages = Math.max(1, Math.ceil(rows.length / PER_PAGE));
      page = Math.min(Math.max(page, 0), pages - 1);
      find(".page").textContent = `${page + 1} of ${number(pages)}`;
      const made = await Promise.all(rows.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(async (i) => {
        const matched = t.q_value[i] <= fdr;
        const two = await Promise.all([side(runs[p], names[p], t.latent_a[i]), side(runs[p + 1], names[p + 1], t.latent_b[i])]);
        return el("article", { class: "card still", "data-claim": true },
          el("header", {}, el("b", {}, matched ? "matched" : "could be chance"),
            el("span", { class: "evidence lean", "data-evidence": true }, `cosine ${number(t.cosine[i])}, q ${number(t.q_value[i])} at ${percent(fdr)}; cost ${number(t.cost[i])}`)),
          el("div", { class: "two" }, ...two));
      }));
      find(".pairs").replaceChildren(...made);
    }

    find(".which").addEventListener("change", () => { page = 0; show(); });
    find(".order").addEventListener("change", () => { page = 0; show(); });
    find(".back").addEventListener("click", () => { page--; show(); });
    find(".on").addEventListener("click", () => { page++; show(); });
    await show();
    section.dataset.ready = "yes";
  }

  for (const section of document.querySelectorAll("section.matching")) {
    atlas.whenSeen(section.querySelector(".pairs"), () => atlas.rest(() => start(section)), "400px");
  }
})();
