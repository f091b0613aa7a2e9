// The graph being edited: plain values, never changed in place, and the steps back and forth between them.
//
// state: {nodes: [{id, name, x, y}], edges: [{id, from, name, to}]}; their order is the order in the JSON.

let next = 1;
const fresh = () => next++;

export const EMPTY = { nodes: [], edges: [] };

export class Doc extends EventTarget {
  constructor() {
    super();
    this.state = EMPTY;
    this.past = [];
    this.future = [];
  }

  /** Go on to `state`; one step back for the user. `source` names the field whose text it came from. */
  commit(state, source = "canvas") {
    if (state === this.state) return;
    this.past.push(this.state);
    if (this.past.length > 500) this.past.shift();
    this.future = [];
    this.show(state, source);
  }

  /** Show `state` without a step (while something is dragged). */
  show(state, source = "canvas") {
    this.state = state;
    this.dispatchEvent(new CustomEvent("change", { detail: { source } }));
  }

  undo() {
    if (!this.past.length) return false;
    this.future.push(this.state);
    this.show(this.past.pop());
    return true;
  }

  redo() {
    if (!this.future.length) return false;
    this.past.push(this.state);
    this.show(this.future.pop());
    return true;
  }
}

export const node = (name, x, y) => ({ id: fresh(), name, x, y });
export const edge = (from, name, to) => ({ id: fresh(), from, name, to });
export const find = (state, id) => state.nodes.find((n) => n.id === id) ?? state.edges.find((e) => e.id === id);
export const isEdge = (item) => item !== undefined && "from" in item;

/** White space as the readers of graphs leave it. */
export const clean = (name) => name.trim().replace(/\s+/g, " ");

export function addNode(state, added) {
  return { ...state, nodes: [...state.nodes, added] };
}

/** With the relation; the same state where it is there already or leads to its own subject. */
export function addEdge(state, added) {
  const same = (e) => e.from === added.from && e.to === added.to && e.name === added.name;
  if (added.from === added.to || state.edges.some(same)) return state;
  return { ...state, edges: [...state.edges, added] };
}

export function rename(state, id, name) {
  const given = (item) => (item.id === id ? { ...item, name } : item);
  if (find(state, id)?.name === name) return state;
  const edges = state.edges.map(given);
  const keys = edges.map((e) => `${e.from} ${e.to} ${e.name}`);
  return { nodes: state.nodes.map(given), edges: edges.filter((_, i) => keys.indexOf(keys[i]) === i) };
}

/** With the ends of a relation exchanged. */
export function reverse(state, id) {
  return { ...state, edges: state.edges.map((e) => (e.id === id ? { ...e, from: e.to, to: e.from } : e)) };
}

/** Without these items, and without the relations of what is gone. */
export function remove(state, ids) {
  const gone = new Set(ids);
  if (!gone.size) return state;
  return {
    nodes: state.nodes.filter((n) => !gone.has(n.id)),
    edges: state.edges.filter((e) => !gone.has(e.id) && !gone.has(e.from) && !gone.has(e.to)),
  };
}

export function move(state, ids, dx, dy) {
  const moved = new Set(ids);
  return { ...state, nodes: state.nodes.map((n) => (moved.has(n.id) ? { ...n, x: n.x + dx, y: n.y + dy } : n)) };
}

export function place(state, positions) {
  return { ...state, nodes: state.nodes.map((n) => ({ ...n, ...(positions.get(n.id) ?? {}) })) };
}

/** The chosen objects and the relations among them, as a clipboard holds them. */
export function cut(state, ids) {
  const chosen = new Set(ids);
  const nodes = state.nodes.filter((n) => chosen.has(n.id));
  const kept = new Set(nodes.map((n) => n.id));
  return { nodes, edges: state.edges.filter((e) => kept.has(e.from) && kept.has(e.to)) };
}

/** [state with a copy of `piece`, ids of the copies]. */
export function paste(state, piece, dx = 36, dy = 36) {
  const ids = new Map(piece.nodes.map((n) => [n.id, fresh()]));
  const nodes = piece.nodes.map((n) => ({ ...n, id: ids.get(n.id), x: n.x + dx, y: n.y + dy }));
  const edges = piece.edges.map((e) => edge(ids.get(e.from), e.name, ids.get(e.to)));
  return [{ nodes: [...state.nodes, ...nodes], edges: [...state.edges, ...edges] }, nodes.map((n) => n.id)];
}

/** sg2im's form. */
export function toGraph(state) {
  const index = new Map(state.nodes.map((n, i) => [n.id, i]));
  return {
    objects: state.nodes.map((n) => n.name),
    relationships: state.edges.map((e) => [index.get(e.from), e.name, index.get(e.to)]),
  };
}

/** A relation a line, as people write it. */
export function toJson(state) {
  const graph = toGraph(state);
  const lines = graph.relationships.map((r) => `\n    ${JSON.stringify(r).replaceAll(",", ", ")}`);
  const objects = graph.objects.map((name) => JSON.stringify(name)).join(", ");
  return `{\n  "objects": [${objects}],\n  "relationships": [${lines.join(",")}${lines.length ? "\n  " : ""}]\n}`;
}

/** Each object's name, numbered where there are several of one, as in the line of words. */
export function labels(state) {
  const total = new Map();
  const seen = new Map();
  for (const { name } of state.nodes) total.set(name, (total.get(name) ?? 0) + 1);
  return new Map(
    state.nodes.map(({ id, name }) => {
      seen.set(name, (seen.get(name) ?? 0) + 1);
      return [id, total.get(name) > 1 ? `${name}#${seen.get(name)}` : name];
    }),
  );
}

/**
 * [state of a graph, whether any object is new]. Objects that `old` has under the same label keep their id and place;
 * as many as are left over on both sides are taken for renamed, in order.
 */
export function fromGraph(graph, old = EMPTY) {
  const fits = old.nodes.length > 0;
  const before = new Map([...labels(old)].map(([id, label]) => [label, id]));
  const bare = { nodes: graph.objects.map((name, i) => ({ id: i, name, x: 0, y: 0 })), edges: [] };
  const wanted = [...labels(bare).values()];
  const kept = wanted.map((label) => (fits ? before.get(label) : undefined));
  const used = new Set(kept);
  const spare = old.nodes.filter((n) => !used.has(n.id));
  const renamed = spare.length === kept.filter((id) => id === undefined).length ? spare.map((n) => n.id) : [];
  let added = false;
  const nodes = graph.objects.map((name, i) => {
    const known = find(old, kept[i] ?? renamed.shift());
    added ||= known === undefined;
    return known ? { ...known, name } : node(name, NaN, NaN);
  });
  const edges = graph.relationships.map(([from, name, to]) => {
    const same = (e) => e.from === nodes[from].id && e.to === nodes[to].id && e.name === name;
    return old.edges.find(same) ?? edge(nodes[from].id, name, nodes[to].id);
  });
  return [{ nodes, edges }, added];
}

/** A state that was stored, its numbers kept clear of. */
export function revive(state) {
  const ids = [...state.nodes, ...state.edges].map((item) => item.id);
  next = Math.max(next, ...ids.map((id) => id + 1));
  return state;
}
