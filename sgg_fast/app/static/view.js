// The drawing of the graph: one SVG element an item, kept by its id and updated in place, so that clicks, focus and
// screen readers hold on to it. Objects and relations are the options of one list with several chosen.

import { isEdge, labels } from "./doc.js";
import { HEIGHT } from "./layout.js";
import { parted, unseen } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const UNSEEN = "a word that the model never saw in training";
const measure = document.createElement("canvas").getContext("2d");
const widths = new Map();

function make(tag, attributes = {}, parent) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent?.append(element);
  return element;
}

function textWidth(text, font) {
  const key = `${font} ${text}`;
  if (!widths.has(key)) {
    measure.font = font;
    widths.set(key, measure.measureText(text).width);
  }
  return widths.get(key);
}

const FONT = "system-ui, sans-serif";
const BUTTONS = 68; // pixels of the canvas's edge that they take
const brief = (name) => (name.length > 32 ? `${name.slice(0, 30)}…` : name);

/** Pixels of an object's box. */
export const width = (node) => Math.max(72, Math.ceil(textWidth(`${brief(node.name)}#1`, `600 15px ${FONT}`)) + 40);

export class View extends EventTarget {
  constructor(svg) {
    super();
    this.svg = svg;
    this.camera = { x: 0, y: 0, k: 1 };
    this.fitted = false; // whether the camera is where fit() put it
    this.size = null;
    this.state = { nodes: [], edges: [] };
    this.selected = new Set();
    this.current = null; // the item that Tab reaches
    this.bad = new Map(); // id -> what is wrong with it
    this.elements = new Map();
    this.grid = svg.querySelector("#grid");
    this.world = svg.querySelector("#world");
    this.lines = make("g", { "aria-hidden": "true" }, this.world);
    this.list = make("g", {}, this.world);
    this.nodes = make("g", { role: "presentation" }, this.list);
    this.edges = make("g", { role: "presentation" }, this.list);
    this.wire = make("path", { class: "wire", hidden: "" }, this.world);
    this.box = make("rect", { class: "marquee", hidden: "" }, this.world);
  }

  /** Bring the elements to `state`. */
  render(state = this.state) {
    this.state = state;
    this.labels = labels(state);
    const there = new Set();
    const degree = new Map();
    for (const e of state.edges) for (const id of [e.from, e.to]) degree.set(id, (degree.get(id) ?? 0) + 1);
    for (const n of state.nodes) there.add(n.id) && this.renderNode(n, degree.get(n.id) ?? 0);
    const bends = bendOf(state.edges);
    const at = new Map(state.nodes.map((n) => [n.id, n]));
    for (const e of state.edges) there.add(e.id) && this.renderEdge(e, at.get(e.from), at.get(e.to), bends.get(e.id));
    for (const [id, element] of this.elements) {
      if (there.has(id)) continue;
      element.root.remove();
      element.line?.remove();
      this.elements.delete(id);
      this.selected.delete(id);
      this.bad.delete(id);
    }
    const ids = this.ids();
    if (!there.has(this.current)) this.current = ids[0] ?? null;
    for (const [id, { root }] of this.elements) {
      root.setAttribute("tabindex", id === this.current ? "0" : "-1");
      root.setAttribute("aria-selected", String(this.selected.has(id)));
    }
    // A list must have options: an empty one is only a place to add to.
    const roles = { role: "listbox", "aria-label": "Scene graph", "aria-multiselectable": "true" };
    for (const [name, value] of Object.entries(roles)) {
      if (ids.length) this.list.setAttribute(name, value);
      else this.list.removeAttribute(name);
    }
    this.svg.setAttribute("tabindex", ids.length ? "-1" : "0");
    this.aim();
  }

  ids() {
    return [...this.state.nodes, ...this.state.edges].map((item) => item.id);
  }

  renderNode(n, degree) {
    let e = this.elements.get(n.id);
    if (!e) {
      const root = make("g", { class: "node", role: "option", "data-id": n.id }, this.nodes);
      e = { root, rect: make("rect", { rx: 12, height: HEIGHT, y: -HEIGHT / 2 }, root) };
      e.text = make("text", { y: 5, "text-anchor": "middle" }, root);
      e.parts = ["attribute", "name", "number"].map((kind) => make("tspan", { class: kind }, e.text));
      e.port = make("g", { class: "port" }, root);
      make("circle", { r: 16, class: "reach" }, e.port);
      make("circle", { r: 7 }, e.port);
      make("path", { d: "M-3 0H3M0 -3V3" }, e.port);
      this.elements.set(n.id, e);
    }
    const wide = width(n);
    const label = this.labels.get(n.id);
    e.root.setAttribute("transform", `translate(${n.x} ${n.y})`);
    e.rect.setAttribute("width", wide);
    e.rect.setAttribute("x", -wide / 2);
    e.port.setAttribute("transform", `translate(${wide / 2} 0)`);
    const [attribute, name] = parted(brief(n.name));
    const number = label.slice(n.name.length);
    [attribute && `${attribute} `, name, number].forEach((text, i) => setText(e.parts[i], text));
    this.mark(e.root, n, `${label}, object, ${degree} relation${degree === 1 ? "" : "s"}`);
  }

