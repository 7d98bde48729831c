// The page: what comes in over the line, and which part shows it.

import { Ask } from "./ask.js";
import { Charts } from "./charts.js";
import { Control } from "./control.js";
import { $, h, say } from "./dom.js";
import { Graph } from "./graph.js";
import { Models } from "./models.js";
import { Peers } from "./peers.js";
import { Line } from "./line.js";
import { applyTheme, nextTheme } from "./theme.js";
import { bytes, getLanguage, number, percent, setLanguage, short, span, stateWord, t, translate } from "./words.js";

const MODELS_MS = 5000; // how often the published models are asked for: the peer asks the network for them

const graph = new Graph($("graph"));
const charts = new Charts($("charts"));
const peers = new Peers($("peers"));
const models = new Models($("models"));
const ask = new Ask($("which"), $("form"), $("answer"));
const control = new Control($("control"));
let status = null;
let others = [];
let versions = [];

const line = new Line({
  state(state) {
    $("line").dataset.state = state;
    say($("line"), t(state));
  },
  status(news) {
    status = news;
    charts.add(news.peer, news);
    showSelf();
  },
  peers(news) {
    others = news.peers;
    for (const peer of others) if (peer.model === status?.model) charts.add(peer.peer, peer, status.uptime);
    showNetwork();
  },
});

function showSelf() {
  say($("name"), status.name);
  document.title = `${status.accuracy === null ? "" : `${percent(status.accuracy, 0)} · `}${status.name} · gossipml`;
  say($("self-state"), stateWord(status.state));
  $("self-state").dataset.state = status.state;
  figures([
    ["accuracy", percent(status.accuracy), "large accuracy"],
    ["loss", number(status.loss, 4), "large loss"],
    ["round", number(status.round)],
    ["age", short(status.age)],
    ["sent", bytes(status.bytes_sent)],
    ["received", bytes(status.bytes_received)],
    ["model", status.model, "word"],
    ["uptime", span(status.uptime)],
  ]);
  control.show(status);
  ask.prefer(status.model);
  charts.draw(status.peer);
  say($("learning-note"), t("testData"));
  say($("foot"), t("foot", { v: status.gossipml }));
}

function figures(rows) {
  const list = $("figures");
  if (list.children.length !== rows.length) {
    list.replaceChildren(...rows.map(([, , kind = ""]) => h("div", { class: kind }, h("dt"), h("dd"))));
  }
  rows.forEach(([key, text], index) => {
    say(list.children[index].firstChild, t(key));
    say(list.children[index].lastChild, text);
  });
}

function showNetwork() {
  if (status === null) return;
  const connected = others.filter((peer) => peer.state === "connected" || peer.state === "suspect").length;
  const sum = others.length ? t("sum", { connected, known: others.length }) : t("alone");
  say($("network-sum"), sum);
  graph.show(status, others, t("graphSum", { sum }));
  const used = [...new Set(others.map((peer) => peer.state))].sort();
  const legend = $("legend");
  if (legend.dataset.used !== used.join() + getLanguage()) {
    legend.dataset.used = used.join() + getLanguage();
    legend.replaceChildren(...used.map((state) => h("li", { "data-state": state }, stateWord(state))));
  }
  peers.show(others);
}

async function lookAtModels() {
  try {
    versions = (await (await fetch("/v1/models")).json()).models;
    models.show(versions);
    ask.show(versions.map((model) => model.serving).filter(Boolean));
  } catch {
    // The line says that the peer is gone.
  }
  setTimeout(lookAtModels, MODELS_MS);
}

function showAll() {
  translate();
  for (const button of $("languages").children) button.setAttribute("aria-pressed", button.dataset.language === getLanguage());
  applyTheme($("theme"));
  say($("line"), t($("line").dataset.state === "off" ? "connecting" : $("line").dataset.state));
  models.show(versions, true);
  ask.translate();
  control.translate();
  if (status !== null) showSelf();
  showNetwork();
}

$("languages").addEventListener("click", (event) => {
  const wanted = event.target.dataset.language;
  if (wanted) {
    setLanguage(wanted);
    showAll();
  }
});
$("theme").addEventListener("click", () => {
  nextTheme();
  applyTheme($("theme"));
});

control.onpublished = () => lookAtModels();
showAll();
await charts.load();
line.open();
lookAtModels();
