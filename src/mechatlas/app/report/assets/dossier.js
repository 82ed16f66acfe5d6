// The dossier of a feature: what it looks like, and every claim about it with its evidence.
"use strict";

const dossier = (() => {
  const { el, svg, number, percent } = atlas;

  const part = (title, caption, ...children) =>
    el("section", {}, el("h4", {}, title), ...children, caption ? el("p", { class: "caption" }, caption) : null);

  // A statement with the evidence that it rests on, and its place on the page.
  function claim(anchor, statement, evidence, sure = true, ...more) {
    return el("div", { class: sure ? "claim" : "claim unsure", "data-claim": true },
      el("div", { class: "says" }, ...[statement].flat()), ...more,
      el("p", { class: "evidence", "data-evidence": true }, evidence, " ",
        el("a", { href: `#${anchor}`, "data-leave": true }, "in its chapter")));
  }

  function paintings(d, i) {
    const names = d.painted.filter((name) => name.split("/")[0] === String(i));
    if (!names.length) return null;
    const pictures = names.map((name) => el("figure", {}, cards.painted("features", `painted${d.index}/${name}`, 264),
      el("figcaption", {}, name.slice(String(i).length + 1) || "whole feature")));
    return part("Activation maximization", "Images optimized from noise to maximize the pre-activation at the center of the map, for the whole feature and for its part in its main branch. A picture, not a claim.",
      el("div", { class: "paintings" }, ...pictures));
  }

  function examples(d, i, showHeat) {
    const css = 132, n = cards.ranksOf(d, i).length;
    if (!n) return part("Examples", "", el("p", { class: "empty" }, "Not active in the rows read."));
    const image = d.kind === "image"
      ? d.apart ? " Each square is the whole image; brightness is the activation at every patch, and the frame is the patch itself. Tokens without a place in the image are below it."
        : " Each square is the receptive field of the position, cut to the image; brightness is the activation at every position, relative to the feature’s largest, and the frame is the position itself."
      : d.kind === "text" ? " Click one for the whole context; hover over a token for its activation." : "";
    return el("div", { class: "columns two" },
      part("Strongest", `The ${n} strongest rows, at most one of each sample.${image}`, cards.exampleList(d, i, d.top, css, showHeat)),
      part("At ten quantiles", `From weak to strong: rows at evenly spaced quantiles of 64 drawn at random from those where it is active, at most one of each sample.`,
        cards.exampleList(d, i, d.shown, css, showHeat, "quantiles")));
  }

  function symmetry(line) {
    const statement = line.claimed ? `Stabilizer: ${line.name} (order ${line.order})` : line.name === "not shown" ? "Symmetry: neither shown nor ruled out" : `Symmetry: ${line.name}`;
    const others = line.members.length
      ? el("p", { class: "says" }, `Family ${line.family}, pose ${line.pose}; others: `, ...line.members.map(([j, pose], k) => el("span", {}, el("a", { href: "#", "data-feature": j }, `${j} (${pose})`), k + 1 < line.members.length ? "," : ""))) : null;
    const what = { absent: "absent", shrunk: "shrunk although the code drives it", decoupled: "written by other latents", "not shown": "not shown to be absent" };
    const zero = line.zero.length
      ? el("p", { class: "says" }, "Zero blocks: ", ...line.zero.map(([pose, name, value, low, high, carrier], k) => el("span", {},
        `${pose} ${what[name]}`, carrier < 0 ? "" : el("span", {}, ", most by ", el("a", { href: "#", "data-feature": carrier }, carrier)),
        value === null ? "" : ` (${name === "decoupled" ? "written" : "driven"} ${number(value)} [${number(low)}, ${number(high)}] of the largest block)`, k + 1 < line.zero.length ? "; " : "."))) : null;
    const like = line.likeness ? `; similar to itself under ${line.likeness[0]} by ${number(line.likeness[1])} [${number(line.likeness[2])}, ${number(line.likeness[3])}]` : "";
    const wheel = el("span", { class: "wheel-small" });
    if (atlas.symmetry) atlas.symmetry.polar(line.part, line.feature).then((picture) => wheel.append(picture));
    return claim(line.anchor, [statement], `q ${number(line.q)} at a false discovery rate of ${percent(line.fdr)}; noise ceiling ${number(line.ceiling)}${like}.`, line.claimed, wheel, others, zero);
  }

  // Response to a stimulus in each orientation: up is its first pose, to the left it is turned counter-clockwise.
  function dial(t) {
    const n = t.curve.length, place = (v, k) => [60 - 52 * v * Math.sin((2 * Math.PI * k) / n), 60 - 52 * v * Math.cos((2 * Math.PI * k) / n)];
    const degrees = (k) => `${number((360 * k) / n)}°`, points = (values) => values.map((v, k) => place(v, k).join(",")).join(" ");
    const title = [...t.curve.map((v, k) => `${degrees(k)}: ${number(v)}`), ...t.mirrored.map((v, k) => `mirrored, ${degrees(k)}: ${number(v)}`), ...t.oriented_curve.map((v, k) => `any ${t.oriented}, ${degrees(k)}: ${number(v)}`)].join("\n");
    return svg("svg", { viewBox: "0 0 120 120", role: "img", "aria-label": "response to the stimulus in every orientation" },
      svg("g", { class: "polar" }, svg("title", {}, title),
        svg("circle", { cx: 60, cy: 60, r: 52, class: "rim" }), svg("circle", { cx: 60, cy: 60, r: 26, class: "rim faint" }),
        svg("polygon", { points: points(t.oriented_curve), class: "beside" }),
        svg("polygon", { points: points(t.curve), style: "--c: var(--accent)" }),
        ...t.mirrored.map((v, k) => svg("circle", { cx: place(v, k)[0], cy: place(v, k)[1], r: 2.6, class: "mirror", style: "--c: var(--accent)" }))));
  }

  // The stimulus in the pose with the largest response.
  function stimulus(t) {
    const angle = 360 * Math.max(0, t.curve.indexOf(1)) / t.curve.length, mirrored = !t.curve.includes(1);
    const turned = mirrored ? 360 * Math.max(0, t.mirrored.indexOf(1)) / t.curve.length : angle;
    const canvas = el("canvas", { class: "stimulus", width: 96, height: 96, role: "img", "aria-label": t.name, title: t.name, style: `transform: rotate(${-turned}deg)${mirrored ? " scaleX(-1)" : ""}` });
    atlas.image("symmetry", "stimuli").then((sheet) => {
      canvas.getContext("2d").drawImage(sheet, t.picture * sheet.height, 0, sheet.height, sheet.height, 0, 0, 96, 96);
      canvas.dataset.drawn = "yes";
    });
    return canvas;
  }

  function stimuli(t) {
    if (!t.name) return claim(t.anchor, "Responds to no synthetic stimulus", `${number(t.n_images)} images were shown.`, false);
    const span = ([, value, low, high]) => `${number(value)} [${number(low)}, ${number(high)}]`;
    const repeats = t.period < 360, same = t.mirror && t.mirror[2] > t.support;
    const says = [`Responds most to ${t.name}.`, repeats ? `Responds alike every ${number(t.period)}°.` : t.turn ? "Not shown to respond alike before 360°." : "",
      same ? `Alike in a mirror with its axis at ${number(t.mirror[0])}°.` : t.mirror ? "Not shown to be mirror-symmetric." : ""];
    const rests = [t.turn ? `after ${number(t.turn[0])}° ${span(t.turn)}` : "", t.mirror ? `in the surest of ${t.n_mirrors} mirrors (axis at ${number(t.mirror[0])}°) ${span(t.mirror)}` : ""].filter(Boolean).join(", ");
    const others = [t.claimed ? ` Under the stabilizer claimed from its blocks ${span(t.claimed)}.` : "", t.chance === null ? "" : ` Random pairs of features in their best pose: ${number(t.chance)}.`].join("");
    return claim(t.anchor, says.filter(Boolean).join(" "),
      `Correlation of responses to ${number(t.n_images)} images with those to the same images posed: ${rests}; 95% intervals over stimuli, shown above ${number(t.support)}.${others} Largest response ${number(t.response)}; relative to it ${t.kinds.map(([kind, value]) => `${kind} ${number(value)}`).join(", ")}.`,
      repeats || same, el("span", { class: "wheel-small" }, dial(t), t.picture < 0 ? null : stimulus(t),
        el("span", { class: "caption" }, `Response by orientation, turned counter-clockwise from the top; dashed: the largest to any ${t.oriented}. Beside it the stimulus in its best pose.`)));
  }

  function branches(d, lines) {
    return lines.map((b) => {
      const k = Math.max(0, d.branches.indexOf(b.branch)), share = b.share ?? 0;
      const bar = el("span", { class: "share", title: `share ${number(b.share)}, expected ${number(b.expected)}` },
        el("span", { class: `fill ${atlas.swatch(k)}`, style: `width:${(100 * share).toFixed(1)}%` }),
        el("span", { class: "tick", style: `left:${(100 * b.expected).toFixed(1)}%` }));
      const measured = [b.ablation === null ? "" : `; lost without it ${number(b.ablation)}`, b.activation === null ? "" : `; of its activation ${number(b.activation)}`].join("");
      return claim(b.anchor, [el("span", {}, b.significant ? `Specialized to ${b.branch}` : b.branch), bar, el("span", { class: "n" }, number(b.share))],
        `Expected by chance ${number(b.expected)}; q ${number(b.q)} at a false discovery rate of ${percent(b.fdr)}${measured}.`, b.significant);
    });
  }

  async function match(m) {
    const other = await cards.mention(...m.other, m.name, 3);
    return claim(m.anchor, other, `${m.matched ? "Matched" : "Could be chance"}: cosine ${number(m.cosine)}, q ${number(m.q)} at a false match rate of ${percent(m.fdr)}.`, m.matched);
  }

  async function track(t) {
    const steps = await Promise.all(t.steps.map(async ([name, run, latent]) =>
      el("li", {}, latent === null ? el("span", { class: "faint" }, `${name} –`) : await cards.mention(run, latent, name, 1))));
    return claim(t.anchor, el("ol", { class: "track" }, ...steps), `Mean cosine ${number(t.cosine)}; may reach from ${t.earliest} to ${t.latest}.`);
  }

  async function circuit(c) {
    const other = await cards.mention(...c.other, c.name, 3);
    const [effect, low, high] = c.effect;
    const lost = effect === null ? "its ablation was not measured" : `ablating it takes ${number(effect)} [${number(low)}, ${number(high)}]`;
    return claim(c.anchor, [cards.kernel(c.kernel, 56), el("span", {}, c.into ? "from " : "to ", other, ` by ${c.branch}`)],
      `${c.significant ? "Significant" : "Not significant"}: q ${number(c.q)} at ${percent(c.fdr)}; contribution ${number(c.contribution)}, all branches of the pair together ${percent(c.share)} of all contributions; ${lost}.`, c.significant);
  }

  function logits(line) {
    const row = (title, words) => el("div", { class: "says words" }, el("span", { class: "faint" }, title),
      ...words.map(([word, effect]) => el("span", { class: "word", title: `${number(effect)} for one unit of activation` }, word.replaceAll("\n", "↵"))));
    const sure = [line.q_raises, line.q_lowers].some((q) => q !== null && q <= line.fdr);
    return claim(line.anchor, [], `${sure ? "Not by chance" : "Could be chance"}: against ${number(line.n_random)} random directions of the same norm, q ${number(line.q_raises)} for the largest rise, ${number(line.q_lowers)} for the largest fall, at a false discovery rate of ${percent(line.fdr)}. Largest rise ${number(line.raises[0]?.[1])}.`,
      sure, row("raises", line.raises), row("lowers", line.lowers));
  }

  async function flow(f) {
    const from = f.before ? el("span", {}, "from ", await cards.mention(...f.before, f.before_name)) : null;
    const written = f.module ? el("span", {}, "written by ", await cards.mention(...f.module, f.module_name)) : null;
    const links = [f.before ? `previous layer: cosine ${number(f.cosine)}, q ${number(f.q)}` : `nearest in the previous layer: cosine ${number(f.cosine)}, q ${number(f.q)}`,
      f.module ? `module: cosine ${number(f.module_cosine)}, q ${number(f.module_q)}` : "no module is matched"];
    return claim(f.anchor, [`${f.origin[0].toUpperCase()}${f.origin.slice(1)}`, from, written].filter(Boolean),
      `At a false match rate of ${percent(f.fdr)}; ${links.join("; ")}. On its track since ${f.since}; the probability that one of its links is wrong is at most ${percent(f.wrong)}.`, f.origin !== "unexplained");
  }

  // Claims of every analysis that was run on this dictionary.
  async function claims(d, i) {
    const { record } = d.row(i);
    const of = (kind) => record[kind] ?? [];
    const [before, after] = [false, true].map((way) => of("matches").filter((m) => m.after === way));
    const [into, out] = [true, false].map((way) => of("circuits").filter((c) => c.into === way));
    const groups = [
      ["Next tokens", of("logits").map(logits)],
      ["Symmetry", of("symmetry").map((s) => symmetry({ ...s, feature: i }))],
      ["Synthetic stimuli", of("stimuli").map(stimuli)],
      ["Branches", branches(d, of("branches"))],
      ["Origin", await Promise.all(of("flow").map(flow))],
      ["Comes from", await Promise.all(before.map(match))],
      ["Goes to", await Promise.all(after.map(match))],
      ["Life line", await Promise.all(of("tracks").map(track))],
      ["Circuits in", await Promise.all(into.map(circuit))],
      ["Circuits out", await Promise.all(out.map(circuit))],
    ];
    const made = groups.filter(([, lines]) => lines.length).map(([title, lines]) => part(title, "", ...lines));
    const asked = new Set(Object.keys(record));
    const missing = [["matches", "match"], ["symmetry", "symmetry"], ["branches", "branches"], ["circuits", "circuit"], ...(d.kind === "text" ? [["logits", "effects"]] : [])]
      .filter(([kind]) => !asked.has(kind)).map(([, command]) => `mechatlas ${command}`);
    if (missing.length) made.push(el("p", { class: "caption" }, `Nothing here from ${missing.join(", ")}: not run on this dictionary, or no line for this feature.`));
    return made;
  }

  function neighbors(d, i, showHeat) {
    const list = el("div", { class: "neighbors" }), { near, cosine: cosines } = d.row(i);
    d.need(near.filter((other) => other >= 0));
    for (let k = 0; k < near.length; k++) {
      const other = near[k], cosine = cosines[k];
      if (other < 0) break;
      const item = el("a", { href: cards.link(d, other), "data-feature": other, class: cosine > d.chance ? null : "chance" },
        el("b", {}, String(other)), el("span", { class: "n" }, cosine.toFixed(2)));
      if (d.kind === "image") item.append(cards.exampleList(d, other, 3, 40, showHeat));
      else {
        const name = el("span", { class: "name" });
        d.need([other]).then(() => { name.textContent = labels.of(d, other).name || cards.peakWord(d, other); });
        item.append(name);
      }
      list.append(item);
    }
    return list.children.length ? list : el("p", { class: "empty" }, "none");
  }

  // Everything that the page knows of a feature, as plain values.
  function plain(d, i) {
    const { slot, place, value, near, cosine, record } = d.row(i);
    const one = (rank) => ({ sample: d.names[slot[rank]], position: [place[2 * rank], place[2 * rank + 1]], activation: value[rank] });
    return {
      dictionary: d.run, site: d.site, feature: i, ...labels.of(d, i),
      density: d.density[i], max: d.max[i], mean: d.mean[i], rows: d.rows,
      branches: Object.fromEntries(d.branches.map((b, k) => [b, { share: d.shares[i * d.branches.length + k], expected: d.expected[k] }])),
      strongest: cards.ranksOf(d, i).map(one), quantiles: cards.ranksOf(d, i, "quantiles").map(one),
      nearest: Array.from(near, (feature, k) => ({ feature, cosine: cosine[k] })).filter(({ feature }) => feature >= 0),
      claims: record,
    };
  }

  function detail(d, i, showHeat) {
    const read = d.rows < d.allRows ? `${number(d.rows)} of ${number(d.allRows)} rows` : `all ${number(d.rows)} rows`;
    const bars = d.has.branches ? null : cards.branchBars(d, i, true);
    const said = el("div", { class: "columns claims" });
    claims(d, i).then((made) => { said.replaceChildren(...made); said.dataset.ready = "yes"; });
    return [
      labels.form(d, i),
      examples(d, i, showHeat),
      paintings(d, i),
      el("div", { class: "columns" },
        part("Activations", `Measured on ${read} of the store. Bars: number of rows by activation, with ratios across and square roots up; the first bar holds everything weaker.`, cards.facts(d, i), d.density[i] > 0 ? cards.histogram(d, i) : null),
        bars ? part("Branches", "Norm of the atom’s positive part inside each branch, relative to its whole norm. The tick is the share expected from the branch’s width. A description, not a test: “mechatlas branches” tests it.", bars) : null,
        part("Nearest features", `Cosine of decoder rows, among features that are ever active. One shuffled atom in a hundred reaches ${number(d.chance)}; fainter ones are below that.${d.recall < 1 ? ` The search is approximate: it found ${percent(d.recall)} of the nearest of features drawn at random.` : ""}`, neighbors(d, i, showHeat))),
      said,
    ];
  }

  return { detail, plain };
})();
