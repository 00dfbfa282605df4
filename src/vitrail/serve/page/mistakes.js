// The confusion matrix of a model on its validation images; a cell opens its pictures.

import {ask, encoded, pause} from "./api.js";
import {paint} from "./colors.js";
import {$, complain, make, percent, say} from "./dom.js";
import {openStored} from "./sources.js";

// A picture of a model's data with its map, as a button; open(picture) is called when it is clicked.
export function tile(model, {kind = "pictures", index, label, text}, open) {
  const button = make("button"), pair = make("span", "pair"), image = make("img"), canvas = make("canvas");
  image.src = `/api/models/${encoded(model)}/${kind}/${index}`;
  image.alt = "";  // the caption describes it
  pair.append(image, canvas);
  const caption = make("span", "", text);
  button.append(pair, caption);
  button.title = `label: ${label}`;
  button.refresh = async () => {
    const {blob} = await openStored(model, kind, index, label);
    const answer = await ask("explain", {params: {model, method: "balanced", resolution: "patch", prepared: 1}, body: blob});
    paint(canvas, answer.maps[0], true);
    return answer;
  };
  button.addEventListener("click", async () => open(await openStored(model, kind, index, label)));
  return button;
}

export class Mistakes {
  constructor(open) {
    this.open = open;
    this.model = null;
    $("mistakes-model").addEventListener("change", event => this.show(event.target.value));
  }

  async show(model) {
    const turn = {};  // the next call ends this one
    Object.assign(this, {model, turn, opened: ""});
    $("cell-card").hidden = true;
    $("matrix").replaceChildren();
    say($("mistakes-state"), "Loading the validation images; CIFAR is downloaded if it is missing …");
    try {
      while (this.turn === turn) {
        const found = await ask(`models/${encoded(model)}/confusion`);
        if (this.turn !== turn) return;
        this.draw(found);
        if (found.evaluated === found.images || $("mistakes").hidden) return;
        await pause(700);
      }
    } catch (error) {
      say($("mistakes-state"), error.message);
    }
  }

  draw({classes, counts, evaluated, images}) {
    const right = counts.reduce((sum, row, i) => sum + row[i], 0);
    const accuracy = evaluated ? `, ${percent(right / evaluated)} correct` : "";
    say($("mistakes-state"), `${evaluated.toLocaleString("en")} of ${images.toLocaleString("en")} validation images${accuracy}`);
    const head = make("tr");
    head.append(make("td"), ...classes.map(name => make("th", "", name)));
    $("matrix").replaceChildren(head, ...counts.map((row, i) => {
      const line = make("tr"), total = row.reduce((sum, count) => sum + count, 0);
      line.append(make("th", "", classes[i]), ...row.map((count, j) => this.cell(classes, i, j, count, total)));
      return line;
    }));
  }

  cell(classes, i, j, count, total) {
    const cell = make("td"), button = make("button", "", count || "·");
    const share = total ? count / total : 0, strength = count ? 12 + 36 * Math.sqrt(share) : 0;  // text is readable on each
    button.style.background = `color-mix(in srgb, var(${i === j ? "--right" : "--wrong"}) ${strength}%, var(--paper))`;
    button.setAttribute("aria-label", `${count} images of ${classes[i]} predicted as ${classes[j]}`);
    button.disabled = count === 0;
    if (this.opened === `${i},${j}`) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => this.openCell(classes, i, j, button));
    cell.append(button);
    return cell;
  }

  async openCell(classes, i, j, button) {
    const {model} = this;
    for (const other of $("matrix").querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    this.opened = `${i},${j}`;  // the matrix is drawn again while images are evaluated
    try {
      const {pictures} = await ask(`models/${encoded(model)}/confusion/${i}/${j}`);
      $("cell-card").hidden = false;
      say($("cell-title"), i === j ? `${classes[i]}, correct: least confident first` : `${classes[i]} predicted as ${classes[j]}: most confident first`);
      $("cell-title").focus();
      const tiles = pictures.map(({index, probability}) =>
        tile(model, {index, label: classes[i], text: `${classes[j]} ${percent(probability)}`}, this.open));
      $("cell").replaceChildren(...tiles);
      for (const each of tiles) {
        if (!each.isConnected) return;
        await each.refresh();
      }
    } catch (error) {
      complain(error);
    }
  }
}
