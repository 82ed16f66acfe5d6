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

  function compile(word, d) {
    const comparison = /^(.+?)(>=|<=|>|<|=)(-?[\d.]+(?:e[+-]?\d+)?)(%?)$/i.exec(word);
    if (comparison) {
      const value = numbers(d).get(comparison[1]);
      const limit = Number(comparison[3]) / (comparison[4] ? 100 : 1);
      if (!value || !Number.isFinite(limit)) {
        throw new Error(`“${word}”: there is no number “${comparison[1]}”. There are ${[...numbers(d).keys()].join(", ")}.`);
      }
      return (i) => comparisons[comparison[2]](value(i), limit);
    }
    const branch = d.branches.indexOf(word);
    if (branch >= 0) return (i) => d.density[i] > 0 && nearestBranch(d, i) === branch;
    if (/^\d+$/.test(word)) return (i) => i === Number(word);
    const range = /^(\d+)(?:-|\.\.)(\d+)$/.exec(word);
    if (range) return (i) => i >= Number(range[1]) && i <= Number(range[2]);
    if (word === "alive") return (i) => d.density[i] > 0;
    if (word === "dead") return (i) => !(d.density[i] > 0);
    return bySample(word, d);
  }

  function bySample(word, d) {
    const wanted = word.toLowerCase();
    const slots = new Set();
    d.names.forEach((name, slot) => { if (name.toLowerCase().includes(wanted)) slots.add(slot); });
    return (i) => {
      for (let k = 0; k < d.top; k++) if (slots.has(d.slot[i * d.top + k])) return true;
      return false;
    };
  }

  function select(text, d) {
    const words = [...text.matchAll(/"([^"]*)"|(\S+)/g)].map((m) => m[1] ?? m[2]).filter(Boolean);
    const tests = words.map((word) => compile(word, d));
    const found = [];
    for (let i = 0; i < d.n; i++) if (tests.every((test) => test(i))) found.push(i);
    return found;
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

  function sort(found, by, rising, d) {
    const value = by === "shuffled" ? shuffled(d.n) : numbers(d).get(by) || ((i) => i);
    const sign = rising ? 1 : -1;
    return found.sort((a, b) => sign * (value(a) - value(b)) || a - b);
  }

  return { numbers, nearestBranch, select, sort };
})();
