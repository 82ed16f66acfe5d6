// The ground that every chapter stands on: its data, arrays, pictures and figures.
"use strict";

const atlas = (() => {
  const chapters = JSON.parse(document.getElementById("chapters").textContent);
  const kinds = {
    uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array,
    uint32: Uint32Array, int32: Int32Array, float32: Float32Array, float64: Float64Array,
  };

  function bytesOf(text) {
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

  const image = once(async (name) => {
    const [element, text] = takeText(`[data-image="${CSS.escape(name)}"]`);
    const bytes = element.dataset.src ? await bytesAt(element) : bytesOf(text);
    return createImageBitmap(new Blob([bytes], { type: "image/webp" }));
  });

  const plotly = once(async () => {
    const script = document.createElement("script");
    script.textContent = new TextDecoder().decode(await unpack(takeText("#plotly")[1]));
    document.head.append(script);
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

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const branchColor = (number) => color(`--branch-${number % 8}`);

  function number(value) {
    if (!Number.isFinite(value)) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size >= 100) return value.toLocaleString("en", { maximumFractionDigits: 1 });
    return size >= 1e-3 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  }

  function themed(layout) {
    const line = color("--line"), ink = color("--soft");
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    const own = layout || {};
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "inherit", size: 12, color: ink },
      margin: { l: 44, r: 12, t: 8, b: 38 },
      colorway: [0, 1, 2, 3, 4, 5, 6, 7].map(branchColor),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      hoverlabel: { font: { family: "inherit" } },
      ...own,
      xaxis: { ...axis, ...own.xaxis },
      yaxis: { ...axis, ...own.yaxis },
    };
  }

  const figures = new Map();

  async function draw(element, figure) {
    figures.set(element, figure);
    const Plotly = await plotly();
    const { data, layout } = typeof figure === "function" ? figure() : figure;
    await Plotly.react(element, data, themed(layout), { responsive: true, displaylogo: false, displayModeBar: false });
    element.dataset.drawn = "yes";
    return element;
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

  for (const element of document.querySelectorAll("[data-figure]")) {
    const name = element.closest(".chapter").id;
    whenSeen(element, () => draw(element, chapters[name].figures[element.dataset.figure]));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [element, figure] of figures) draw(element, figure);
    document.dispatchEvent(new Event("theme"));
  });

  return {
    data: (chapter) => chapters[chapter].data,
    array: (chapter, name) => array(`${chapter}/${name}`),
    image: (chapter, name) => image(`${chapter}/${name}`),
    el, color, branchColor, number, draw, whenSeen,
  };
})();