  renderEdge(edge, from, to, bend) {
    let e = this.elements.get(edge.id);
    if (!e) {
      const line = make("g", { class: "line", "data-line": edge.id }, this.lines);
      e = { line, path: make("path", { class: "curve" }, line), head: make("path", { class: "head" }, line) };
      e.root = make("g", { class: "edge", role: "option", "data-id": edge.id }, this.edges);
      e.rect = make("rect", { rx: 11, height: 24, y: -12 }, e.root);
      e.text = make("text", { y: 4, "text-anchor": "middle" }, e.root);
      this.elements.set(edge.id, e);
    }
    const shown = brief(edge.name);
    const wide = Math.ceil(textWidth(shown, `500 12.5px ${FONT}`)) + 20;
    const curve = curveOf(from, to, bend);
    e.path.setAttribute("d", curve.path);
    e.head.setAttribute("d", curve.head);
    e.root.setAttribute("transform", `translate(${curve.x} ${curve.y})`);
    e.rect.setAttribute("width", wide);
    e.rect.setAttribute("x", -wide / 2);
    setText(e.text, shown);
    e.line.classList.toggle("selected", this.selected.has(edge.id));
    this.mark(e.root, edge, `${this.labels.get(edge.from)} ${edge.name} ${this.labels.get(edge.to)}, relation`);
  }

  /** Classes and the accessible name of an item. */
  mark(root, item, label) {
    const strange = unseen(item.name);
    const wrong = this.bad.get(item.id);
    root.classList.toggle("selected", this.selected.has(item.id));
    root.classList.toggle("unseen", strange);
    root.classList.toggle("bad", wrong !== undefined);
    root.setAttribute("aria-label", [label, strange && UNSEEN, wrong].filter(Boolean).join(", "));
    let title = root.querySelector(":scope > title");
    const hint = wrong ?? (strange ? `${item.name}: ${UNSEEN}; expect little of it` : "");
    if (hint && !title) title = make("title", {}, root);
    if (hint) setText(title, hint);
    else title?.remove();
  }

  element(id) {
    return this.elements.get(id)?.root;
  }

  /** Middle of an item, in the graph's units. */
  centre(id) {
    const [x, y] = this.element(id).getAttribute("transform").match(/-?[\d.]+(e-?\d+)?/g).map(Number);
    return { x, y };
  }

  select(ids, current = undefined) {
    this.selected = new Set(ids);
    if (current !== undefined) this.current = current;
    else if (this.selected.size && !this.selected.has(this.current)) this.current = [...this.selected].at(-1);
    this.render();
    this.dispatchEvent(new Event("select"));
  }

  /** Focus an item, or the canvas where there is none. */
  focus(id = this.current) {
    const element = this.element(id);
    if (element) {
      this.current = id;
      for (const [other, { root }] of this.elements) root.setAttribute("tabindex", other === id ? "0" : "-1");
      element.focus({ preventScroll: true });
      this.reveal(id);
    } else {
      this.svg.focus({ preventScroll: true });
    }
  }

  hasFocus() {
    return this.svg.contains(document.activeElement);
  }

  // The camera: screen = world * k + (x, y), from the canvas's own corner.

  aim() {
    const { x, y, k } = this.camera;
    this.world.setAttribute("transform", `translate(${x} ${y}) scale(${k})`);
    this.grid.setAttribute("patternTransform", `translate(${x} ${y}) scale(${k})`);
  }

  toWorld(clientX, clientY) {
    const box = this.svg.getBoundingClientRect();
    const { x, y, k } = this.camera;
    return { x: (clientX - box.left - x) / k, y: (clientY - box.top - y) / k };
  }

  toScreen({ x, y }) {
    const box = this.svg.getBoundingClientRect();
    return { x: x * this.camera.k + this.camera.x + box.left, y: y * this.camera.k + this.camera.y + box.top };
  }

  middle() {
    const box = this.svg.getBoundingClientRect();
    return this.toWorld(box.left + box.width / 2, box.top + box.height / 2);
  }

  /** The canvas has another size: all in sight again if it was, else the same middle. */
  resize() {
    const { width: wide, height: high } = this.svg.getBoundingClientRect();
    const [dx, dy] = this.size ? [(wide - this.size[0]) / 2, (high - this.size[1]) / 2] : [0, 0];
    this.size = [wide, high];
    if (this.fitted) this.fit();
    else if (dx || dy) this.pan(dx, dy);
  }

  pan(dx, dy) {
    this.fitted = false;
    this.camera = { ...this.camera, x: this.camera.x + dx, y: this.camera.y + dy };
    this.aim();
    this.dispatchEvent(new Event("camera"));
  }

