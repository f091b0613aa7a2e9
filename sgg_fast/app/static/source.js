// The graph as a line of words and as JSON, each following the other and the canvas; what is wrong is said where it is.

import { Gone, post } from "./api.js";
import { toJson } from "./doc.js";

const PLACE = /\b(objects|relationships)\[(\d+)\]/;

export class Source {
  constructor(doc, editor, view) {
    Object.assign(this, { doc, editor, view });
    this.text = document.querySelector("#text");
    this.json = document.querySelector("#json");
    this.error = { text: document.querySelector("#text-error"), json: document.querySelector("#json-error") };
    this.graphError = document.querySelector("#graph-error");
    this.turn = 0; // of the newest question; older answers are dropped
    for (const kind of ["text", "json"]) {
      this[kind].addEventListener("input", () => this.typed(kind));
      // What could not be read stays until the canvas says otherwise.
      this[kind].addEventListener("blur", () => this.error[kind].hidden && this.show(kind, this.valid?.[kind]));
    }
    doc.addEventListener("change", ({ detail }) => detail.source !== "drag" && this.follow(detail.source));
  }

  /** The canvas or one of the fields has changed the graph: the others follow. */
  follow(source) {
    this.valid = { json: toJson(this.doc.state) };
    if (source !== "json") this.show("json", this.valid.json);
    for (const kind of ["text", "json"]) if (kind !== source) this.blame(kind, "");
    clearTimeout(this.later);
    this.later = setTimeout(() => this.ask(source), 60);
  }

  /** Have the server read the JSON: its words, or what is wrong with it. */
  async ask(source) {
    const turn = ++this.turn;
    const empty = !this.doc.state.nodes.length;
    const found = empty ? { text: "" } : await this.read({ json: this.valid.json });
    if (turn !== this.turn) return;
    if (!found) {
      this.later = setTimeout(() => this.ask(source), 1500); // the server is gone, or not yet there
      return;
    }
    this.view.bad.clear();
    this.graphError.textContent = found.error ?? "";
    this.graphError.hidden = !found.error;
    const [, list, index] = (found.error ?? "").match(PLACE) ?? [];
    const item = list && this.doc.state[list === "objects" ? "nodes" : "edges"][Number(index)];
    if (item) this.view.bad.set(item.id, found.error);
    this.view.render();
    if (found.error) return;
    this.valid.text = found.text;
    if (source !== "text") this.show("text", found.text);
  }

  typed(kind) {
    clearTimeout(this.later);
    this.turn++; // an answer that is on its way is about the older graph
    this.later = setTimeout(async () => {
      const turn = ++this.turn;
      const found = await this.read({ [kind]: this[kind].value });
      if (turn !== this.turn || !found) return;
      this.blame(kind, found.error ?? found.notices.join(" "));
      if (!found.error) this.editor.replace(found.graph, kind);
    }, 250);
  }

  async read(asked) {
    try {
      return await post("/api/graph", asked);
    } catch (error) {
      return error instanceof Gone ? null : { error: error.message };
    }
  }

  /** Not while somebody edits the field: it shows the value when it is left. */
  show(kind, value) {
    if (value === undefined || this[kind].value === value || this[kind] === document.activeElement) return;
    this[kind].value = value;
  }

  blame(kind, message) {
    this.error[kind].textContent = message;
    this.error[kind].hidden = !message;
    this[kind].setAttribute("aria-invalid", String(Boolean(message)));
  }
}
