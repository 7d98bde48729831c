// An answer: what the model says, and how sure it is of each label.

import { h } from "./dom.js";
import { number, percent, t } from "./words.js";

const MOST = 10; // labels

export function showAnswer(place, model, answer, took) {
  const { model: name, version, peer, probabilities, ...rest } = answer;
  const by = h("p", { class: "quiet" }, t("by", { version: String(version).slice(0, 16), peer: String(peer).slice(0, 8), ms: number(took) }));
  if (!Array.isArray(probabilities)) {
    const facts = Object.entries(rest).map(([key, value]) => h("div", {}, h("dt", {}, key), h("dd", {}, text(value))));
    place.replaceChildren(h("dl", { class: "facts large" }, ...facts), by);
    return;
  }
  const rows = probabilities.map((p, index) => [model.labels[index] ?? String(index), p]);
  const shown = rows.length > MOST ? rows.toSorted((a, b) => b[1] - a[1]).slice(0, MOST) : rows;
  const best = Math.max(...probabilities);
  const label = String(answer.label ?? rows.find(([, p]) => p === best)[0]);
  place.replaceChildren(
    h("p", { class: "verdict" }, h("strong", { id: "label" }, t("thinks", { label })), ` ${t("sure", { p: percent(best) })}`),
    h("ul", { class: "bars", "aria-hidden": "true" }, ...shown.map(([word, p]) => bar(word, p, p === best))),
    by,
  );
}

function bar(word, p, best) {
  const fill = h("i");
  fill.style.width = `${100 * p}%`;
  return h("li", { class: best ? "best" : "" }, h("span", {}, word), h("b", {}, fill), h("em", {}, percent(p, p > 0.0995 ? 0 : 1)));
}

const text = (value) => (typeof value === "number" ? number(value, Number.isInteger(value) ? 0 : 4) : typeof value === "string" ? value : JSON.stringify(value));
