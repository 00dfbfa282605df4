// Where pictures come from: examples, files, the clipboard, the camera, a brush.

import {ask, encoded, pause} from "./api.js";
import {$, complain, make} from "./dom.js";

const SIDE = 256, FRAME = 100, COLORS = ["#000000", "#ffffff", "#d62728", "#ff9f1c", "#ffd60a", "#2ca02c", "#1f77b4", "#8b5e3c"];
let number = 0;

// image: what the browser shows, or null where it cannot read the file but the server can.
function picture(blob, image, more = {}) {
  return {blob, image, number: ++number, seen: new Map(), prepared: false, live: false, label: "", ...more};
}

async function openBlob(blob, more = {}) {
  const image = await createImageBitmap(blob).catch(() => null);
  return picture(blob, image, more);
}

export async function showExamples(model, choose) {
  const {examples} = await ask(`models/${encoded(model)}/examples`);
  const buttons = examples.map((name, index) => {
    const button = make("button"), image = make("img");
    image.src = `/api/models/${encoded(model)}/examples/${index}`;
    image.alt = button.title = name;
    button.append(image);
    button.addEventListener("click", async () => choose(await openStored(model, "examples", index, name)));
    return button;
  });
  $("examples").replaceChildren(...buttons);
  $("examples").hidden = !buttons.length;
  return examples.length ? openStored(model, "examples", 0, examples[0]) : null;
}

// kind: examples, or pictures (the validation images).
export async function openStored(model, kind, index, label) {
  const blob = await ask(`models/${encoded(model)}/${kind}/${index}`, {as: "blob"});
  return openBlob(blob, {prepared: true, label, name: label});
}

export function listenToFiles(choose) {
  const take = async file => {
    if (file) choose(await openBlob(file, {name: file.name?.replace(/\.\w+$/, "")}));
  };
  $("open").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    take($("file").files[0]);
    $("file").value = "";
  });
  addEventListener("paste", event => take([...event.clipboardData.files][0]));
  for (const kind of ["dragenter", "dragover"]) {
    addEventListener(kind, event => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
  }
  addEventListener("dragleave", event => event.relatedTarget || document.body.classList.remove("dropping"));
  addEventListener("drop", event => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    take([...event.dataTransfer.files][0]);
  });
}

function press(button, on) {
  button.setAttribute("aria-pressed", String(on));
}

const toBlob = canvas => new Promise(resolve => canvas.toBlob(resolve, "image/png"));

export class Camera {
  constructor(choose) {
    this.choose = choose;
    this.stream = null;
    $("camera").addEventListener("click", () => (this.stream ? this.stop() : this.start()));
  }

  async start() {
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
    } catch (error) {
      complain(new Error(`no camera: ${error.message}`));
      return;
    }
    press($("camera"), true);
    const video = Object.assign(document.createElement("video"), {srcObject: this.stream, muted: true, playsInline: true});
    await video.play();
    while (this.stream) {
      const began = performance.now(), side = Math.min(video.videoWidth, video.videoHeight);
      const canvas = Object.assign(document.createElement("canvas"), {width: SIDE, height: SIDE});
      canvas.getContext("2d").drawImage(video, (video.videoWidth - side) / 2, (video.videoHeight - side) / 2, side, side, 0, 0, SIDE, SIDE);
      const blob = await toBlob(canvas);
      if (this.stream) this.choose(picture(blob, canvas, {live: true, name: "camera"}));
      await pause(FRAME - (performance.now() - began));
    }
  }

  stop() {
    this.stream?.getTracks().forEach(track => track.stop());
    this.stream = null;
    press($("camera"), false);
  }
}

// Draws on the first view's picture.
export class Brush {
  constructor(choose, begin) {
    Object.assign(this, {choose, begin, active: false, color: COLORS[2], past: []});
    this.canvas = Object.assign(document.createElement("canvas"), {width: SIDE, height: SIDE});
    this.context = this.canvas.getContext("2d", {willReadFrequently: true});
    $("draw").addEventListener("click", () => this.toggle(!this.active));
    $("undo").addEventListener("click", () => this.undo());
    $("blank").addEventListener("click", () => {
      this.remember();
      this.context.fillStyle = "#ffffff";
      this.context.fillRect(0, 0, SIDE, SIDE);
      this.send();
    });
    $("swatches").replaceChildren(...COLORS.map(color => {
      const button = make("button", "swatch");
      button.style.backgroundColor = color;
      button.setAttribute("aria-label", `Color ${color}`);
      press(button, color === this.color);
      button.addEventListener("click", () => {
        this.color = color;
        for (const other of $("swatches").children) press(other, other === button);
      });
      return button;
    }));
  }

  toggle(on) {
    if (on) this.begin();
    this.active = on;
    press($("draw"), on);
    $("brushes").hidden = !on;
    document.body.classList.toggle("drawing", on);
    if (!on) return;
    this.past = [];
    const base = document.querySelector(".base");
    this.context.drawImage(base, 0, 0, SIDE, SIDE);
    this.send();
  }

  // Called once for each view.
  listen(base) {
    let last = null;
    const place = event => {
      const {left, top, width, height} = base.getBoundingClientRect();
      return [(event.clientX - left) / width * SIDE, (event.clientY - top) / height * SIDE];
    };
    const stroke = event => {
      const [x, y] = place(event), [fromX, fromY] = last ?? [x, y];
      Object.assign(this.context, {strokeStyle: this.color, lineWidth: Number($("brush").value), lineCap: "round"});
      this.context.beginPath();
      this.context.moveTo(fromX, fromY);
      this.context.lineTo(x, y + .01);  // so that a single click draws a point
      this.context.stroke();
      last = [x, y];
      this.send();
    };
    base.addEventListener("pointerdown", event => {
      if (!this.active) return;
      base.setPointerCapture(event.pointerId);
      this.remember();
      last = null;
      stroke(event);
    });
    base.addEventListener("pointermove", event => this.active && last && event.buttons && stroke(event));
    base.addEventListener("pointerup", () => { last = null; });
  }

  remember() {
    this.past = [...this.past.slice(-19), this.context.getImageData(0, 0, SIDE, SIDE)];
  }

  undo() {
    if (this.past.length) this.context.putImageData(this.past.pop(), 0, 0);
    this.send();
  }

  async send() {
    const blob = await toBlob(this.canvas);
    this.choose(picture(blob, this.canvas, {live: true, prepared: true, name: "drawing"}));
  }
}
