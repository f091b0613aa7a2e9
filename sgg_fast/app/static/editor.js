// What can be done to the graph, by hand or by key. Every change is one step back for the user.

import * as docs from "./doc.js";
import { listen } from "./gestures.js";
import { freePlace, layout } from "./layout.js";
import { width } from "./view.js";
import { unseen, words } from "./words.js";

const strange = (name) =>
  unseen(name) ? `“${name}” is not among the model's words. It can be drawn; expect little of it.` : "";

export class Editor {
  constructor(doc, view, combo, onHover) {
    Object.assign(this, { doc, view, combo });
    this.clipboard = null;
    this.base = null; // the state before a drag
    listen(view, {
      select: (id) => this.press(id),
      toggle: (id) => this.toggle(id),
      movable: (id) => (view.isEdge(id) ? [] : [...view.selected].filter((other) => !view.isEdge(other))),
      drag: (ids, dx, dy) => this.drag(ids, dx, dy),
      dropped: (ids, dx, dy) => this.dropped(ids, dx, dy),
      marquee: (a, b, add) => this.marquee(a, b, add),
      connect: (from, to, at) => this.connectTo(from, to, at),
      edit: (id) => this.edit(id),
      add: (at) => this.add(at),
      clear: () => view.select([]),
      hover: onHover,
    });
    view.svg.addEventListener("keydown", (event) => this.key(event));
    view.svg.addEventListener("focusin", (event) => {
      const id = view.itemAt(event.target);
      if (id !== null && id !== view.current) view.select(view.selected, id);
    });
  }

  get state() {
    return this.doc.state;
  }

  get selection() {
    return [...this.view.selected];
  }

  /** Commit, choose these items and focus the last of them. */
  change(state, ids) {
    this.doc.commit(state);
    if (ids) this.view.select(ids, ids.at(-1));
    this.view.focus();
  }

  press(id) {
    const { view } = this;
    if (!view.selected.has(id)) view.select([id], id);
    else view.select(view.selected, id);
  }

  toggle(id) {
    const chosen = new Set(this.view.selected);
    if (!chosen.delete(id)) chosen.add(id);
    this.view.select(chosen, id);
    this.view.focus(id);
  }

  drag(ids, dx, dy) {
    this.base ??= this.state;
    if (ids.length) this.doc.show(docs.move(this.base, ids, dx, dy), "drag");
  }

  dropped(ids, dx, dy) {
    const { base } = this;
    this.base = null;
    if (!base) return;
    this.doc.show(base, "drag");
    if (ids.length && (dx || dy)) this.doc.commit(docs.move(base, ids, dx, dy));
  }

  marquee(a, b, add) {
    const inside = ({ x, y }) =>
      x >= Math.min(a.x, b.x) && x <= Math.max(a.x, b.x) && y >= Math.min(a.y, b.y) && y <= Math.max(a.y, b.y);
    const hit = this.view.ids().filter((id) => inside(this.view.centre(id)));
    const chosen = add ? [...new Set([...this.selection, ...hit])] : hit;
    this.view.select(chosen, hit.at(-1));
    this.view.focus();
  }

  async add(at) {
    const { view } = this;
    const place = at ?? this.free();
    const name = await this.ask("Name of the object", words.objects, view.toScreen(place));
    if (name === null) return view.focus();
    const added = docs.node(name, place.x, place.y);
    this.change(docs.addNode(this.state, added), [added.id]);
  }

  /** A place for one more object, near the item in focus. */
  free(near = this.view.current) {
    const from = this.view.elements.has(near) ? this.view.centre(near) : this.view.middle();
    return freePlace(this.state, width, from.x, from.y, 110);
  }

  ask(label, list, at, value = "", note = strange) {
    return this.combo.ask({ label, list, at, value, strange: note });
  }

  async edit(id) {
    const { view } = this;
    const item = docs.find(this.state, id);
    if (!item) return;
    const relation = docs.isEdge(item);
    const list = relation ? words.predicates : words.objects;
    const at = view.toScreen(view.centre(id));
    const name = await this.ask(relation ? "Relation" : "Name of the object", list, at, item.name);
    if (name === null || !docs.find(this.state, id)) return view.focus();
    const state = docs.rename(this.state, id, name);
    this.change(state, docs.find(state, id) ? [id] : undefined);
  }

  /** A relation from an object to another, or to a new one at a free place of the canvas. */
  async connectTo(from, to, at) {
    const { view } = this;
    if (from === to) return;
    let added = null;
    if (to === null) {
      const name = await this.ask("Name of the new object", words.objects, view.toScreen(at));
      if (name === null) return view.focus();
      added = docs.node(name, at.x, at.y);
    }
    await this.relate(from, added ?? docs.find(this.state, to), added);
  }

  async relate(from, to, added) {
    const { view } = this;
    const subject = docs.find(this.state, from);
    const middle = { x: (subject.x + to.x) / 2, y: (subject.y + to.y) / 2 };
    const label = `${subject.name} … ${to.name}`;
    const name = await this.ask(`Relation: ${label}`, words.predicates, view.toScreen(middle));
    let state = added ? docs.addNode(this.state, added) : this.state;
    if (name === null && !added) return view.focus();
    const made = name === null ? null : docs.edge(from, name, to.id);
    if (made) state = docs.addEdge(state, made);
    this.change(state, [docs.find(state, made?.id) ? made.id : to.id]);
  }

