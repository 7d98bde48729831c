// A sheet to draw on, for models of small grey pictures. What is drawn is brought to the form of the training data:
// white on black, as large as the frame allows, its weight in the middle (LeCun's recipe for MNIST: 20 of 28 pixels,
// centred by mass; the 8x8 digits of scikit-learn fill their whole frame).

import { h } from "./dom.js";
import { t } from "./words.js";

const SIDE = 280; // pixels of the sheet
const PEN = { small: 40, large: 28 }; // as thick, in the end, as the strokes of the training data
const STEP = 7; // of an arrow key

export class Draw {
  constructor(height, width) {
    this.height = height;
    this.width = width;
    this.small = height < 16;
    this.thick = this.small ? PEN.small : PEN.large;
    this.sheet = h("canvas", { width: SIDE, height: SIDE, tabindex: 0, role: "img", "aria-label": t("draw"), "aria-describedby": "draw-help", id: "sheet" });
    this.mark = h("i", { class: "pen", "aria-hidden": "true" }); // where the keyboard's pen is
    this.element = h("div", { class: "draw" }, h("div", { class: "sheet" }, this.sheet, this.mark), h("p", { class: "quiet", id: "draw-help" }, t("drawHelp")));
    this.pen = this.sheet.getContext("2d", { willReadFrequently: true });
    this.at = null; // where the stroke is; null between two
    this.cursor = { x: SIDE / 2, y: SIDE / 4 };
    this.ondone = () => {};
    this.sheet.addEventListener("pointerdown", (event) => {
      this.sheet.setPointerCapture(event.pointerId);
      this.begin(this.place(event));
    });
    this.sheet.addEventListener("pointermove", (event) => this.at && event.buttons && this.move(this.place(event)));
    for (const kind of ["pointerup", "pointercancel"]) this.sheet.addEventListener(kind, () => this.end());
    this.sheet.addEventListener("keydown", (event) => this.key(event));
    this.clear();
    this.showPen();
  }

  clear() {
    this.pen.fillStyle = "#000";
    this.pen.fillRect(0, 0, SIDE, SIDE);
    this.empty = true;
  }

  /** `{"image": PNG in base64}` of the model's own size. */
  async value() {
    if (this.empty) throw new Error(t("nothingDrawn"));
    const small = this.fitted();
    const blob = await new Promise((done) => small.toBlob(done, "image/png"));
    return { image: base64(new Uint8Array(await blob.arrayBuffer())) };
  }

  fitted() {
    const { data } = this.pen.getImageData(0, 0, SIDE, SIDE);
    let [left, top, right, bottom, mass, mx, my] = [SIDE, SIDE, 0, 0, 0, 0, 0];
    for (let y = 0; y < SIDE; y += 1) {
      for (let x = 0; x < SIDE; x += 1) {
        const value = data[4 * (y * SIDE + x)];
        if (value < 32) continue;
        [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
        [mass, mx, my] = [mass + value, mx + value * x, my + value * y];
      }
    }
    const side = Math.max(right - left, bottom - top) + 1;
    const room = this.small ? 1 : 20 / 28;
    const scale = (Math.min(this.width, this.height) * room) / side;
    const [x, y] = this.small ? [(left + right) / 2, (top + bottom) / 2] : [mx / mass, my / mass];
    // Halved step by step: one leap to a tenth of the size would skip pixels.
    let from = this.sheet;
    let size = SIDE;
    while (scale * (SIDE / size) < 0.5) {
      size /= 2;
      const half = h("canvas", { width: size, height: size });
      half.getContext("2d").drawImage(from, 0, 0, size, size);
      from = half;
    }
    const small = h("canvas", { width: this.width, height: this.height });
    const brush = small.getContext("2d");
    brush.fillStyle = "#000";
    brush.fillRect(0, 0, this.width, this.height);
    brush.imageSmoothingQuality = "high";
    brush.drawImage(from, this.width / 2 - (x + 0.5) * scale, this.height / 2 - (y + 0.5) * scale, SIDE * scale, SIDE * scale);
    return small;
  }

  place(event) {
    const box = this.sheet.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * SIDE, y: ((event.clientY - box.top) / box.height) * SIDE };
  }

  begin(place) {
    this.at = place;
    this.move(place);
  }

  move(place) {
    this.pen.strokeStyle = "#fff";
    this.pen.lineWidth = this.thick;
    this.pen.lineCap = this.pen.lineJoin = "round";
    this.pen.beginPath();
    this.pen.moveTo(this.at.x, this.at.y);
    this.pen.lineTo(place.x, place.y);
    this.pen.stroke();
    this.at = place;
    this.empty = false;
  }

  end() {
    if (!this.at) return;
    this.at = null;
    this.ondone();
  }

  key(event) {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === " ") {
      if (this.at) this.end();
      else this.begin({ ...this.cursor });
    } else if (event.key in ways) {
      const inside = (value) => Math.max(this.thick / 2, Math.min(SIDE - this.thick / 2, value));
      const [dx, dy] = ways[event.key];
      this.cursor = { x: inside(this.cursor.x + dx * STEP), y: inside(this.cursor.y + dy * STEP) };
      if (this.at) this.move({ ...this.cursor });
    } else {
      return;
    }
    this.showPen();
    event.preventDefault();
  }

  showPen() {
    this.mark.style.left = `${(100 * this.cursor.x) / SIDE}%`;
    this.mark.style.top = `${(100 * this.cursor.y) / SIDE}%`;
    this.mark.classList.toggle("down", this.at !== null);
  }
}

export function base64(data) {
  let text = "";
  for (let start = 0; start < data.length; start += 8192) text += String.fromCharCode(...data.subarray(start, start + 8192));
  return btoa(text);
}
