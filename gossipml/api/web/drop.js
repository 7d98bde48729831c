// A place to drop a picture, or to choose one.

import { h, say } from "./dom.js";
import { base64 } from "./draw.js";
import { t } from "./words.js";

const MAX_SIDE = 512; // larger pictures are made smaller here: the endpoint takes a megabyte

export class Drop {
  constructor() {
    this.file = null;
    this.ondone = () => {};
    this.said = h("span", { role: "status" });
    this.preview = h("img", { alt: "", hidden: true });
    this.input = h("input", { type: "file", accept: "image/*", id: "picture", onchange: () => this.take(this.input.files[0]) });
    this.element = h("label", { class: "drop", for: "picture" }, this.preview, h("span", {}, t("picture")), this.input, this.said);
    this.element.addEventListener("dragover", (event) => {
      event.preventDefault();
      this.element.classList.add("over");
    });
    this.element.addEventListener("dragleave", () => this.element.classList.remove("over"));
    this.element.addEventListener("drop", (event) => {
      event.preventDefault();
      this.element.classList.remove("over");
      this.take(event.dataTransfer.files[0]);
    });
  }

  take(file) {
    if (!file) return;
    this.file = file;
    if (this.preview.src) URL.revokeObjectURL(this.preview.src);
    this.preview.src = URL.createObjectURL(file);
    this.preview.hidden = false;
    say(this.said, t("given", { name: file.name }));
    this.ondone();
  }

  clear() {
    this.file = null;
    this.input.value = "";
    this.preview.hidden = true;
    say(this.said, "");
  }

  async value() {
    if (!this.file) throw new Error(t("noPicture"));
    let bitmap;
    try {
      bitmap = await createImageBitmap(this.file);
    } catch {
      return { image: base64(new Uint8Array(await this.file.arrayBuffer())) }; // the peer says what is wrong with it
    }
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = h("canvas", { width: Math.max(1, bitmap.width * scale), height: Math.max(1, bitmap.height * scale) });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
    return { image: base64(new Uint8Array(await blob.arrayBuffer())) };
  }
}
