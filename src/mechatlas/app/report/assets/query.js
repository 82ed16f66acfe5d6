// Which features a search means, and in which order they come.
"use strict";

const query = (() => {
  // Numbers that can be compared and sorted by: name -> value of feature i.
  function numbers(d) {
    const found = new Map([
      ["density", (i) => d.density[i]],
      ["max", (i) => d.max[i]],
      ["mean", (i) => d.mean[i]],
    ]);
    d.branches.forEach((name, b) => found.set(name, (i) => d.shares[i * d.branches.length + b]));
    const best = (i, after) => Math.max(0, ...record(d, i, "matches").filter((m) => m.after === after).map((m) => m.cosine));
    if (d.has.matches) {
      for (const [name, after] of [["match", true], ["origin", false]]) found.set(name, (i) => best(i, after));
    }
    return found;
  }

  // The branch that writes most of an atom, compared with what its width predicts.
  function nearestBranch(d, i) {
    let best = -1, most = 0;
    for (let b = 0; b < d.branches.length; b++) {
      const ratio = d.shares[i * d.branches.length + b] / d.expected[b];
      if (ratio > most) [best, most] = [b, ratio];
    }
    return best;
  }

  const comparisons = {
    ">": (a, b) => a > b, ">=": (a, b) => a >= b,
    "<": (a, b) => a < b, "<=": (a, b) => a <= b,
    "=": (a, b) => Math.abs(a - b) <= 1e-6 * Math.abs(b),
  };
  const active = (d) => (i) => d.density[i] > 0;
  const record = (d, i, kind) => d.records[i]?.[kind] ?? [];
  const includes = (text, word) => text.toLowerCase().includes(word);

  // Words that stand for a test of their own.
  const keywords = {
    active: active, alive: active,
    inactive: (d) => (i) => !(d.density[i] > 0), dead: (d) => (i) => !(d.density[i] > 0),
    named: (d) => (i) => !!labels.of(d, i).name,
    matched: (d) => (i) => record(d, i, "matches").some((m) => m.matched),
    specialized: (d) => (i) => record(d, i, "branches").some((b) => b.significant),
    symmetric: (d) => (i) => record(d, i, "symmetry").some((s) => s.claimed),
    circuit: (d) => (i) => record(d, i, "circuits").some((c) => c.significant),
  };

  // What can stand before a colon: kind:word.
  const kinds = {
    branch: (d, word) => (i) => d.density[i] > 0 && nearestBranch(d, i) === d.branches.findIndex((b) => b.toLowerCase() === word),
    class: (d, word) => (i) => record(d, i, "symmetry").some((s) => includes(s.name, word)),
    family: (d, word) => (i) => record(d, i, "symmetry").some((s) => String(s.family) === word),
    label: (d, word) => (i) => includes(`${labels.of(d, i).name ?? ""} ${labels.of(d, i).note ?? ""}`, word),
    origin: (d, word) => (i) => record(d, i, "flow").some((f) => includes(f.origin, word)),
    raises: (d, word) => (i) => record(d, i, "logits").some((l) => l.raises.some(([token]) => includes(token, word))),
    lowers: (d, word) => (i) => record(d, i, "logits").some((l) => l.lowers.some(([token]) => includes(token, word))),
    token: (d, word) => inSet(d, () => byWord(d), word, "token"),
    file: (d, word) => inSet(d, () => bySample(d), word, "file"),
  };

  const remembered = new WeakMap();
  function remember(d, name, make) {
    if (!remembered.has(d)) remembered.set(d, {});
    return (remembered.get(d)[name] ??= make());
  }

  // Text -> features, of the samples among the examples and of the words that they are active on.
  function index(d, add) {
    const found = new Map();
    for (let i = 0; i < d.n; i++) {
      add(i, (text) => {
        if (!found.has(text)) found.set(text, new Set());
        found.get(text).add(i);
      });
    }
    return found;
  }
  const bySample = (d) => remember(d, "files", () => index(d, (i, put) => {
    for (let k = 0; k < d.shown; k++) {
      const slot = d.slot[i * d.shown + k];
      if (slot >= 0) put(d.names[slot].toLowerCase());
    }
  }));
  const byWord = (d) => remember(d, "words", () => (d.kind !== "text" ? new Map() : index(d, (i, put) => {
    const n = d.heat_shape[0];
    for (let k = 0; k < d.shown; k++) {
      const at = i * d.shown + k, slot = d.slot[at];
      if (slot < 0) continue;
      for (let t = 0, begin = d.first[2 * at]; t < n; t++) {
        if (!d.heat[at * n + t]) continue;
        const [first, last] = cards.wordAround(d, slot, begin + t);
        put(cards.spelled(d, slot, first, last).trim().toLowerCase());
      }
    }
  })));

  // Of a served page, the lists of features by word or file that a search asks for.
  const lists = { token: ["words", (d) => d.words ?? []], file: ["files", (d) => d.names] };
  async function fetchList(d, kind, word) {
    const [name, keysOf] = lists[kind], key = `${kind}:${word}`;
    d.listed ??= new Map();
    if (d.listed.has(key) || !atlas.has("features", `${d.index}/${name}.at`)) return;
    const at = await atlas.array("features", `${d.index}/${name}.at`), features = await atlas.pieces("features", `${d.index}/${name}.feature`);
    const wanted = new Uint8Array(d.n), found = [];
    keysOf(d).forEach((text, k) => { if (text.trim().toLowerCase().includes(word) && at[k + 1] > at[k]) found.push(k); });
    for (const k of found) await features.load(at[k], at[k + 1]);
    for (const k of found) for (const i of features.values.subarray(at[k], at[k + 1])) wanted[i] = 1;
    d.listed.set(key, wanted);
  }

  // Fetch what a search and an order of a served page need.
  async function prepare(text, by, d) {
    const words = wordsOf(text).map((word) => word.replace(/^-/, "").toLowerCase());
    const ofClaims = (word) => ["match", "origin"].includes(word.split(/[<>=]/)[0]) || ["matched", "specialized", "symmetric", "circuit"].includes(word)
      || /^(class|family|raises|lowers|origin):/.test(word);
    const plain = words.filter((word) => !/^[\d.-]+$|[<>=]/.test(word) && !Object.hasOwn(keywords, word) && word !== "or");
    if (words.some(ofClaims) || ["match", "origin"].includes(by) || (d.has.symmetry && plain.length)) await d.needClaims();
    for (const word of plain) {
      const [kind, rest] = /^(token|file):/.test(word) ? [word.split(":")[0], word.slice(word.indexOf(":") + 1)] : [null, word];
      for (const each of kind ? [kind] : ["token", "file"]) await fetchList(d, each, rest);
    }
  }

  function inSet(d, texts, word, kind) {
    if (d.piece) { const found = d.listed?.get(`${kind}:${word}`); return (i) => found?.[i] === 1; }
    const wanted = new Uint8Array(d.n);
    for (const [text, features] of texts()) if (text.includes(word)) for (const i of features) wanted[i] = 1;
    return (i) => wanted[i] === 1;
  }

  function compare(word, d) {
    const comparison = /^([^<>=]+)(>=|<=|>|<|=)([^<>=]*)$/.exec(word);
    if (!comparison) return null;
    const [, name, operator, written] = comparison;
    const value = numbers(d).get(name), limit = /^(-?[\d.]+(?:e[+-]?\d+)?)(%?)$/i.exec(written);
    if (!value) throw new Error(`There is no number “${name}”. There are ${[...numbers(d).keys()].join(", ")}.`);
    if (!limit || !Number.isFinite(Number(limit[1]))) throw new Error(`“${word}” needs a number after ${operator}, such as ${name}${operator}0.01.`);
    return (i) => comparisons[operator](value(i), Number(limit[1]) / (limit[2] ? 100 : 1));
  }

  function compile(word, d) {
    if (word.length > 1 && word.startsWith("-")) {
      const test = compile(word.slice(1), d);
      return (i) => !test(i);
    }
    const range = /^(\d+)(?:-|\.\.)(\d+)$/.exec(word);
    if (range) return (i) => i >= Number(range[1]) && i <= Number(range[2]);
    if (/^\d+$/.test(word)) return (i) => i === Number(word);
    const compared = compare(word, d);
    if (compared) return compared;
    const low = word.toLowerCase();
    if (Object.hasOwn(keywords, low)) return keywords[low](d);
    const [kind, ...rest] = low.split(":");
    if (rest.length && /^\w+$/.test(kind)) {
      if (Object.hasOwn(kinds, kind)) return kinds[kind](d, rest.join(":"));
      if (d.kind !== "text") throw new Error(`“${kind}:” is not known. There are ${Object.keys(kinds).map((k) => `${k}:`).join(", ")}.`);
    }
    if (d.branches.some((b) => b.toLowerCase() === low)) return kinds.branch(d, low);
    const tests = ["label", "class", "token", "file"].map((name) => kinds[name](d, low));
    return (i) => tests.some((test) => test(i));
  }

  function wordsOf(text) {
    const joined = text.replace(/\s*(>=|<=|>|<|=)\s*(?=[\d.-])/g, "$1");
    return [...joined.matchAll(/-?(?:\w+:)?"[^"]*"|\S+/g)].map((m) => m[0].replaceAll('"', "")).filter((w) => w && w.toLowerCase() !== "and");
  }

  // All words must hold; “or” separates alternatives. What finds nothing is named.
  function select(text, d) {
    const alternatives = [[]];
    for (const word of wordsOf(text)) {
      if (word.toLowerCase() === "or") alternatives.push([]);
      else alternatives.at(-1).push([word, compile(word, d)]);
    }
    const found = [];
    for (let i = 0; i < d.n; i++) if (alternatives.some((tests) => tests.every(([, test]) => test(i)))) found.push(i);
    if (found.length) return { found, note: "" };
    const every = Array.from({ length: d.n }, (_, i) => i);
    const empty = alternatives.flat().filter(([, test]) => !every.some(test)).map(([word]) => `“${word}”`);
    const shown = d.kind === "text" ? "no label, word or file name among the examples" : "no label, class, branch or file name among the examples";
    return { found, note: empty.length ? `${empty.join(", ")}: ${shown} has it, and it is no number or keyword.` : "Each word finds some features, but none has all of them." };
  }

  // The same shuffle on every visit: a fair sample to look at, and one that can be cited.
  function shuffled(n) {
    const order = Float64Array.from({ length: n }, (_, i) => {
      let h = Math.imul(i + 1, 0x9e3779b1);
      h = Math.imul(h ^ (h >>> 15), 0x85ebca6b);
      h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
      return (h ^ (h >>> 16)) >>> 0;
    });
    return (i) => order[i];
  }

  // Features that are never active come last, whatever the order.
  function sort(found, by, rising, d) {
    const value = by === "shuffled" ? shuffled(d.n) : numbers(d).get(by) || ((i) => i);
    const keys = Float64Array.from({ length: d.n }, (_, i) => value(i)), sign = rising ? 1 : -1;
    const asleep = (i) => (d.density[i] > 0 ? 0 : 1);
    return found.sort((a, b) => asleep(a) - asleep(b) || sign * (keys[a] - keys[b]) || a - b);
  }

  const warm = (d) => { bySample(d); byWord(d); };
  return { numbers, nearestBranch, select, sort, warm, prepare };
})();
