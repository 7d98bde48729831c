// Number fields: one for each named value, or one line for all where they have no names.

import { h } from "./dom.js";
import { t } from "./words.js";

export class Numbers {
  constructor(model) {
    this.count = (model.inputs[0]?.shape ?? []).slice(1).reduce((product, n) => product * n, 1);
    this.fields = (model.features ?? []).map((name, index) => [name, h("input", { type: "number", step: "any", value: "0", required: true, id: `field-${index}`, name })]);
    this.row = h("textarea", { rows: 3, id: "row", spellcheck: "false", required: true });
    this.element = this.fields.length
      ? h("div", { class: "fields" }, ...this.fields.map(([name, field]) => h("label", { for: field.id }, h("span", {}, name), field)))
      : h("label", { class: "row", for: "row" }, t("values", { n: this.count }), this.row);
  }

  async value() {
    if (this.fields.length) return Object.fromEntries(this.fields.map(([name, field]) => [name, field.valueAsNumber]));
    return this.row.value.split(/[\s,;]+/).filter(Boolean).map(Number);
  }
}
