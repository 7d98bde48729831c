// Pause, resume, publish: for whoever came by the link of `gossipml peer open`.

import { h, say } from "./dom.js";
import { t } from "./words.js";

export class Control {
  constructor(place) {
    this.place = place;
    this.said = h("p", { role: "status", class: "quiet" });
    this.may = null;
    this.onpublished = () => {};
    this.ask();
  }

  async ask() {
    try {
      this.may = (await (await fetch("/v1/page-session")).json()).may_change;
    } catch {
      this.may = false;
    }
    this.translate();
  }

  show(status) {
    const shape = `${status.trains}${Boolean(status.paused)}${status.state}`;
    this.status = status;
    if (shape !== this.shape) {
      this.shape = shape;
      this.translate();
    }
  }

  translate() {
    if (this.may === null || !this.status) return;
    if (!this.may) {
      this.place.replaceChildren(h("p", { class: "quiet" }, `${t("locked")} `, h("code", {}, "gossipml peer open"), ` ${t("lockedThen")}`));
      return;
    }
    const { paused, trains } = this.status;
    const focused = document.activeElement?.dataset?.does;
    const buttons = [];
    if (trains) {
      buttons.push(this.button(paused ? "resume" : "pause", () => this.change(`/v1/training/${paused ? "resume" : "pause"}`)));
      buttons.push(this.button("publish", () => this.publish()));
    }
    this.place.replaceChildren(h("div", { class: "buttons" }, ...buttons), this.said);
    if (focused) (this.place.querySelector(`[data-does=${focused}]`) ?? this.place.querySelector("button"))?.focus();
  }

  button(does, act) {
    return h("button", { type: "button", "data-does": does, onclick: act }, t(does));
  }

  async publish() {
    const done = await this.change(`/v1/models/${encodeURIComponent(this.status.model)}/publish`);
    if (done) {
      say(this.said, t("published", { v: done.version.slice(0, 8) }));
      this.onpublished();
    }
  }

  /** The answer, or null after saying what went wrong. */
  async change(path) {
    say(this.said, "");
    try {
      const response = await fetch(path, { method: "POST" });
      const answer = await response.json();
      if (response.status === 401) this.ask();
      if (!response.ok) throw new Error(answer.error);
      return answer;
    } catch (error) {
      say(this.said, t("failed", { why: error.message }));
      return null;
    }
  }
}
