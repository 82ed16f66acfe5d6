// Which features a search means, and in which order they come.
"use strict";

const query = (() => {
  const { number } = atlas;

  // Numbers that can be compared and sorted by: name -> value of feature i.
  function numbers(d) {
    const found = new Map([
      ["density", (i) => d.density[i]],
      ["max", (i) => d.max[i]],
      ["mean", (i) => d.mean[i]],
    ]);
    d.branches.forEach((name, b) => found.set(name, (i) => d.shares[i * d.branches.length + b]));
    for (const name of ["match", "origin"]) if (d[name]) found.set(name, (i) => d[name][i]);
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
  const includes = (text, word) => text.toLowerCase().includes(word);
  const set = (marks) => (i) => marks[i] === 1;

  // Features with a word of a kind that a test accepts.
  async function marked(d, kind, accepts) {
    const marks = new Uint8Array(d.n), list = await d.list(kind);
    if (!list) return set(marks);
    const numbers = [];
    list.words.forEach((word, k) => { if (accepts(word)) numbers.push(k); });
    for (const features of await list.of(numbers)) for (const i of features) marks[i] = 1;
    return set(marks);
  }

  function labeled(d, accepts) {
    const marks = new Uint8Array(d.n);
    for (const [i, label] of labels.all(d)) if (i < d.n && accepts(label)) marks[i] = 1;
    return set(marks);
  }

  // All words of a kind of each feature, with a space between them; undefined where there are none.
  async function words(d, kind) {
    const all = new Array(d.n), list = await d.list(kind);
    if (!list) return all;
    const found = await list.of(list.words.map((_, k) => k));
    found.forEach((features, k) => { for (const i of features) all[i] = all[i] === undefined ? list.words[k] : `${all[i]} ${list.words[k]}`; });
    return all;
  }

  // Words that stand for a test of their own.
  const active = (d) => (i) => d.density[i] > 0, inactive = (d) => (i) => !(d.density[i] > 0);
  const claimed = (name) => (d) => marked(d, "is", (word) => word === name);
  const keywords = {
    active, alive: active, inactive, dead: inactive,
    named: (d) => labeled(d, (label) => !!label.name),
    matched: claimed("matched"), specialized: claimed("specialized"), symmetric: claimed("symmetric"), circuit: claimed("circuit"),
  };

  // What can stand before a colon: kind:word.
  const equal = (kind) => (d, word) => marked(d, kind, (each) => each.toLowerCase() === word);
  const within = (kind) => (d, word) => marked(d, kind, (each) => includes(each, word));
  const kinds = {
    branch: (d, word) => {
      const b = d.branches.findIndex((name) => name.toLowerCase() === word);
      return (i) => d.density[i] > 0 && nearestBranch(d, i) === b;
    },
    class: within("class"), family: equal("family"), specialized: equal("specialized"), origin: within("origin"), stimulus: within("stimulus"),
    raises: within("raises"), lowers: within("lowers"), token: within("token"), file: within("file"),
    label: (d, word) => labeled(d, (label) => includes(`${label.name ?? ""} ${label.note ?? ""}`, word)),
  };

  const remembered = new WeakMap();
  function remember(d, name, make) {
    if (!remembered.has(d)) remembered.set(d, {});
    return (remembered.get(d)[name] ??= make());
  }

  // Text -> features, ascending, of the samples among the examples, or of the words that they are active on.
  function collect(d, add) {
    const found = new Map();
    for (let i = 0; i < d.n; i++) {
      add(i, (text) => {
        const features = found.get(text);
        if (!features) found.set(text, [i]);
        else if (features[features.length - 1] !== i) features.push(i);
      });
    }
    return found;
  }

  // The word at a token of a sample, in small letters; dictionaries of one gallery share them.
  function wordAt(d, slot, token) {
    const known = (d.gallery.wordsAt ??= new Array(d.tokens.length)), at = slot * d.length + token;
    return (known[at] ??= cards.spelled(d, slot, ...cards.wordAround(d, slot, token)).trim().toLowerCase());
  }

  const indexes = {
    file: (d) => {
      const names = d.names.map((name) => name.toLowerCase());
      return collect(d, (i, put) => {
        for (let k = 0; k < d.shown; k++) {
          const slot = d.arrays.slot[i * d.shown + k];
          if (slot >= 0) put(names[slot]);
        }
      });
    },
    token: (d) => (d.kind !== "text" ? new Map() : collect(d, (i, put) => {
      const n = d.heat_shape[0], { slot, first: begins, heat } = d.arrays;
      for (let k = 0; k < d.shown; k++) {
        const at = i * d.shown + k;
        if (slot[at] < 0) continue;
        for (let t = 0, begin = begins[2 * at]; t < n; t++) {
          if (heat[at * n + t]) put(wordAt(d, slot[at], begin + t));
        }
      }
    })),
  };
  const index = (d, kind) => remember(d, kind, () => indexes[kind](d));

  function compare(word, d) {
    const comparison = /^([^<>=]+)(>=|<=|>|<|=)([^<>=]*)$/.exec(word);
    if (!comparison) return null;
    const [, name, operator, written] = comparison;
    const value = numbers(d).get(name), limit = /^(-?[\d.]+(?:e[+-]?\d+)?)(%?)$/i.exec(written);
    if (!value) throw new Error(`There is no number “${name}”. There are ${[...numbers(d).keys()].join(", ")}.`);
    if (!limit || !Number.isFinite(Number(limit[1]))) throw new Error(`“${word}” needs a number after ${operator}, such as ${name}${operator}0.01.`);
    return (i) => comparisons[operator](value(i), Number(limit[1]) / (limit[2] ? 100 : 1));
  }

  async function compile(word, d) {
    if (word.length > 1 && word.startsWith("-")) {
      const test = await compile(word.slice(1), d);
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
    const tests = await Promise.all(["label", "class", "token", "file"].map((name) => kinds[name](d, low)));
    return (i) => tests.some((test) => test(i));
  }

  function wordsOf(text) {
    const joined = text.replace(/\s*(>=|<=|>|<|=)\s*(?=[\d.-])/g, "$1");
    return [...joined.matchAll(/-?(?:\w+:)?"[^"]*"|\S+/g)].map((m) => m[0].replaceAll('"', "")).filter((w) => w && w.toLowerCase() !== "and");
  }

  // All words must hold; “or” separates alternatives. What finds nothing is named.
  async function select(text, d) {
    const alternatives = [[]];
    for (const word of wordsOf(text)) {
      if (word.toLowerCase() === "or") alternatives.push([]);
      else alternatives.at(-1).push([word, await compile(word, d)]);
    }
    const found = [];
    for (let i = 0; i < d.n; i++) if (alternatives.some((tests) => tests.every(([, test]) => test(i)))) found.push(i);
    if (found.length) return { found, note: "" };
    const holds = (test) => { for (let i = 0; i < d.n; i++) if (test(i)) return true; return false; };
    const empty = alternatives.flat().filter(([, test]) => !holds(test)).map(([word]) => `“${word}”`);
    const shown = d.kind === "text" ? "no label, word or file name among the examples" : "no label, class, branch or file name among the examples";
    return { found, note: empty.length ? `${empty.join(", ")}: ${shown} has it, and it is no number or keyword.` : "Each word finds some features, but none has all of them." };
  }

  // The same shuffle on every visit: a fair sample to look at, and one that can be cited.
  function shuffled(i) {
    let h = Math.imul(i + 1, 0x9e3779b1);
    h = Math.imul(h ^ (h >>> 15), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return (h ^ (h >>> 16)) >>> 0;
  }

  // Features that are never active come last, whatever the order; equal ones by number. Keys are whole
  // numbers of 32 bits with the feature behind them, as floats that sort natively.
  function sort(found, by, rising, d) {
    const float = new Float32Array(1), bits = new Uint32Array(float.buffer), value = numbers(d).get(by), SPAN = 2 ** 21;
    if (d.n > SPAN) throw new Error(`Up to ${number(SPAN)} features can be sorted.`);
    const ordered = (v) => { float[0] = v; return bits[0] >>> 31 ? ~bits[0] >>> 0 : (bits[0] | 0x80000000) >>> 0; };
    const key = by === "shuffled" ? shuffled : value ? (i) => ordered(value(i)) : (i) => i;
    const part = (features) => {
      const keys = Float64Array.from(features, (i) => (rising ? key(i) : 0xffffffff - key(i)) * SPAN + i).sort();
      return Array.from(keys, (k) => k % SPAN);
    };
    const awake = [], asleep = [];
    for (const i of found) (d.density[i] > 0 ? awake : asleep).push(i);
    return part(awake).concat(part(asleep));
  }

  const warm = (d) => { index(d, "file"); index(d, "token"); };
  return { numbers, nearestBranch, select, sort, warm, index, words };
})();
