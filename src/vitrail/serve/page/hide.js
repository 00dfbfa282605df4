// "Hide what the map calls important": the slider, and the curve that it moves along.

import {pause} from "./api.js";
import {drawChart} from "./chart.js";
import {$, complain, percent, say, whole} from "./dom.js";

export class Hide {
  // hide(patches): hide exactly these.
  constructor(shared, hide) {
    Object.assign(this, {shared, curve: null, key: null});
    $("hide").addEventListener("input", () => {
      if (this.curve) hide(this.curve.order.slice(0, Number($("hide").value)));
    });
    $("show-all").addEventListener("click", () => hide([]));
  }

  // The first view has a new map: compute its curve once it stops changing.
  async update(view) {
    const key = view.key();
    if (key === this.key) return;
    this.key = key;
    this.curve = null;
    this.stop?.abort();
    this.stop = new AbortController();
    const {signal} = this.stop;
    if (this.shared.picture.live) $("curve").replaceChildren();
    this.draw();
    await pause(400);  // of live pictures, only the last
    if (this.key !== key) return;
    try {
      const curve = await view.ask("curve", {...view.question(), passes: view.method === "shapley" ? 514 : "", resolution: ""}, signal);
      if (this.key !== key) return;
      this.curve = curve;
      this.draw();
    } catch (error) {
      if (error.name !== "AbortError") complain(error);
    }
  }

  draw() {
    const {hidden, grid: [rows, columns]} = this.shared, now = hidden.size, state = `${now} of ${rows * columns} patches hidden`;
    $("show-all").disabled = now === 0;
    Object.assign($("hide"), {max: rows * columns, value: now, disabled: !this.curve});
    $("hide").setAttribute("aria-valuetext", state);
    say($("hide-now"), now ? state : "");
    if (!this.curve) return;
    const {counts, curves, order} = this.curve;
    const lines = [["this map", "a"], ["center first", "b"], ["random", "c"]];
    drawChart($("curve"), {
      lines: lines.map(([name, kind], i) => [name, kind, counts, curves[["map", "center", "random"][i]]]),
      xs: [0, order.length], ys: [0, 1], format: whole, unit: "patches hidden", mark: now || null,
      label: `Probability of ${this.curve.class} while patches are hidden: by this map it falls to ${percent(curves.map[Math.floor(counts.length / 4)])} with a quarter hidden, in random order to ${percent(curves.random[Math.floor(counts.length / 4)])}`,
    });
  }
}
