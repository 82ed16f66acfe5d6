// Tracks of features through the layers, with their examples.
"use strict";

(() => {
  const { el } = atlas;
  const tracks = atlas.data("flow");

  async function step([name, run, latent, origin, module, moduleRun, ofModule]) {
    const written = module ? el("span", { class: "faint" }, origin === "passed on" ? "" : `${origin}: `, await cards.mention(moduleRun, ofModule, module)) : origin && origin !== "passed on" ? el("span", { class: "faint" }, origin) : null;
    return el("li", {}, await cards.mention(run, latent, name, 1), written);
  }

  for (const section of document.querySelectorAll("section.flow")) {
    for (const place of section.querySelectorAll("[data-track]")) {
      atlas.whenSeen(place, () => atlas.rest(async () => {
        const steps = await Promise.all(tracks[Number(section.dataset.run)][Number(place.dataset.track)].map(step));
        place.replaceChildren(el("ol", { class: "track" }, ...steps));
        place.dataset.ready = "yes";
      }));
    }
  }
})();