  /** Zoom by `factor` around a point of the screen, the canvas's middle unless given. */
  zoom(factor, clientX, clientY) {
    const box = this.svg.getBoundingClientRect();
    const px = (clientX ?? box.left + box.width / 2) - box.left;
    const py = (clientY ?? box.top + box.height / 2) - box.top;
    const k = Math.min(4, Math.max(0.1, this.camera.k * factor));
    this.fitted = false;
    const by = k / this.camera.k;
    this.camera = { k, x: px - (px - this.camera.x) * by, y: py - (py - this.camera.y) * by };
    this.aim();
    this.dispatchEvent(new Event("camera"));
  }

  /** All of the graph in sight, no larger than life. */
  fit() {
    const box = this.svg.getBoundingClientRect();
    const { nodes } = this.state;
    if (!nodes.length || !box.width) return;
    const left = Math.min(...nodes.map((n) => n.x - width(n) / 2));
    const right = Math.max(...nodes.map((n) => n.x + width(n) / 2));
    const top = Math.min(...nodes.map((n) => n.y - HEIGHT / 2));
    const bottom = Math.max(...nodes.map((n) => n.y + HEIGHT / 2));
    this.fitted = true;
    // Clear of the buttons that float above and below.
    const margin = Math.min(56, box.width / 12);
    const tall = box.height - 2 * BUTTONS;
    const k = Math.min(1, (box.width - 2 * margin) / (right - left), tall / (bottom - top));
    this.camera = { k, x: box.width / 2 - (k * (left + right)) / 2, y: box.height / 2 - (k * (top + bottom)) / 2 };
    this.aim();
    this.dispatchEvent(new Event("camera"));
  }

  /** Move the camera as little as brings an item into sight. */
  reveal(id) {
    const box = this.svg.getBoundingClientRect();
    const at = this.toScreen(this.centre(id));
    const over = (value, low, high) => (value < low ? low - value : value > high ? high - value : 0);
    const dx = over(at.x, box.left + 50, box.right - 50);
    const dy = over(at.y, box.top + BUTTONS, box.bottom - BUTTONS);
    if (dx || dy) this.pan(dx, dy);
  }

  /** The item next to `id` towards (dx, dy); itself where there is none. */
  neighbour(id, dx, dy) {
    const from = this.centre(id);
    let best = id;
    let least = Infinity;
    for (const other of this.ids()) {
      const to = this.centre(other);
      const along = (to.x - from.x) * dx + (to.y - from.y) * dy;
      const across = Math.abs((to.x - from.x) * dy) + Math.abs((to.y - from.y) * dx);
      if (other === id || along <= 4) continue;
      if (along + 2 * across < least) [best, least] = [other, along + 2 * across];
    }
    return best;
  }

  itemAt(target) {
    const root = target.closest?.("[data-id]");
    return root ? Number(root.dataset.id) : null;
  }

  isEdge(id) {
    return isEdge(this.state.edges.find((e) => e.id === id));
  }
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Sideways bend of each relation: those between the same two objects part. */
function bendOf(edges) {
  const pairs = new Map();
  for (const e of edges) {
    const key = [e.from, e.to].sort((a, b) => a - b).join();
    pairs.set(key, [...(pairs.get(key) ?? []), e]);
  }
  const bends = new Map();
  for (const several of pairs.values()) {
    several.forEach((e, i) => {
      const bend = (i - (several.length - 1) / 2) * 56;
      bends.set(e.id, e.from < e.to ? bend : -bend);
    });
  }
  return bends;
}

/** Where the ray from a box's middle towards (dx, dy) leaves it, some pixels further out. */
function border(node, dx, dy, gap) {
  const [w, h] = [width(node) / 2 + gap, HEIGHT / 2 + gap];
  const scale = Math.min(dx ? w / Math.abs(dx) : Infinity, dy ? h / Math.abs(dy) : Infinity);
  return { x: node.x + dx * scale, y: node.y + dy * scale };
}

function curveOf(from, to, bend) {
  const [dx, dy] = [to.x - from.x || 0.1, to.y - from.y];
  const length = Math.hypot(dx, dy);
  const control = {
    x: (from.x + to.x) / 2 - (dy / length) * bend * 2,
    y: (from.y + to.y) / 2 + (dx / length) * bend * 2,
  };
  const start = border(from, control.x - from.x, control.y - from.y, 2);
  const end = border(to, control.x - to.x, control.y - to.y, 5);
  const x = start.x / 4 + control.x / 2 + end.x / 4;
  const y = start.y / 4 + control.y / 2 + end.y / 4;
  const angle = Math.atan2(end.y - control.y, end.x - control.x);
  const wing = (turn) =>
    `${(end.x - 9 * Math.cos(angle + turn)).toFixed(1)} ${(end.y - 9 * Math.sin(angle + turn)).toFixed(1)}`;
  const point = (p) => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`;
  return {
    path: `M${point(start)}Q${point(control)} ${point(end)}`,
    head: `M${wing(0.45)}L${point(end)}L${wing(-0.45)}Z`,
    x: Number(x.toFixed(1)),
    y: Number(y.toFixed(1)),
  };
}
