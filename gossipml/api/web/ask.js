// A form for each model of the network, made from what the model says of its inputs.

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
    this.own = null; // the model of this peer, which is shown until somebody chooses another
    this.chosen = null;
    this.listed = "";
    this.formed = "";
    this.choice = h("select", { onchange: () => this.form((this.chosen = this.choice.value)) });
  }

  prefer(name) {
    if (name === this.own) return;
    this.own = name;
    this.list();
  }

  show(models) {
    const listed = JSON.stringify(models.map((model) => [model.name, model.ready, model.reason, shape(model)]));
    this.models = models;
    if (listed === this.listed) return;
    this.listed = listed;
    this.list();
  }

  translate() {
    this.formed = "";
    this.list();
  }

  /** What can be asked. The form stays as it is, with what was typed or drawn, unless its own model has changed. */
  list() {
    const able = this.models.filter((model) => model.ready);
    if (!able.length) {
      this.which.replaceChildren();
      this.place.replaceChildren(h("p", { class: "quiet" }, t("notReady", { why: (this.models.find((model) => model.name === this.own) ?? this.models[0])?.reason || "…" })));
      this.formed = "";
      return;
    }
    const named = (name) => able.find((one) => one.name === name);
    const model = named(this.chosen) ?? named(this.own) ?? able[0];
    this.choice.replaceChildren(...able.map((one) => h("option", { value: one.name, selected: one === model }, one.name)));
    if (!this.choice.isConnected) this.which.replaceChildren(h("span", { class: "unseen", "data-t": "choose" }, t("choose")), this.choice);
    this.form(model.name);
  }

  form(name) {
    const model = this.models.find((one) => one.name === name);
    if (this.formed === shape(model)) return;
    this.formed = shape(model);
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
    this.chosen = model.name;
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

const shape = (model) => JSON.stringify([model.name, model.inputs, model.features, model.picture]);
