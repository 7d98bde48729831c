// Accuracy and loss over time: this peer's in colour, those of the others faint behind it.

import { h, s, say } from "./dom.js";
import { number, percent, span, t } from "./words.js";

const MAX_POINTS = 600;
const LEAST_HEIGHT = 120;
const LEFT = 52;
const BOTTOM = 22;
const MAX_OTHERS = 30;

export class Charts {
  constructor(place) {
    this.lines = new Map(); // peer -> [{uptime, accuracy, loss}]
    this.charts = [
      new Chart("accuracy", "accuracy", (value) => percent(value), (value) => percent(value, 0), () => [0, 1], (value) => value),
      new Chart("loss", "lossLog", (value) => number(value, 4), (value) => number(value, Math.max(1, Math.ceil(-Math.log10(value)))), decades, Math.log),
    ];
    place.append(...this.charts.map((chart) => chart.figure));
    new ResizeObserver(() => this.own && this.draw(this.own)).observe(place);
  }

  /** What happened before the page was open. */
  async load() {
    try {
      this.past = (await (await fetch("/v1/history")).json()).points;
    } catch {
      this.past = [];
    }
  }

  add(peer, news, uptime = news.uptime) {
    if (uptime === undefined || (typeof news.accuracy !== "number" && typeof news.loss !== "number")) return;
    let points = this.lines.get(peer);
    if (!points) this.lines.set(peer, (points = []));
    if (points.length && points.at(-1).uptime > uptime) points.length = 0; // the peer was started anew
    points.push({ uptime, accuracy: news.accuracy, loss: news.loss });
    if (points.length > MAX_POINTS) this.lines.set(peer, points.filter((_, index) => index % 2));
  }

  draw(own) {
    this.own = own;
    const mine = this.lines.get(own) ?? [];
    const since = mine[0]?.uptime ?? Infinity;
    const points = [...(this.past ?? []).filter((point) => point.uptime < since), ...mine];
    const others = [...this.lines].filter(([peer]) => peer !== own).slice(0, MAX_OTHERS).map(([, line]) => line);
    for (const chart of this.charts) chart.draw(points, others);
  }
}

class Chart {
  /** `key`: of the points; `exact` and `rough`: how a value is written; `range`: least and most of the axis; `scale`: of it. */
  constructor(key, title, exact, rough, range, scale) {
    Object.assign(this, { key, title, exact, rough, range, scale });
    this.svg = s("svg", { role: "img", class: `chart ${key}` });
    this.caption = h("figcaption");
    this.figure = h("figure", {}, this.caption, this.svg);
  }

  draw(points, others) {
    const own = points.filter((point) => typeof point[this.key] === "number");
    say(this.caption, t(this.title));
    const width = Math.max(240, this.svg.clientWidth);
    const height = Math.max(LEAST_HEIGHT, this.svg.clientHeight);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!own.length) {
      this.svg.setAttribute("aria-label", t("noPoints"));
      this.svg.replaceChildren(s("text", { x: width / 2, y: height / 2, "text-anchor": "middle", class: "tick" }, t("noPoints")));
      return;
    }
    const rest = others.map((line) => line.filter((point) => typeof point[this.key] === "number")).filter((line) => line.length > 1);
    const values = own.map((point) => point[this.key]);
    const first = own[0].uptime;
    const last = Math.max(own.at(-1).uptime, first + 1);
    const [low, high] = this.range([...values, ...rest.flat().map((point) => point[this.key])]);
    const x = (point) => LEFT + ((Math.max(point.uptime, first) - first) / (last - first)) * (width - LEFT - 10);
    const share = (value) => (this.scale(Math.max(value, low)) - this.scale(low)) / (this.scale(high) - this.scale(low));
    const y = (value) => 8 + (1 - share(value)) * (height - BOTTOM - 8);
    const path = (line) => line.map((point, index) => `${index ? "L" : "M"}${x(point).toFixed(1)} ${y(point[this.key]).toFixed(1)}`).join("");
    const ticks = [low, this.scale === Math.log ? Math.sqrt(low * high) : (low + high) / 2, high].flatMap((value) => [
      s("line", { x1: LEFT, x2: width - 10, y1: y(value), y2: y(value), class: "grid" }),
      s("text", { x: LEFT - 8, y: y(value), dy: "0.32em", "text-anchor": "end", class: "tick" }, this.rough(value)),
    ]);
    const end = own.at(-1);
    this.svg.replaceChildren(
      ...ticks,
      s("text", { x: LEFT, y: height - 4, class: "tick" }, t("ago", { t: span(last - first) })),
      s("text", { x: width - 10, y: height - 4, "text-anchor": "end", class: "tick" }, t("now")),
      ...rest.map((line) => s("path", { d: path(line), class: "others" })),
      s("path", { d: `${path(own)}L${x(end)} ${y(low)}L${x(own[0])} ${y(low)}Z`, class: "area" }),
      s("path", { d: path(own), class: "line" }),
      s("circle", { cx: x(end), cy: y(end[this.key]), r: 4, class: "end" }),
    );
    const best = this.key === "loss" ? Math.min(...values) : Math.max(...values);
    const texts = { what: t(this.key), now: this.exact(end[this.key]), best: this.exact(best), span: span(last - first) };
    this.svg.setAttribute("aria-label", t("chartSum", texts));
  }
}

/** Whole powers of ten around the values, at most five of them: a loss falls by factors. */
function decades(values) {
  const high = 10 ** Math.ceil(Math.log10(Math.max(...values, 1e-6)));
  const least = Math.min(...values.filter((value) => value > 0), high / 10);
  return [Math.max(10 ** Math.floor(Math.log10(least)), high / 1e5), high];
}
