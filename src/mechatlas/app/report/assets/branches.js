// The strongest features of each branch, with their examples and a link to their cards.
"use strict";

(() => {
  const { el, number, percent } = atlas;
  const facts = atlas.data("branches");

  async function start(section) {
    const { run, branches, strongest, fdr } = facts[Number(section.dataset.run)];
    const place = section.querySelector(".strongest");
    // The features chapter may not be on the page, or not have this dictionary.
    const d = run && atlas.features ? await atlas.features.ofRun(run) : null;
    branches.forEach((name, k) => {
      if (!strongest[k].length) return;
      const made = strongest[k].map((one) => {
        const head = d ? el("a", { href: cards.link(d, one.feature) }, String(one.feature)) : el("b", {}, String(one.feature));
        const lost = one.ablation === null ? "" : ` · lost without it ${number(one.ablation)}`;
        return el("article", { class: "card still", "data-claim": true },
          el("header", {}, head, el("span", { class: "brief" }, `share ${number(one.share)}`),
            el("span", { class: "lean" }, el("i", { class: `dot ${atlas.swatch(k)}` }), one.significant ? `specialized to ${name}` : "could be chance")),
          el("p", { class: "evidence", "data-evidence": true }, `expected ${number(one.expected)}, q ${number(one.q)} at ${percent(fdr)}${lost}`),
          d ? cards.exampleList(d, one.feature, d.kind === "image" ? 4 : 3, 72, true) : null);
      });
      place.append(el("h5", {}, name), el("div", { class: d && d.kind === "text" ? "cards text" : "cards" }, ...made));
    });
    section.dataset.ready = "yes";
  }

  for (const section of document.querySelectorAll("section.branches")) {
    const place = section.querySelector(".strongest");
    if (place) atlas.whenSeen(place, () => atlas.rest(() => start(section)), "400px");
    else section.dataset.ready = "yes";
  }
})();
