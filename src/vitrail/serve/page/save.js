// The current view as a PNG, and as one HTML file.

import {complain, percent} from "./dom.js";
import {METHODS} from "./view.js";

const SIDE = 480, GAP = 24, LINE = 30, TITLES = 70;

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const fileName = picture => (picture.name || picture.label || "picture").replace(/[^\w-]+/g, "-");

export function savePng(views, shared) {
  const style = getComputedStyle(document.documentElement), color = name => style.getPropertyValue(name).trim();
  const canvas = document.createElement("canvas"), shown = 5;
  canvas.width = views.length * (SIDE + GAP) + GAP;
  canvas.height = SIDE + TITLES + shown * LINE + 2 * GAP;
  const context = canvas.getContext("2d");
  context.fillStyle = color("--card");
  context.fillRect(0, 0, canvas.width, canvas.height);
  views.forEach((view, i) => drawView(context, view, shared, GAP + i * (SIDE + GAP), color, shown));
  canvas.toBlob(blob => download(blob, `${fileName(shared.picture)}-${views[0].method}.png`));
}

function drawView(context, view, shared, x, color, shown) {
  const text = (value, left, top, ink = "--ink", weight = 400, size = 16) => {
    context.fillStyle = color(ink);
    context.font = `${weight} ${size}px system-ui, sans-serif`;
    context.fillText(value, left, top);
  };
  const base = view.find(".base"), scale = SIDE / Math.max(base.width, base.height);
  const [width, height] = [base.width * scale, base.height * scale], {rows, columns} = view.model;
  context.imageSmoothingEnabled = false;
  context.drawImage(base, x, GAP, width, height);
  context.globalAlpha = shared.opacity;
  context.drawImage(view.find(".heat"), x, GAP, width, height);
  context.globalAlpha = 1;
  context.fillStyle = view.mean;
  for (const patch of view.hidden()) {
    context.fillRect(x + patch % columns * width / columns, GAP + Math.floor(patch / columns) * height / rows, width / columns, height / rows);
  }
  const now = view.changed ?? view.base, top = GAP + SIDE + 28;
  text(`${now[0].class}, ${percent(now[0].probability)}`, x, top, "--ink", 650, 20);
  text(`${METHODS[view.method][0]} for “${view.explained()}”, ${view.model.name}`, x, top + 24, "--soft", 400, 14);
  now.slice(0, shown).forEach((each, i) => {
    const y = GAP + SIDE + TITLES + i * LINE;
    text(each.class.slice(0, 16), x, y + 15);
    context.fillStyle = color("--line");
    context.fillRect(x + 130, y + 2, 260, 14);
    context.fillStyle = color(i ? "--bar" : "--accent");
    context.fillRect(x + 130, y + 2, 260 * each.probability, 14);
    text(percent(each.probability), x + 402, y + 15);
  });
}

// The server computes every method for it, which takes a few seconds.
export async function saveHtml(view, shared, button) {
  const {textContent} = button;
  Object.assign(button, {disabled: true, textContent: "Computing all maps …"});
  try {
    const page = await view.askPage();
    download(page, `${fileName(shared.picture)}.html`);
  } catch (error) {
    complain(error);
  } finally {
    Object.assign(button, {disabled: false, textContent});
  }
}
