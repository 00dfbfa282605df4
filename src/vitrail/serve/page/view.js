// One model on the shared picture: the map on it, the patches to hide, the prediction.

import {ask, blobOf, encoded, latest} from "./api.js";
import {paint, paintRamp, range} from "./colors.js";
import {$, complain, fill, make, percent, say, short} from "./dom.js";

export const METHODS = {
  balanced: ["Balanced gradient", "What each patch or pixel adds to the score of “{}” (red) or takes from it (blue)."],
  occlusion: ["Occlusion", "How much the score of “{}” falls when patches are hidden."],
  shapley: ["Shapley values", "What each patch adds to the score of “{}”, on average over many orders of uncovering them."],
  relevance: ["Relevance", "Attention that raised the score of “{}”, accumulated through the layers."],
  rollout: ["Rollout", "Attention through all layers: where the information may come from; the same for every class."],
  attention: ["Attention", "The attention weights of one layer; the same for every class."],
  gradcam: ["Grad-CAM", "Patches whose features, before the last attention, raise the score of “{}”."],
  gradient_rollout: ["Gradient rollout", "Rollout with attention weighted by its gradient for “{}”."],
  integrated_gradients: ["Integrated gradients", "Gradients for “{}”, summed along the way from a blank picture to this one."],
};
export const CONTRASTS = ["balanced", "relevance", "gradcam", "gradient_rollout", "integrated_gradients", "occlusion", "shapley"];
const PIXELS = ["balanced", "integrated_gradients"];
const SLOW = ["occlusion", "shapley", "integrated_gradients"];
const PASSES = [130, 514, 1026], SHOWN = 5, IDLE = 300;
let views = 0;

export class View {
  // events: model(view), map(view), hide(indices, hidden), hover(view, index or null)
  constructor(shared, names, events) {
    Object.assign(this, {shared, events, method: "balanced", layer: null, answer: null, changed: null, number: ++views});
    this.root = $("view-template").content.firstElementChild.cloneNode(true);
    this.explain = latest(() => this.computeMap());
    this.predict = latest(() => this.computeChange());
    fill(this.find(".model"), names.map(name => [name, name]), names[0]);
    this.find(".model").addEventListener("change", event => this.useModel(event.target.value));
    this.find(".steps input").addEventListener("input", event => this.useStep(Number(event.target.value)));
    this.find(".layers input").addEventListener("input", event => {
      this.layer = Number(event.target.value);
      this.draw();
    });
    this.listenToCells();
  }

  find(selector) { return this.root.querySelector(selector); }

  async useModel(name) {
    this.wanted = name;
    try {
      const model = await ask(`models/${encoded(name)}`);
      if (this.wanted !== name) return;  // another one was chosen meanwhile
      this.model = model;
    } catch (error) {
      complain(error);
      return;
    }
    const {rows, columns, steps} = this.model;
    fill(this.find(".model"), [...this.find(".model").options].map(option => [option.value, option.value]), name);
    this.step = null;
    this.find(".steps").hidden = steps.length < 2;
    Object.assign(this.find(".steps input"), {max: steps.length, value: steps.length});
    say(this.find(".steps output"), "best");
    this.buildMethods();
    this.buildCells(rows, columns);
    this.events.model(this);
    this.refresh();
  }

  useStep(place) {
    this.step = this.model.steps[place] ?? null;
    say(this.find(".steps output"), this.step === null ? "best" : `step ${this.step}`);
    this.refresh();
  }

  useMethod(method) {
    this.method = method;
    this.layer = null;
    this.find(`input[value=${method}]`).checked = true;
    this.refresh();
  }

  buildMethods() {
    this.find(".methods").replaceChildren(...Object.entries(METHODS).map(([method, [title]]) => {
      const label = make("label"), input = make("input"), face = make("span", "", title);
      Object.assign(input, {type: "radio", name: `method-${this.number}`, value: method, checked: method === this.method});
      input.addEventListener("change", () => this.useMethod(method));
      const score = this.model.scores?.methods[method];
      if (score) {
        face.append(make("small", "", `${score.failures.length ? "✗" : "✓"} ${score.srg.toFixed(2)}`));
      }
      label.append(input, face);
      return label;
    }));
    const {scores} = this.model;
    say(this.find(".trust"), scores ? `${scores.trust} SRG: insertion minus deletion on ${scores.images} ${scores.split} images, higher is better; ✗ fails a test.` : "");
  }

