// The server-sent events. The browser connects again by itself, unless the peer refused; then we do.

const AGAIN_MS = 3000;
const SILENCE_MS = 5000; // five beats missed: a laptop that slept, a peer that stands still

export class Line {
  constructor(handlers) {
    this.handlers = handlers;
  }

  open() {
    const source = new EventSource("/v1/events");
    let timer = null;
    const heard = () => {
      this.handlers.state("live");
      clearTimeout(timer);
      timer = setTimeout(() => this.handlers.state("lost"), SILENCE_MS);
    };
    for (const kind of ["status", "peers"]) {
      source.addEventListener(kind, (event) => {
        heard();
        this.handlers[kind](JSON.parse(event.data));
      });
    }
    source.onerror = () => {
      clearTimeout(timer);
      this.handlers.state("lost");
      if (source.readyState === EventSource.CLOSED) setTimeout(() => this.open(), AGAIN_MS);
    };
  }
}
