// The ground that every chapter stands on: its data, arrays, pictures and figures.
"use strict";

const atlas = (() => {
  const chapters = JSON.parse(document.getElementById("chapters").textContent);
  const kinds = {
    uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array,
    uint32: Uint32Array, int32: Int32Array, float32: Float32Array, float64: Float64Array,
  };

  function bytesOf(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }

  async function unpack(text) {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  // Remember promises, so that nothing is decoded twice, and free the text once decoded.
  function once(make) {
    const made = new Map();
    return (key) => {
      if (!made.has(key)) made.set(key, make(key));
      return made.get(key);
    };
  }

  function takeText(selector) {
    const element = document.querySelector(selector);
    if (!element) throw new Error(`The page has no ${selector}.`);
    const text = element.textContent;
    element.textContent = "";
    return [element, text];
  }

  // A served page fetches its parts when they are needed; one file has them inside.
  async function bytesAt(element) {
    const answer = await fetch(element.dataset.src);
    if (!answer.ok) throw new Error(`The server has no ${element.dataset.src}; is it still running?`);
    return answer.arrayBuffer();
  }

  const array = once(async (name) => {
    const [element, text] = takeText(`[data-array="${CSS.escape(name)}"]`);
    const shape = element.dataset.shape.split(",").filter(Boolean).map(Number);
    const values = new kinds[element.dataset.dtype](await (element.dataset.src ? bytesAt(element) : unpack(text)));
    return Object.assign(values, { shape });
  });

  // Bytes from..to of a part that lies outside the page.
  async function rangeOf(src, from, to) {
    if (to <= from) return new ArrayBuffer(0);
    const answer = await fetch(src, { headers: { Range: `bytes=${from}-${to - 1}` } });
    if (answer.status !== 206) throw new Error(`The server has no bytes ${from} to ${to} of ${src}; is it still running?`);
    return answer.arrayBuffer();
  }

  // An array of a served page, of which entries from..to are fetched when they are needed; null in one file.
  function ranges(chapter, name) {
    const element = document.querySelector(`[data-array="${CSS.escape(`${chapter}/${name}`)}"]`);
    if (!element?.dataset.src) return null;
    const { src, shape, dtype, layout } = element.dataset, kind = kinds[dtype], size = kind.BYTES_PER_ELEMENT;
    return {
      shape: shape.split(",").map(Number), layout: layout ? JSON.parse(layout) : null,
      read: async (from, to) => new kind(await rangeOf(src, from * size, to * size)),
    };
  }

  const image = once(async (name) => {
    const [element, text] = takeText(`[data-image="${CSS.escape(name)}"]`);
    const bytes = element.dataset.src ? await bytesAt(element) : bytesOf(text);
    return createImageBitmap(new Blob([bytes], { type: "image/webp" }));
  });

  // A script from an address is compiled beside the main thread.
  const plotly = once(async () => {
    const script = document.createElement("script"), code = await unpack(takeText("#plotly")[1]);
    script.src = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
    document.head.append(script);
    await new Promise((done) => { script.onload = done; });
    URL.revokeObjectURL(script.src);
    return window.Plotly;
  });

  // Elements are built, never parsed from strings, so no name can become markup.
  function el(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child != null));
    return element;
  }

  function svg(tag, attributes = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
    element.append(...children.filter((child) => child != null));
    return element;
  }

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const categories = Number(color("--categories"));
  const category = (number) => `--branch-${number % categories}`, swatch = (number) => `c${number % categories}`;

  // Three digits, as people write them.
  function number(value) {
    if (value == null || !Number.isFinite(value)) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size >= 100) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    return size >= 1e-3 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  }
  function percent(value) {
    if (value == null || !Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size < 1e-6) return "0%";
    if (size < 0.0005) return `${number(Number((100 * value).toPrecision(1)))}%`;
    return `${(100 * value).toFixed(size >= 0.0995 && size <= 0.99 ? 0 : 1).replace(/\.0$/, "")}%`;
  }

  // ---- figures -------------------------------------------------------------------------

  // Colors are named in figures, and follow the theme.
  function colored(value) {
    if (typeof value === "string") return value.replace(/^var\((--[\w-]+)\)/, (_, name) => color(name));
    if (Array.isArray(value)) return typeof value[0] === "number" && value.length > 4 ? value : value.map(colored);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, colored(each)]));
  }

  function themed(layout) {
    const line = color("--line"), ink = color("--soft");
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    const own = layout || {};
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "inherit", size: 12, color: ink },
      margin: { l: 44, r: 12, t: 8, b: 38 },
      colorway: Array.from({ length: categories }, (_, k) => color(category(k))),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, itemsizing: "constant" },
      hoverlabel: { font: { family: "inherit" } },
      ...own,
      xaxis: { ...axis, ...own.xaxis },
      yaxis: { ...axis, ...own.yaxis },
    };
  }

  async function draw(element) {
    const { data, layout } = colored(chapters[element.dataset.chapter].figures[element.dataset.figure]);
    const Plotly = await plotly();
    const few = data.length === 2 || data.length === 3;  // so many names fit into a small figure
    const small = element.classList.contains("tiny") ? { showlegend: few && layout?.showlegend !== false, margin: { l: 30, r: 8, t: 6, b: 24 } } : {};
    await Plotly.react(element, data, themed({ ...layout, ...small }), { responsive: true, displaylogo: false, displayModeBar: false });
    element.dataset.drawn = "yes";
  }

  // Work that takes a while waits for a moment in which nobody scrolls.
  let scrolled = 0;
  addEventListener("scroll", () => { scrolled = performance.now(); }, { passive: true });
  const waiting = [];
  let working = false;
  function rest(task) {
    waiting.push(task);
    if (!working) { working = true; setTimeout(work, 0); }
  }
  async function work() {
    if (document.readyState === "loading") {  // a task may need what a later script gives
      document.addEventListener("DOMContentLoaded", work, { once: true });
      return;
    }
    if (performance.now() - scrolled < 150) { setTimeout(work, 60); return; }
    const task = waiting.shift();
    if (!task) { working = false; return; }
    try { await task(); } finally { setTimeout(work, 0); }
  }

  // Small work, such as drawing a picture, is spread over frames.
  const small = [];
  function soon(task) {
    small.push(task);
    if (small.length === 1) requestAnimationFrame(frame);
  }
  function frame() {
    const until = performance.now() + 8;
    while (small.length && performance.now() < until) small.shift()();
    if (small.length) requestAnimationFrame(frame);
  }

  function whenSeen(element, then, margin = "300px") {
    const observer = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      then();
    }, { rootMargin: margin });
    observer.observe(element);
    return observer;
  }

  const drawn = [];
  for (const element of document.querySelectorAll("[data-figure]")) {
    element.dataset.chapter ||= element.closest(".chapter").id;
    element.setAttribute("role", "img");
    const caption = element.closest("figure")?.querySelector("h4, figcaption")?.textContent ?? "";
    element.setAttribute("aria-label", `Figure. ${caption}`);
    whenSeen(element, () => { drawn.push(element); rest(() => draw(element)); });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const element of drawn) rest(() => draw(element));
    document.dispatchEvent(new Event("theme"));
  });

  // ---- links ---------------------------------------------------------------------------

  // What lies above a target may unfold while the eye is on the way to it: the target is held at
  // its place until the reader moves.
  let held = null;
  const hold = () => {
    if (!held) return;
    const top = held.getBoundingClientRect().top - document.querySelector(".top").offsetHeight - 8;
    if (Math.abs(top) > 1) scrollBy({ top, behavior: "instant" });
  };
  function land(element) {
    held = element;
    hold();
  }
  const release = () => { held = null; };
  for (const event of ["wheel", "touchstart", "pointerdown", "keydown"]) addEventListener(event, release, { passive: true });
  new ResizeObserver(hold).observe(document.querySelector("main"));
  function followAnchor() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target?.closest("main")) land(target);
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && link.hash === location.hash) followAnchor();  // no hashchange comes of it
  });
  addEventListener("hashchange", followAnchor);
  history.scrollRestoration = "manual";
  setTimeout(followAnchor, 0);

  // ---- tables, files -------------------------------------------------------------------

  // A table that is cut off says so, and can be reached by keyboard.
  const overflow = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    const cut = target.scrollWidth > target.clientWidth + 1;
    target.classList.toggle("cut", cut);
    if (cut) { target.setAttribute("role", "region"); target.setAttribute("aria-label", `Table ${tables.indexOf(target) + 1} of ${target.closest(".chapter")?.id ?? "the page"}, scrolls sideways`); }
    else { target.removeAttribute("role"); target.removeAttribute("aria-label"); }
  }));
  const tables = [...document.querySelectorAll(".scroll")];
  tables.forEach((element) => { element.tabIndex = 0; overflow.observe(element); });

  function save(name, text, type = "application/json") {
    const url = URL.createObjectURL(new Blob([text], { type }));
    el("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const csv = (rows) => rows.map((row) => row.map((cell) => quoted(cell == null ? "" : String(cell))).join(",")).join("\n") + "\n";

  // Every table with numbers can be taken along.
  document.querySelectorAll(".scroll table").forEach((table) => {
    const chapter = table.closest(".chapter")?.id ?? "table";
    const rows = () => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim().replace(/\s+/g, " ")));
    table.closest(".scroll").after(el("p", { class: "export" },
      el("button", { type: "button", class: "link", onclick: () => save(`${chapter}.csv`, csv(rows()), "text/csv") }, "CSV"),
      el("button", { type: "button", class: "link", onclick: () => {
        const [head, ...body] = rows();
        save(`${chapter}.json`, JSON.stringify(body.map((row) => Object.fromEntries(row.map((cell, k) => [head[k] || `column ${k + 1}`, cell]))), null, 1));
      } }, "JSON")));
  });

  return {
    data: (chapter) => chapters[chapter].data,
    has: (chapter, name) => !!document.querySelector(`[data-array="${CSS.escape(`${chapter}/${name}`)}"]`),
    array: (chapter, name) => array(`${chapter}/${name}`),
    ranges, kinds,
    image: (chapter, name) => image(`${chapter}/${name}`),
    el, svg, color, category, categories, swatch, number, percent, whenSeen, rest, soon, land, save, csv,
  };
})();