  // ---- Asking the server ---------------------------------------------------------------------

  // What the map depends on.
  key() {
    const {picture, className, against, pixels} = this.shared;
    return [picture?.number, this.model?.name, this.step, this.method, className, against, pixels].join("|");
  }

  async ask(path, more = {}, signal = undefined) {
    const {picture} = this.shared, {name} = this.model, seen = picture.seen.get(name);
    const params = {model: name, step: this.step, top: 100, prepared: seen || picture.prepared ? 1 : "", seen: seen ? "" : 1, ...more};
    const answer = await ask(path, {params, body: seen?.blob ?? picture.blob, signal});
    if (answer.seen) picture.seen.set(name, {blob: blobOf(answer.seen.picture), box: picture.prepared ? [0, 0, 1, 1] : answer.seen.box});
    return answer;
  }

  async askPage() {
    const {picture} = this.shared;
    const params = {model: this.model.name, step: this.step, class: this.question().class, prepared: picture.prepared ? 1 : ""};
    return ask("page", {params, body: picture.blob, as: "blob"});
  }

  question() {
    const {className, against} = this.shared, {classes} = this.model;
    const known = name => (classes.includes(name) ? name : "");
    const resolution = PIXELS.includes(this.method) && !this.shared.pixels ? "patch" : "";
    return {method: this.method, resolution, class: known(className), against: CONTRASTS.includes(this.method) ? known(against) : ""};
  }

  // The picture or the question has changed.
  refresh() {
    if (!this.shared.picture || !this.model) return;
    clearTimeout(this.timer);
    if (!this.shared.picture.live) this.stop?.abort();  // cancel what is no longer needed
    if (this.shared.picture.live && SLOW.includes(this.method)) {
      this.predict();
      this.timer = setTimeout(this.explain, IDLE);
    } else {
      this.explain();
    }
  }

  async computeMap() {
    const key = this.key(), {picture} = this.shared;
    this.stop = new AbortController();
    try {
      for (const passes of this.method === "shapley" ? PASSES : [""]) {
        const answer = await this.ask("explain", {...this.question(), passes}, this.stop.signal);
        if (key !== this.key() && !(picture.live && this.shared.picture?.live)) return;
        Object.assign(this, {answer, base: answer.predictions, warning: answer.note ?? "", changed: null});
        await this.drawPicture(picture);
        complain(null);
        this.draw();
        this.events.map(this);
        if (key !== this.key()) return;
      }
      if (this.hidden().length) this.predict();
    } catch (error) {
      if (error.name !== "AbortError") complain(error);
    }
  }

  // The prediction without a new map: with hidden patches, or while a slow map has to wait.
  async computeChange() {
    const {picture} = this.shared, hidden = this.hidden();
    try {
      const {predictions, note = ""} = await this.ask("predict", {hide: hidden.join(",")});
      await this.drawPicture(picture);
      if (hidden.length) this.changed = predictions;
      else Object.assign(this, {base: predictions, warning: note, changed: null});
      this.drawBars();
    } catch (error) {
      complain(error);
    }
  }

  // ---- Hiding patches ------------------------------------------------------------------------

  // Hidden patches are numbered in the grid of the first view.
  hidden() {
    return [...this.cells.keys()].filter(patch => this.shared.hidden.has(this.toShared(patch)));
  }

  toShared(patch) {
    const {rows, columns} = this.model, [G, J] = this.shared.grid;
    const g = Math.floor((Math.floor(patch / columns) + .5) / rows * G), j = Math.floor((patch % columns + .5) / columns * J);
    return g * J + j;
  }

  showHidden() {
    if (!this.model) return;  // it is being loaded
    const hidden = new Set(this.hidden());
    this.cells.forEach((cell, i) => cell.setAttribute("aria-selected", String(hidden.has(i))));
    if (hidden.size) this.predict();
    else {
      this.changed = null;
      this.drawBars();
    }
  }

