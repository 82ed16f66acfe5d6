// Links from the features of this chapter to their dossiers.
"use strict";

(() => {
  const runs = atlas.data("effects");
  for (const section of document.querySelectorAll("section.effects")) {
    atlas.whenSeen(section, () => atlas.rest(async () => {
      const run = runs[Number(section.dataset.run)];
      const d = run && atlas.features ? await atlas.features.ofRun(run) : null;
      for (const link of section.querySelectorAll("a[data-latent]")) {
        if (!d) { link.replaceWith(link.textContent); continue; }
        link.href = cards.link(d, link.dataset.latent);
        link.append(labels.of(d, link.dataset.latent).name ? ` ${labels.of(d, link.dataset.latent).name}` : "");
      }
      section.dataset.ready = "yes";
    }));
  }
})();
