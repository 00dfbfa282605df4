// The page: one picture, one or two models on it, and the tabs.

import {ask} from "./api.js";
import {$, complain, fill} from "./dom.js";
import {Hide} from "./hide.js";
import {Mistakes} from "./mistakes.js";
import {saveHtml, savePng} from "./save.js";
import {Brush, Camera, listenToFiles, showExamples} from "./sources.js";
import {Training} from "./training.js";
import {CONTRASTS, METHODS, View} from "./view.js";

const shared = {picture: null, hidden: new Set(), grid: [1, 1], className: "", against: "", opacity: .65, pixels: false};
const views = [];
let names = [], runs = [];

// ---- The picture -----------------------------------------------------------------------------

function choose(picture) {
  if (!picture.live) {
    camera.stop();
    if (brush.active) brush.toggle(false);
  }
  const moving = picture.live && shared.picture?.live;
  shared.picture = picture;
  if (!moving && shared.hidden.size) hide([]);
  for (const view of views) view.refresh();
}

function hide(patches) {
  shared.hidden = new Set(patches);
  for (const view of views) view.showHidden();
  curve.draw();
}

const events = {
  model(view) {
    if (view !== views[0]) return;
    shared.grid = [view.model.rows, view.model.columns];
    shared.hidden = new Set();
    curve.draw();
    fillClasses(view.model.classes);
    $("tab-training").hidden = runs.length === 0;
    showExamples(view.model.name, choose).then(first => first && (!shared.picture || shared.picture.prepared) && choose(first)).catch(complain);
  },
  map(view) {
    if (view === views[0]) {
      curve.update(view);
      hintContrast();
    }
  },
  hide(patches, hidden) {
    const next = new Set(shared.hidden);
    for (const patch of patches) hidden ? next.add(patch) : next.delete(patch);
    if (next.size !== shared.hidden.size) hide(next);
  },
  hover(view, patch) {
    const {rows, columns} = view.model;
    const [x, y] = patch === null ? [null, null] : [(patch % columns + .5) / columns, (Math.floor(patch / columns) + .5) / rows];
    for (const each of views) each.link(x, y);
  },
};

const curve = new Hide(shared, hide), brush = new Brush(choose, () => camera.stop()), camera = new Camera(choose);
listenToFiles(choose);

// ---- The question ----------------------------------------------------------------------------

function fillClasses(classes) {
  const options = classes.map(name => [name, name]);
  fill($("class"), [["", "the prediction"], ...options], shared.className);
  fill($("against"), [["", "–"], ...options], shared.against);
  shared.className = $("class").value;
  shared.against = $("against").value;
}

function hintContrast() {
  const [view] = views, blind = ["attention", "rollout"].includes(view.method);
  $("against-hint").textContent = blind && (shared.className || shared.against)
    ? "This map is the same for every class."
    : shared.against && !CONTRASTS.includes(view.method) ? `“Rather than” works with: ${CONTRASTS.map(name => METHODS[name][0]).join(", ")}.` : "";
}

for (const [id, name] of [["class", "className"], ["against", "against"]]) {
  $(id).addEventListener("change", () => {
    shared[name] = $(id).value;
    for (const view of views) view.refresh();
  });
}

// ---- Views, display, saving ------------------------------------------------------------------

async function addView(name, method) {
  const view = new View(shared, names, events);
  view.method = method;
  views.push(view);
  $("views").append(view.root);
  $("views").className = views.length > 1 ? "two" : "one";
  brush.listen(view.find(".base"));
  await view.useModel(name);
}

$("compare").addEventListener("click", async () => {
  const on = views.length === 1;
  $("compare").setAttribute("aria-pressed", String(on));
  if (on) {
    const [{model, method}] = views, other = names.find(name => name !== model.name);
    await addView(other ?? model.name, other || method === "rollout" ? method : "rollout");
  } else {
    views.pop().root.remove();
    $("views").className = "one";
  }
});
$("opacity").addEventListener("input", () => {
  shared.opacity = $("opacity").value / 100;
  for (const view of views) view.draw();
});
$("pixels").addEventListener("change", () => {
  shared.pixels = $("pixels").checked;
  for (const view of views) view.refresh();
});
$("save-png").addEventListener("click", () => savePng(views, shared));
$("save-html").addEventListener("click", () => saveHtml(views[0], shared, $("save-html")));

// ---- Tabs and keys ---------------------------------------------------------------------------

const TABS = ["look", "mistakes", "training"];

function openTab(chosen) {
  for (const tab of TABS) {
    $(tab).hidden = tab !== chosen;
    $(`tab-${tab}`).setAttribute("aria-selected", String(tab === chosen));
    $(`tab-${tab}`).tabIndex = tab === chosen ? 0 : -1;
  }
  const {name} = views[0].model;
  if (chosen !== "look") camera.stop();
  if (chosen === "mistakes") {
    fill($("mistakes-model"), names.map(each => [each, each]), name);
    mistakes.show(name);
  }
  if (chosen === "training") {
    fill($("training-model"), runs.map(each => [each, each]), name);
    training.show($("training-model").value);
  }
}

function show(picture) {
  openTab("look");
  choose(picture);
  $("tab-look").focus();
}

const mistakes = new Mistakes(show), training = new Training(show);

for (const tab of TABS) {
  $(`tab-${tab}`).addEventListener("click", () => openTab(tab));
  $(`tab-${tab}`).addEventListener("keydown", event => {
    const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!by) return;
    const there = TABS.filter(each => !$(`tab-${each}`).hidden);
    const next = there[(there.indexOf(tab) + by + there.length) % there.length];
    openTab(next);
    $(`tab-${next}`).focus();
  });
}

addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, select") || $("look").hidden) return;
  const [view] = views, methods = Object.keys(METHODS);
  if (event.key === "Escape") hide([]);
  else if (event.key === "m") view.useMethod(methods[(methods.indexOf(view.method) + 1) % methods.length]);
  else if (/^\d$/.test(event.key)) $("examples").children[(Number(event.key) + 9) % 10]?.click();
});

async function start() {
  ({models: names, runs} = await ask("models"));
  await addView(names[0], "balanced");
}

start().catch(complain);