  buildCells(rows, columns) {
    const box = this.find(".cells"), built = [];
    box.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
    box.replaceChildren(...Array.from({length: rows}, (_, g) => {
      const row = make("div");
      row.setAttribute("role", "row");
      for (let j = 0; j < columns; j++) {
        const cell = make("div", "cell");
        cell.setAttribute("role", "gridcell");
        cell.setAttribute("aria-label", `Row ${g + 1}, column ${j + 1}`);
        cell.setAttribute("aria-selected", "false");
        cell.tabIndex = built.length ? -1 : 0;
        built.push(cell);
        row.append(cell);
      }
      return row;
    }));
    this.cells = built;
  }

  listenToCells() {
    const box = this.find(".cells");
    let painting = null;
    const patchAt = event => {
      const {left, top, width, height} = box.getBoundingClientRect(), {rows, columns} = this.model;
      const at = (value, count) => Math.max(0, Math.min(count - 1, Math.floor(value * count)));
      return at((event.clientY - top) / height, rows) * columns + at((event.clientX - left) / width, columns);
    };
    const apply = patch => this.events.hide([this.toShared(patch)], painting);
    box.addEventListener("pointerdown", event => {
      const patch = patchAt(event);
      box.setPointerCapture(event.pointerId);
      painting = !this.shared.hidden.has(this.toShared(patch));
      apply(patch);
    });
    box.addEventListener("pointermove", event => {
      const patch = patchAt(event);
      this.events.hover(this, patch);
      if (painting !== null && event.buttons) apply(patch);
    });
    box.addEventListener("pointerup", () => { painting = null; });
    box.addEventListener("pointerleave", () => this.events.hover(this, null));
    box.addEventListener("focusin", event => this.events.hover(this, this.cells.indexOf(event.target)));
    box.addEventListener("keydown", event => this.onKey(event));
  }

  onKey(event) {
    const from = this.cells.indexOf(event.target), {rows, columns} = this.model;
    const moves = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
    if (event.key === " ") {
      this.events.hide([this.toShared(from)], !this.shared.hidden.has(this.toShared(from)));
    } else if (event.key in moves) {
      const [down, right] = moves[event.key];
      const g = Math.max(0, Math.min(rows - 1, Math.floor(from / columns) + down));
      const j = Math.max(0, Math.min(columns - 1, from % columns + right));
      this.cells[from].tabIndex = -1;
      this.cells[g * columns + j].tabIndex = 0;
      this.cells[g * columns + j].focus();
    } else return;
    event.preventDefault();
  }

  // Mark a place of the picture, given as fractions; the same one in every view.
  link(x, y) {
    const {rows, columns} = this.model ?? {}, patch = x === null || !rows ? -1 : Math.floor(y * rows) * columns + Math.floor(x * columns);
    this.cells?.forEach((cell, i) => cell.classList.toggle("linked", i === patch));
    if (patch >= 0 && this.answer) say(this.find(".note"), `Row ${Math.floor(y * rows) + 1}, column ${Math.floor(x * columns) + 1}: ${short(this.valueAt(x, y))}`);
    else this.drawNote();
  }

  valueAt(x, y) {
    const map = this.map(), {rows, columns} = this.model;
    const down = map.length / rows, across = map[0].length / columns;  // a pixel map has several values a patch
    const g = Math.floor(y * rows) * down, j = Math.floor(x * columns) * across;
    return map.slice(g, g + down).flatMap(row => row.slice(j, j + across)).reduce((sum, value) => sum + value, 0);
  }

  // ---- Drawing -------------------------------------------------------------------------------

  map() {
    const {maps} = this.answer;
    return maps[Math.min(this.layer ?? maps.length, maps.length) - 1];
  }

