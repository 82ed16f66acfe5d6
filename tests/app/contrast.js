// Texts whose contrast with what lies behind them is below AA of WCAG 2.1.
(() => {
  const parse = (text) => {
    const parts = text.match(/rgba?\(([^)]+)\)/) || text.match(/color\(srgb ([^)]+)\)/);
    if (!parts) return [0, 0, 0, 0];
    const v = parts[1].split(/[ ,/]+/).map(Number), unit = text.startsWith("color") ? 255 : 1;
    return [v[0] * unit, v[1] * unit, v[2] * unit, v[3] ?? 1];
  };
  const over = (a, b) => [0, 1, 2].map((k) => a[k] * a[3] + b[k] * (1 - a[3])).concat(1);
  const luminance = (color) => {
    const [r, g, b] = color.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = parse(getComputedStyle(document.body).backgroundColor), found = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || element.closest("script, style, noscript, [hidden], option, button:disabled")) continue;
    const style = getComputedStyle(element);
    if (!element.getBoundingClientRect().width || style.visibility === "hidden") continue;
    let back = [0, 0, 0, 0], opacity = 1;
    for (let parent = element; parent; parent = parent.parentElement) {
      const own = getComputedStyle(parent), color = parse(own.backgroundColor);
      opacity *= Number(own.opacity);
      if (back[3] < 1 && color[3] > 0) back = back[3] === 0 ? color : over(back, color);
    }
    back = over(back, paper);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [light, dark] = [luminance(over([...ink.slice(0, 3), ink[3] * opacity], back)), luminance(back)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (light + 0.05) / (dark + 0.05);
    if (ratio < (large ? 3 : 4.5)) found.add(`${element.tagName} ${element.className.baseVal ?? element.className}: ${text.slice(0, 30)} (${ratio.toFixed(2)})`);
  }
  return [...found];
})()
