// Who talks to whom: this peer in the middle, the others around it in an order that stays. A ring around each shows
// its accuracy; what travels between two peers is seen to travel.

import { s } from "./dom.js";
import { percent, stateWord, t } from "./words.js";

const WIDTH = 640;
const HEIGHT = 400;
const MOST = 40; // peers that can be told apart on this much room
const FLIGHT_MS = 900;
const MAX_FLIGHTS = 30;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Graph {
  constructor(place) {
    this.links = s("g", { class: "links" });
    this.flying = s("g", { class: "flying" });
    this.nodes = s("g", { class: "nodes" });
    this.more = s("text", { class: "more", x: WIDTH - 8, y: HEIGHT - 8, "text-anchor": "end" });
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" }, this.links, this.flying, this.nodes, this.more);
    place.append(this.svg);
    this.known = new Map(); // peer -> {node, bytes}
    this.flights = new Set();
  }

  show(self, others, label) {
    this.svg.setAttribute("aria-label", label);
    const shown = others.slice(0, MOST);
    this.more.textContent = others.length > MOST ? t("more", { n: others.length - MOST }) : "";
    const places = arrange(self, shown);
    const now = new Set(places.keys());
    for (const [peer, known] of this.known) {
      if (!now.has(peer)) {
        known.node.remove();
        this.known.delete(peer);
      }
    }
    const small = shown.length > 14;
    this.draw({ ...self, self: true }, places.get(self.peer), small ? 24 : 32);
    for (const peer of shown) this.draw(peer, places.get(peer.peer), small ? 13 : 22);
    this.connect(self, shown, places);
  }

  draw(peer, place, radius) {
    let known = this.known.get(peer.peer);
    if (!known) {
      known = { node: makeNode(), sent: peer.bytes_sent, received: peer.bytes_received };
      this.known.set(peer.peer, known);
      this.nodes.append(known.node);
    }
    const { node } = known;
    node.setAttribute("transform", `translate(${place.x} ${place.y})`);
    node.setAttribute("class", peer.self ? "node self" : "node");
    node.dataset.state = peer.self ? "connected" : peer.state;
    const [title, disc, track, arc, figure, name] = node.children;
    const about = [peer.name, peer.self ? t("you") : stateWord(peer.state), peer.model, percent(peer.accuracy)];
    title.textContent = about.filter((text) => text && text !== "–").join(", ");
    for (const circle of [track, arc]) circle.setAttribute("r", radius);
    disc.setAttribute("r", radius - 3);
    arc.setAttribute("stroke-dasharray", `${(peer.accuracy ?? 0) * 2 * Math.PI * radius} 1000`);
    figure.textContent = typeof peer.accuracy === "number" && radius > 15 ? Math.round(100 * peer.accuracy) : "";
    name.textContent = cut(peer.name || peer.peer.slice(0, 6), radius > 15 ? 16 : 8);
    name.setAttribute("y", radius + 17);
  }

  connect(self, shown, places) {
    const lines = new Map(); // both ends -> its peers and whether it is ours
    for (const peer of shown) {
      if (peer.state === "connected" || peer.state === "suspect") lines.set(key(self.peer, peer.peer), [self.peer, peer.peer, true]);
      for (const other of peer.links ?? []) {
        if (places.has(other) && !lines.has(key(peer.peer, other))) lines.set(key(peer.peer, other), [peer.peer, other, false]);
      }
    }
    this.links.replaceChildren(
      ...[...lines.values()].map(([a, b, own]) => s("path", { d: curve(places.get(a), places.get(b), own), class: own ? "own" : "other" })),
    );
    for (const peer of shown) {
      const known = this.known.get(peer.peer);
      const [from, to] = [places.get(self.peer), places.get(peer.peer)];
      if (peer.bytes_sent > known.sent) this.fly(from, to, "out");
      if (peer.bytes_received > known.received) this.fly(to, from, "in");
      known.sent = peer.bytes_sent;
      known.received = peer.bytes_received;
    }
  }

  fly(from, to, way) {
    if (calm.matches || document.hidden || this.flights.size >= MAX_FLIGHTS) return;
    const dot = s("circle", { r: 4, class: way });
    this.flying.append(dot);
    this.flights.add({ dot, from, to, begun: performance.now() + Math.random() * 500 });
    if (this.flights.size === 1) requestAnimationFrame((now) => this.step(now));
  }

  step(now) {
    for (const flight of this.flights) {
      const share = (now - flight.begun) / FLIGHT_MS;
      if (share >= 1) {
        flight.dot.remove();
        this.flights.delete(flight);
        continue;
      }
      const eased = share <= 0 ? 0 : share * share * (3 - 2 * share);
      flight.dot.setAttribute("cx", flight.from.x + (flight.to.x - flight.from.x) * eased);
      flight.dot.setAttribute("cy", flight.from.y + (flight.to.y - flight.from.y) * eased);
      flight.dot.setAttribute("opacity", share <= 0 ? 0 : Math.sin(Math.PI * eased));
    }
    if (this.flights.size) requestAnimationFrame((later) => this.step(later));
  }
}

/** Places by peer: connected ones on the inner ellipse, the others on the outer one, each in the order of its id. */
function arrange(self, others) {
  const places = new Map([[self.peer, { x: WIDTH / 2, y: HEIGHT / 2 - 8 }]]);
  const near = others.filter((peer) => peer.state === "connected" || peer.state === "suspect");
  const far = others.filter((peer) => !near.includes(peer));
  const rings = far.length && near.length ? [[near, 0.62], [far, 1]] : [[near.length ? near : far, 0.96]];
  for (const [ring, scale] of rings) {
    ring.sort((a, b) => (a.peer < b.peer ? -1 : 1));
    ring.forEach((peer, index) => {
      const angle = ((index + (scale === 1 ? 0.5 : 0)) / ring.length) * 2 * Math.PI - Math.PI / 2 + (ring.length % 2 ? 0 : Math.PI / ring.length);
      places.set(peer.peer, {
        x: WIDTH / 2 + Math.cos(angle) * (WIDTH / 2 - 60) * scale,
        y: HEIGHT / 2 - 8 + Math.sin(angle) * (HEIGHT / 2 - 46) * scale,
      });
    });
  }
  return places;
}

function makeNode() {
  return s("g", {},
    s("title"), s("circle", { class: "disc" }), s("circle", { class: "track" }), s("circle", { class: "arc", transform: "rotate(-90)" }),
    s("text", { class: "figure", "text-anchor": "middle", dy: "0.36em" }), s("text", { class: "name", "text-anchor": "middle" }),
  );
}

function curve(a, b, own) {
  if (own) return `M${a.x} ${a.y}L${b.x} ${b.y}`;
  // Bent away from the middle; what would go straight through it goes round it.
  const [mx, my] = [(a.x + b.x) / 2, (a.y + b.y) / 2];
  const [dx, dy] = [mx - WIDTH / 2, my - (HEIGHT / 2 - 8)];
  const near = Math.hypot(dx, dy) < 25;
  const length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
  const x = near ? mx + (100 * (a.y - b.y)) / length : mx + dx * 0.25;
  const y = near ? my + (100 * (b.x - a.x)) / length : my + dy * 0.25;
  return `M${a.x} ${a.y}Q${x} ${y} ${b.x} ${b.y}`;
}

const key = (a, b) => (a < b ? a + b : b + a);

const cut = (text, most) => ([...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text);
