// The published models: the latest version of each and its copies; the older versions when asked for.

import { h } from "./dom.js";
import { bytes, moment, number, percent, t } from "./words.js";

const MAX_DOTS = 16;

export class Models {
  constructor(place) {
    this.place = place;
    this.shown = "";
    this.open = new Set();
  }

  show(models, anew = false) {
    const published = models.filter((model) => model.version);
    const text = JSON.stringify(published);
    if (text === this.shown && !anew) return;
    this.shown = text;
    const focused = document.activeElement?.closest?.("[data-model]")?.dataset.model;
    this.place.replaceChildren(...(published.length ? published.map((model) => this.card(model)) : [h("p", { class: "quiet" }, t("noModels"))]));
    if (focused) this.place.querySelector(`[data-model="${CSS.escape(focused)}"] summary`)?.focus();
  }

  card(model) {
    const details = h("details", {}, h("summary", {}, t("older")));
    const list = h("div", { class: "wide" });
    details.append(list);
    details.addEventListener("toggle", () => {
      this.open[details.open ? "add" : "delete"](model.name);
      if (details.open) this.history(model.name, list);
    });
    details.open = this.open.has(model.name);
    const facts = [
      model.metrics?.accuracy === undefined ? null : percent(model.metrics.accuracy),
      bytes(model.size),
      moment(model.created),
      model.publisher_name ? t("by2", { name: model.publisher_name }) : null,
      model.here === "whole" ? t("here") : model.here === "part" ? t("part", { p: percent(model.done, 0) }) : null,
      model.note || null,
    ];
    return h("article", { "data-model": model.name },
      h("h3", {}, model.name, " ", h("code", { title: model.version }, `${number(model.height)} · ${model.version.slice(0, 8)}`)),
      copies(model),
      h("p", { class: "facts" }, facts.filter(Boolean).join(" · ")),
      details,
    );
  }

  async history(name, place) {
    try {
      const answer = await (await fetch(`/v1/models/${encodeURIComponent(name)}`)).json();
      place.replaceChildren(table(name, answer.versions));
    } catch (error) {
      place.replaceChildren(h("p", {}, t("failed", { why: error.message })));
    }
  }
}

/** A dot for each copy that is wanted, filled for each that lives. */
function copies(model) {
  const most = Math.min(MAX_DOTS, Math.max(model.wanted ?? 0, model.replicas ?? 0));
  const text = `${t("replicas")}: ${t("of", { n: number(model.replicas), m: number(model.wanted) })}`;
  const dots = Array.from({ length: most }, (_, index) => h("i", { class: index < model.replicas ? "full" : "" }));
  return h("p", { class: "copies" }, h("span", { class: "dots", "aria-hidden": "true" }, ...dots), text);
}

function table(name, versions) {
  const head = ["version", "created", "accuracy", "replicas", "size", "note"];
  return h("table", {},
    h("caption", { class: "unseen" }, t("versionsOf", { name })),
    h("thead", {}, h("tr", {}, ...head.map((key) => h("th", { scope: "col" }, t(key))))),
    h("tbody", {}, ...versions.map((version) => h("tr", {},
      h("th", { scope: "row" }, h("code", {}, `${number(version.height)} · ${version.version.slice(0, 8)}`)),
      h("td", {}, moment(version.created)),
      h("td", {}, percent(version.metrics?.accuracy)),
      h("td", {}, t("of", { n: number(version.replicas), m: number(version.wanted) })),
      h("td", {}, bytes(version.size)),
      h("td", {}, version.note),
    ))),
  );
}
