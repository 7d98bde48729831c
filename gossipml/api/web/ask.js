// A form for each model that this peer answers for, made from what the model says of its inputs.

import { showAnswer } from "./answer.js";
import { h, say } from "./dom.js";
import { Draw } from "./draw.js";
import { Drop } from "./drop.js";
import { Numbers } from "./numbers.js";
import { t } from "./words.js";

const MAX_DRAWN = 64; // pixels a side: nobody draws a photograph

export class Ask {
  constructor(which, form, answer) {
    this.which = which;
    this.place = form;
    this.answer = answer;
    this.models = [];
    this.chosen = null;
    this.shape = "";
  }

  show(models) {
    const shape = JSON.stringify(models.map((model) => [model.name, model.ready, model.inputs, model.features, model.picture]));
    this.models = models;
    if (shape !== this.shape) {
      this.shape = shape;
      this.translate();
    }
  }

  translate() {
    const able = this.models.filter((model) => model.ready);
    if (!able.length) {
      this.which.replaceChildren();
      this.place.replaceChildren(h("p", { class: "quiet" }, t("notReady", { why: this.models[0]?.reason || "…" })));
      return;
    }
    const model = able.find((one) => one.name === this.chosen) ?? able[0];
    const choice = h("select", { onchange: () => this.choose(choice.value) },
      ...able.map((one) => h("option", { value: one.name, selected: one === model }, one.name)));
    this.which.replaceChildren(h("span", { class: "unseen" }, t("choose")), choice);
    this.choose(model.name);
  }

  choose(name) {
    this.chosen = name;
    const model = this.models.find((one) => one.name === name);
    const [height, width, channels] = model.picture ?? [];
    const input = height && channels === 1 && Math.max(height, width) <= MAX_DRAWN ? new Draw(height, width) : height ? new Drop() : new Numbers(model);
    this.place.replaceChildren(
      h("form", { onsubmit: (event) => { event.preventDefault(); this.predict(model, input); } },
        input.element,
        h("div", { class: "buttons" },
          h("button", { type: "submit", class: "first" }, t("predict")),
          input.clear && h("button", { type: "button", onclick: () => { input.clear(); this.answer.replaceChildren(); } }, t("clear")))),
    );
    if (input.clear) input.ondone = () => this.predict(model, input); // a stroke is done: say at once what it looks like
    this.answer.replaceChildren();
  }

  async predict(model, input) {
    const begun = performance.now();
    try {
      const value = await input.value();
      const response = await fetch(`/predict/${encodeURIComponent(model.name)}`, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value),
      });
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.error);
      showAnswer(this.answer, model, answer, performance.now() - begun);
    } catch (error) {
      const line = h("p", { class: "problem" });
      this.answer.replaceChildren(line);
      say(line, error.message);
    }
  }
}
