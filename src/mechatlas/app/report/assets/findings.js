// Pictures of the findings on the first screen: features by their strongest example.
"use strict";

(() => {
  const { el } = atlas;
  const rows = atlas.data("findings");

  async function picture([run, latent]) {
    const d = run && atlas.features ? await atlas.features.ofRun(run) : null;
    if (!d) return el("b", {}, String(latent));
    const link = el("a", { href: cards.link(d, latent), class: "shown", title: `${d.key}/${latent}` });
    link.append(cards.exampleList(d, latent, 1, 84, true));
    return link;
  }

  for (const place of document.querySelectorAll("[data-finding]")) {
    atlas.whenSeen(place, () => atlas.rest(async () => {
      const shown = await Promise.all(rows[Number(place.dataset.finding)].map(async (row) =>
        el("div", { class: row.length === 2 && row[0][0] !== row[1][0] ? "row-of pairwise" : "row-of" }, ...(await Promise.all(row.map(picture))))));
      place.append(...shown);
      place.dataset.ready = "yes";
    }));
  }
})();