  async drawPicture(picture) {
    const seen = picture.seen.get(this.model.name);
    if (!seen || this.drawn === seen) return;
    this.drawn = seen;
    const small = await createImageBitmap(seen.blob), base = this.find(".base");
    const image = picture.image ?? small, [left, top, right, bottom] = picture.image ? seen.box : [0, 0, 1, 1];
    const [height, width] = this.model.size, longest = image.width < 200 ? Math.max(height, width) * 8 : 640;
    base.width = Math.round(longest * Math.min(1, width / height));
    base.height = Math.round(longest * Math.min(1, height / width));
    const context = base.getContext("2d"), x = base.width / (right - left), y = base.height / (bottom - top);
    context.imageSmoothingEnabled = image.width >= 200;
    context.drawImage(image, -left * x, -top * y, x, y);
    const preview = this.find(".seen");
    Object.assign(preview, {width: small.width, height: small.height, hidden: picture.prepared});
    const pixels = preview.getContext("2d", {willReadFrequently: true});
    pixels.drawImage(small, 0, 0);
    const {data} = pixels.getImageData(0, 0, small.width, small.height), sums = [0, 0, 0];
    data.forEach((value, i) => { if (i % 4 < 3) sums[i % 4] += value; });
    this.mean = `rgb(${sums.map(sum => Math.round(sum / (data.length / 4))).join(" ")})`;
    this.find(".stage").style.setProperty("--hidden", this.mean);
  }

  draw() {
    if (!this.answer) return;
    const {signed, layers} = this.answer, map = this.map(), [low, high] = range(map, signed);
    paint(this.find(".heat"), map, signed, [low, high], true);
    this.find(".heat").style.opacity = this.shared.opacity;
    paintRamp(this.find(".ramp"), signed);
    say(this.find(".low"), short(low));
    say(this.find(".high"), short(high));
    say(this.find(".meaning"), METHODS[this.method][1].replace("{}", () => this.explained()) + this.tested());
    this.find(".layers").hidden = layers.length < 2;
    Object.assign(this.find(".layers input"), {max: layers.length, value: this.layer ?? layers.length});
    say(this.find(".layers output"), `${this.layer ?? layers.length} of ${layers.length}`);
    this.drawNote();
    this.drawBars();
  }

  tested() {
    const score = this.model.scores?.methods[this.method];
    return score ? ` Tested on this model: ${score.failures.join(", ") || "passes every test"}.` : "";
  }

  explained() {
    return this.answer.against ? `${this.answer.class}” rather than “${this.answer.against}` : this.answer.class;
  }

  drawNote() {
    if (!this.answer) return;
    const errors = this.answer.errors?.flat(), {rows, columns} = this.model;
    const values = Array.from({length: rows * columns}, (_, i) => this.valueAt((i % columns + .5) / columns, (Math.floor(i / columns) + .5) / rows));
    const best = values.indexOf(Math.max(...values));
    const error = errors ? ` Mean standard error: ± ${short(errors.reduce((sum, value) => sum + value, 0) / errors.length)}.` : "";
    say(this.find(".note"), `Highest at row ${Math.floor(best / columns) + 1}, column ${best % columns + 1}.${error}`);
  }

  drawBars() {
    if (!this.base) return;
    const now = this.changed ?? this.base, before = Object.fromEntries(this.base.map(each => [each.class, each.probability]));
    const [top] = now, label = this.model.classes.includes(this.shared.picture.label) ? this.shared.picture.label : "";
    const verdict = this.find(".verdict");
    say(verdict, `${top.class}, ${percent(top.probability)}`);
    if (label && !this.changed) verdict.append(" ", make("span", label === top.class ? "right" : "wrong", label === top.class ? "✓ correct" : `✗ label: ${label}`));
    say(this.find(".warning"), this.changed ? "" : this.warning);
    this.find(".bars").replaceChildren(...now.slice(0, SHOWN).map(each => {
      const row = make("li"), track = make("span", "track"), bar = make("i");
      bar.style.width = `${100 * each.probability}%`;
      track.append(bar);
      if (this.changed && each.class in before) {
        const mark = make("b");
        mark.style.left = `calc(${100 * before[each.class]}% - 1px)`;
        mark.title = `before: ${percent(before[each.class])}`;
        track.append(mark);
      }
      const name = make("span", "name", each.class);
      name.title = each.class;
      row.append(name, track, make("span", "value", percent(each.probability)));
      return row;
    }));
  }
}
