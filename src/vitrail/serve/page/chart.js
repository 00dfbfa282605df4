// Line charts.

import {make} from "./dom.js";

const WIDTH = 320, HEIGHT = 150, LEFT = 34, BOTTOM = 18, TOP = 6;

function shape(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

// lines: [[name, kind, xs, ys], ...]; points without a finite y are left out. unit: of x. mark: an x, or null.
export function drawChart(box, {lines, xs: [first, last], ys: [low, high], format, unit, label, mark = null}) {
  const x = value => LEFT + (value - first) / (last - first || 1) * (WIDTH - LEFT - 4);
  const y = value => TOP + (high - value) / (high - low || 1) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img", "aria-label": label});
  for (const value of [low, (low + high) / 2, high]) {
    svg.append(shape("line", {class: "axis", x1: LEFT, x2: WIDTH - 4, y1: y(value), y2: y(value)}));
    svg.append(shape("text", {x: LEFT - 5, y: y(value) + 4, "text-anchor": "end"}, format(value)));
  }
  svg.append(shape("text", {x: LEFT, y: HEIGHT - 3}, first), shape("text", {x: WIDTH - 4, y: HEIGHT - 3, "text-anchor": "end"}, last));
  svg.append(shape("text", {x: (LEFT + WIDTH - 4) / 2, y: HEIGHT - 3, "text-anchor": "middle"}, unit));
  const key = make("div", "key");
  for (const [name, kind, xs, ys] of lines) {
    const points = xs.map((value, i) => [value, ys[i]]).filter(([, value]) => Number.isFinite(value));
    const path = points.map(([px, py], i) => `${i ? "L" : "M"}${x(px).toFixed(1)},${y(py).toFixed(1)}`).join("");
    svg.append(shape("path", {class: `line ${kind}`, d: path || "M0,0"}));
    const entry = make("span");
    entry.append(make("i", kind), name);
    key.append(entry);
  }
  if (mark !== null) svg.append(shape("line", {class: "mark", x1: x(mark), x2: x(mark), y1: TOP, y2: HEIGHT - BOTTOM}));
  box.replaceChildren(svg, key);
}
