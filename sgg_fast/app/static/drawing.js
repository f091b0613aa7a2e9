// One drawing at a time: asked for, followed until it is over, stopped. The newest request wins.

import { Gone, get, post, send } from "./api.js";

// Not randomUUID, which browsers keep from pages without TLS.
const PAGE = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16)).join("");
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export class Drawer extends EventTarget {
  /** ready(): whether the server can draw already. */
  constructor(ready) {
    super();
    this.ready = ready;
    this.wanted = null; // asked for by the user, not yet by us
    this.id = null; // what the server draws for this page
    this.stopping = false;
    this.busy = false;
    window.addEventListener("pagehide", () => this.id && send("DELETE", `/api/drawings/${this.id}`).catch(() => {}));
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  /** Draw {graph, settings, ...}; whatever is drawn for this page makes way. */
  async draw(request) {
    this.wanted = request;
    this.stopping = false;
    if (this.busy) return;
    this.busy = true;
    while (this.wanted) {
      const next = this.wanted;
      this.wanted = null;
      try {
        await this.one(next);
      } catch (error) {
        this.tell("over", { state: error instanceof Gone ? "gone" : "failed", error: error.message });
      }
      this.id = null;
    }
    this.busy = false;
  }

  async one(request) {
    const { graph, settings, maps } = request;
    this.tell("begin", request);
    while (!this.ready()) {
      if (this.wanted) return;
      if (this.stopping) {
        this.tell("over", { state: "stopped" });
        return;
      }
      await pause(100);
    }
    let at = await post("/api/drawings", { graph, settings, page: PAGE, maps });
    this.id = at.id;
    let seen = 0;
    while (at.state === "waiting" || at.state === "drawing") {
      if (this.wanted) return; // the server lets go of this one when it is asked for the next
      if (this.stopping) at = await (await send("DELETE", `/api/drawings/${at.id}`)).json();
      this.tell("progress", at);
      seen = at.preview_step ?? seen;
      await pause(at.state === "waiting" ? 250 : 120);
      at = await get(`/api/drawings/${at.id}?seen=${seen}`);
    }
    if (this.wanted) return;
    if (at.state === "done") {
      const pictures = await Promise.all(
        at.records.map(async (_, i) => (await send("GET", `/api/drawings/${at.id}/${i}.png`)).blob()),
      );
      this.tell("done", { ...at, request, pictures });
    }
    this.tell("over", at);
  }

  stop() {
    if (!this.busy) return false;
    this.stopping = true;
    this.wanted = null;
    return true;
  }
}