  /** By keyboard: choose what the focused object is related to. */
  async connect() {
    const { view } = this;
    const from = docs.find(this.state, view.current);
    if (!from || docs.isEdge(from)) return;
    const others = [...view.labels].filter(([id]) => id !== from.id);
    const known = others.map(([, label]) => label);
    const list = [...known, ...words.objects.filter((word) => !known.includes(word))];
    const at = view.toScreen({ x: from.x, y: from.y });
    const note = (name) => (!name || known.includes(name) ? "" : `A new object. ${strange(name)}`);
    const name = await this.ask(`Connect ${view.labels.get(from.id)} to`, list, at, "", note);
    if (name === null) return view.focus();
    const to = others.find(([, label]) => label === name);
    if (to) return this.relate(from.id, docs.find(this.state, to[0]), null);
    const place = this.free(from.id);
    const added = docs.node(name, place.x, place.y);
    return this.relate(from.id, added, added);
  }

  remove() {
    const { view } = this;
    const gone = view.selected.size ? this.selection : view.current === null ? [] : [view.current];
    const order = view.ids();
    const at = Math.min(...gone.map((id) => order.indexOf(id)));
    this.doc.commit(docs.remove(this.state, gone));
    const left = view.ids();
    const next = left[Math.min(at, left.length - 1)] ?? null;
    view.select(next === null ? [] : [next], next);
    view.focus();
  }

  undo() {
    if (this.doc.undo()) this.settle();
  }

  redo() {
    if (this.doc.redo()) this.settle();
  }

  settle() {
    this.view.select(this.selection);
    if (document.activeElement === document.body) this.view.focus();
  }

  copy() {
    const piece = docs.cut(this.state, this.selection);
    if (piece.nodes.length) this.clipboard = { piece, times: 0 };
    return piece.nodes.length;
  }

  paste() {
    if (!this.clipboard) return;
    const shift = 36 * ++this.clipboard.times;
    const [state, ids] = docs.paste(this.state, this.clipboard.piece, shift, shift);
    this.change(state, ids);
  }

  duplicate() {
    const kept = this.clipboard;
    if (this.copy()) this.paste();
    this.clipboard = kept;
  }

  reverse() {
    const id = this.view.current;
    if (this.view.isEdge(id)) this.change(docs.reverse(this.state, id), [id]);
  }

  /** Put an attribute in front of the focused object's name, or take it away. */
  attribute(word) {
    const item = docs.find(this.state, this.view.current);
    if (!item || docs.isEdge(item)) return;
    const parts = item.name.split(" ");
    const without = parts.filter((part, i) => part !== word || i === parts.length - 1);
    const name = without.length < parts.length ? without.join(" ") : `${word} ${item.name}`;
    this.doc.commit(docs.rename(this.state, item.id, docs.clean(name)));
  }

  selectAll() {
    this.view.select(this.view.ids(), this.view.current ?? undefined);
    this.view.focus();
  }

  arrange() {
    this.doc.commit(docs.place(this.state, layout(this.state, width)));
    this.view.fit();
  }

  nudge(dx, dy) {
    const ids = this.selection.filter((id) => !this.view.isEdge(id));
    if (ids.length) this.doc.commit(docs.move(this.state, ids, dx, dy));
    this.view.focus();
  }

  step(event, dx, dy) {
    const { view } = this;
    if (event.shiftKey) return this.nudge(20 * dx, 20 * dy);
    if (view.current === null) return undefined;
    const id = view.neighbour(view.current, dx, dy);
    view.select([id], id);
    return view.focus(id);
  }

  /** Put a graph in place of this one, at the places that its objects have here already; those of `ids`, if told. */
  replace(graph, source, { fresh = false } = {}) {
    let [state, added] = docs.fromGraph(graph, fresh ? docs.EMPTY : this.state);
    if (added) {
      const fixed = new Set(state.nodes.filter((n) => Number.isFinite(n.x)).map((n) => n.id));
      state = docs.place(state, layout(state, width, fixed));
    }
    this.doc.commit(state, source);
    this.view.select([]);
    if (fresh) this.view.fit();
  }

  /** Keys of the canvas; those of the whole page are in main.js. */
  key(event) {
    const command = event.ctrlKey || event.metaKey;
    const chosen = command ? this.commandOf(event) : this.plainOf(event);
    if (!chosen) return;
    event.preventDefault();
    chosen();
  }

  commandOf(event) {
    const key = event.key.toLowerCase();
    const commands = {
      a: () => this.selectAll(),
      c: () => this.copy(),
      d: () => this.duplicate(),
      v: () => this.paste(),
      x: () => this.copy() && this.remove(),
      y: () => this.redo(),
      z: () => (event.shiftKey ? this.redo() : this.undo()),
    };
    return commands[key];
  }

  plainOf(event) {
    if (event.altKey) return undefined;
    const ends = (at) => {
      const id = this.view.ids().at(at);
      if (id === undefined) return;
      this.view.select([id], id);
      this.view.focus(id);
    };
    const keys = {
      ArrowLeft: () => this.step(event, -1, 0),
      ArrowRight: () => this.step(event, 1, 0),
      ArrowUp: () => this.step(event, 0, -1),
      ArrowDown: () => this.step(event, 0, 1),
      Home: () => ends(0),
      End: () => ends(-1),
      Enter: () => this.edit(this.view.current),
      F2: () => this.edit(this.view.current),
      Delete: () => this.remove(),
      Backspace: () => this.remove(),
      c: () => this.connect(),
      s: () => this.reverse(),
      l: () => this.arrange(),
      ".": () => this.view.fit(),
      "+": () => this.view.zoom(1.1),
      "=": () => this.view.zoom(1.1),
      "-": () => this.view.zoom(1 / 1.1),
    };
    return keys[event.key];
  }
}
