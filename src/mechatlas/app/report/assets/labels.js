// Names and notes that a reader gives to features: kept in the browser, exported, and read back.
"use strict";

const labels = (() => {
  const { el } = atlas;
  const { labels: given, dictionaries } = atlas.data("features");
  const place = `mechatlas-labels ${dictionaries.map((d) => `${d.run} ${d.checksum}`).join(" ")}`;
  let own = {};
  try { own = JSON.parse(localStorage.getItem(place)) ?? {}; } catch { own = {}; }

  const of = (d, i) => own[d.run]?.[i] ?? given[d.run]?.[i] ?? {};
  const all = (d) => Object.entries({ ...given[d.run], ...own[d.run] });

  function put(d, i, label) {
    (own[d.run] ??= {})[i] = label;
    try { localStorage.setItem(place, JSON.stringify(own)); } catch { /* kept until the page is closed */ }
    document.dispatchEvent(new CustomEvent("label", { detail: { run: d.run, feature: i } }));
  }

  // Names and notes of all dictionaries, as `mechatlas report --labels` and `branches --labels` read them.
  function whole() {
    const dictionariesOf = {};
    for (const d of dictionaries) {
      const features = {};
      for (const [i, label] of all(d)) {
        if (label.name || label.note) features[i] = label;
      }
      if (Object.keys(features).length) dictionariesOf[d.run] = { site: d.site, checksum: d.checksum, features };
    }
    return { schema: 1, dictionaries: dictionariesOf };
  }

  function read(text) {
    const file = JSON.parse(text);
    if (typeof file.dictionaries !== "object") throw new Error("The file has no “dictionaries”.");
    let n = 0;
    for (const d of dictionaries) {
      for (const [i, label] of Object.entries(file.dictionaries[d.run]?.features ?? {})) {
        if (Number(i) < d.n) { put(d, Number(i), { name: String(label.name ?? ""), note: String(label.note ?? "") }); n++; }
      }
    }
    return n;
  }

  const save = () => atlas.save("labels.json", JSON.stringify(whole(), null, 1));

  // Fields for the name and the note of a feature.
  function form(d, i) {
    const label = of(d, i);
    const name = el("input", { type: "text", value: label.name ?? "", placeholder: "name", "aria-label": "Name of the feature", maxlength: 80 });
    const note = el("input", { type: "text", class: "long", value: label.note ?? "", placeholder: "note", "aria-label": "Note on the feature", maxlength: 2000 });
    for (const field of [name, note]) field.addEventListener("change", () => put(d, i, { name: name.value.trim(), note: note.value.trim() }));
    return el("div", { class: "label" }, name, note,
      el("button", { type: "button", title: "All names and notes of this page, for mechatlas report --labels", onclick: save }, "save labels.json"));
  }

  return { of, all, put, form, save, read };
})();
