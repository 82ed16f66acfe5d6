// Examples of the findings on the first screen: of each feature the strongest.
"use strict";

(() => {
  const { el } = atlas;
  const MOST_TEXTS = 6;  // excerpts in a card; each takes two lines
  const rows = atlas.data("findings");

  async function picture([run, latent]) {
    const d = run && atlas.features ? await atlas.features.ofRun(run) : null;
    if (!d) return el("b", {}, String(latent));
    const link = el("a", { href: cards.link(d, latent), class: d.kind === "text" ? "shown excerpt" : "shown", title: `${d.key}/${latent}` });
    if (d.kind === "text") link.append(el("b", { class: "n" }, String(latent)));
    link.append(cards.exampleList(d, latent, 1, 84, true));
    return link;
  }

  for (const place of document.querySelectorAll("[data-finding]")) {
    atlas.whenSeen(place, () => atlas.rest(async () => {
      let left = MOST_TEXTS;
      for (const row of rows[Number(place.dataset.finding)]) {
        const pairwise = row.length === 2 && row[0][0] !== row[1][0];
        const shown = (await Promise.all(row.map(picture))).filter((e) => !e.matches(".excerpt") || left-- > 0);
        if (shown.length) place.append(el("div", { class: pairwise ? "row-of pairwise" : "row-of" }, ...shown));
      }
      if (!place.querySelector(".shown")) place.remove();  // their dictionaries are not on the page
      place.dataset.ready = "yes";
    }));
  }
})();
