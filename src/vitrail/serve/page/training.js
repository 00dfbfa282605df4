// A run, also while it trains: curves, time left, and the maps of watched pictures.

import {ask, encoded, pause} from "./api.js";
import {drawChart} from "./chart.js";
import {$, make, percent, say, short, whole} from "./dom.js";
import {tile} from "./mistakes.js";

const PERIOD = 3000;

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  return minutes < 1 ? `${Math.round(seconds)} s` : minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export class Training {
  constructor(open) {
    this.open = open;
    $("training-model").addEventListener("change", event => this.show(event.target.value));
  }

  async show(model) {
    const turn = this.turn = {};  // the next call ends this one
    let epoch = null;
    $("watched").replaceChildren();
    try {
      while (this.turn === turn && !$("training").hidden) {
        const run = await ask(`models/${encoded(model)}/run`), last = run.rows.at(-1);
        if (this.turn !== turn) return;
        this.draw(run);
        if (last && last.epoch !== epoch) {
          epoch = last.epoch;
          await this.watch(model);
        }
        if (run.finished) return;
        await pause(PERIOD);
      }
    } catch (error) {
      say($("training-state"), error.message);
    }
  }

  draw({rows, epochs, finished}) {
    const last = rows.at(-1);
    if (!last) return say($("training-state"), "no epoch yet");
    const left = last.seconds / last.epoch * (epochs - last.epoch);
    say($("training-state"), `epoch ${last.epoch} of ${epochs}, ${finished ? "finished" : `about ${duration(left)} left`}`);
    const xs = rows.map(row => row.epoch), held = last.validation_loss === undefined ? "test" : "validation";
    const chart = (measure, format, axis, ceiling) => {
      const lines = [["training", "c", xs, rows.map(row => row[`train_${measure}`])], [held, "a", xs, rows.map(row => row[`${held}_${measure}`])]];
      const values = lines.flatMap(line => line[3]).filter(Number.isFinite);
      drawChart($(measure), {lines, xs: [xs[0], Math.max(xs.at(-1), finished ? 0 : epochs)], ys: [0, ceiling ?? Math.max(...values)], format: axis, unit: "epoch",
        label: `${measure} by epoch; now ${held} ${format(last[`${held}_${measure}`] ?? 0)}`});
    };
    chart("loss", short, short);
    chart("accuracy", percent, whole, 1);
  }

  async watch(model) {
    if (!$("watched").children.length) {
      const {examples} = await ask(`models/${encoded(model)}/examples`);
      const tiles = examples.map((label, index) => tile(model, {kind: "examples", index, label, text: label}, this.open));
      $("watched").replaceChildren(...tiles);
    }
    for (const each of $("watched").children) {
      const {predictions: [top]} = await each.refresh();
      each.lastChild.textContent = `${top.class} ${percent(top.probability)}`;
    }
    if (!$("watched").children.length) $("watched").append(make("small", "", "No pictures of its dataset are on this machine."));
  }
}
