// The table of peers: what the graph shows, and more, for everybody who would rather read.

import { h, say } from "./dom.js";
import { bytes, getLanguage, number, percent, short, span, stateWord, t } from "./words.js";

const COLUMNS = ["name", "state", "model", "accuracy", "loss", "age", "sent", "received", "seen", "problem"];
const RIGHT = new Set(["accuracy", "loss", "age", "sent", "received", "seen"]);

export class Peers {
  constructor(place) {
    this.head = h("tr");
    this.body = h("tbody");
    this.table = h("table", {}, h("thead", {}, this.head), this.body);
    place.append(this.table);
    this.rows = new Map();
  }

  show(peers) {
    if (this.language !== getLanguage()) {
      this.language = getLanguage();
      this.head.replaceChildren(...COLUMNS.map((key) => h("th", { scope: "col", class: RIGHT.has(key) && "right" }, t(key))));
    }
    const now = new Set(peers.map((peer) => peer.peer));
    for (const [peer, row] of this.rows) {
      if (!now.has(peer)) {
        row.remove();
        this.rows.delete(peer);
      }
    }
    peers.forEach((peer, index) => this.fill(this.row(peer.peer, index), peer));
  }

  row(peer, index) {
    let row = this.rows.get(peer);
    if (!row) {
      row = h("tr", {}, ...COLUMNS.map((key, column) => h(column ? "td" : "th", { scope: column ? null : "row", class: RIGHT.has(key) && "right" })));
      this.rows.set(peer, row);
    }
    if (this.body.children[index] !== row) this.body.insertBefore(row, this.body.children[index] ?? null);
    return row;
  }

  fill(row, peer) {
    row.dataset.state = peer.state;
    const cells = [
      peer.name || peer.peer.slice(0, 8),
      stateWord(peer.learning && peer.state === "connected" ? peer.learning : peer.state),
      peer.model || "–",
      percent(peer.accuracy),
      number(peer.loss, 4),
      peer.age === null ? "–" : short(peer.age),
      bytes(peer.bytes_sent),
      bytes(peer.bytes_received),
      peer.last_seen === null ? "–" : peer.last_seen < 5 ? t("now") : t("ago", { t: span(peer.last_seen) }),
      peer.problem,
    ];
    cells.forEach((text, index) => say(row.children[index], text));
    row.firstChild.title = peer.peer;
  }
}
