// Where objects stand when nobody has put them anywhere: springs, and directions that the relations tell themselves.

export const HEIGHT = 40;
const GAP = 64;

const DIRECTIONS = [
  [/\b(above|over|top|flying|riding|rides|standing|stands|sitting|sits|on|onto|upon)\b/, 0, -1],
  [/\b(below|under|underneath|beneath)\b/, 0, 1],
  [/\bleft\b/, -1, 0],
  [/\bright\b/, 1, 0],
];

/** Pixels of a relation's name, about. */
const label = (name) => 7 * Math.min(name.length, 32) + 24;

const direction = (name) => DIRECTIONS.find(([words]) => words.test(name))?.slice(1) ?? [0, 0];

/** Map of id -> {x, y} (centres). width(node): pixels. fixed: ids that stay. The same graph gives the same places. */
export function layout(state, width, fixed = new Set()) {
  const { nodes, edges } = state;
  const num = nodes.length;
  const index = new Map(nodes.map((n, i) => [n.id, i]));
  const columns = Math.max(1, Math.ceil(Math.sqrt(num * 1.2)));
  const at = nodes.map((n, i) =>
    fixed.has(n.id) || Number.isFinite(n.x)
      ? { x: n.x, y: n.y }
      : { x: (i % columns) * 190 + (Math.floor(i / columns) % 2) * 60, y: Math.floor(i / columns) * 120 },
  );
  if (!fixed.size) at.forEach((p, i) => Object.assign(p, { x: (i % columns) * 190, y: Math.floor(i / columns) * 120 }));
  const links = edges.map((e) => {
    const [dx, dy] = direction(e.name);
    const reach = (width(nodes[index.get(e.from)]) + width(nodes[index.get(e.to)])) / 2 + 110;
    return { a: index.get(e.from), b: index.get(e.to), dx: dx * reach, dy: dy * 140, reach, wide: label(e.name) };
  });
  const free = nodes.map((n) => !fixed.has(n.id));
  const rounds = num > 400 ? 0 : num > 120 ? 40 : 260;
  for (let round = 0; round < rounds; round++) {
    const heat = 0.5 * (1 - round / rounds) + 0.05;
    const push = nodes.map(() => ({ x: 0, y: 0 }));
    repel(nodes, at, push, width);
    part(links, nodes, at, push, width);
    gather(at, push);
    for (const { a, b, dx, dy, reach } of links) {
      const from = at[a];
      const to = at[b];
      let x = to.x - from.x;
      let y = to.y - from.y;
      if (dx || dy) {
        // The subject belongs at (dx, dy) from the object; across that direction it is held loosely.
        x = (x + dx) * (dx ? 0.6 : 0.25);
        y = (y + dy) * (dy ? 0.6 : 0.25);
      } else {
        const length = Math.hypot(x, y) || 1;
        x *= ((length - reach) / length) * 0.4;
        y *= ((length - reach) / length) * 0.4;
      }
      push[a].x += x;
      push[a].y += y;
      push[b].x -= x;
      push[b].y -= y;
    }
    at.forEach((p, i) => {
      if (!free[i]) return;
      p.x += Math.max(-60, Math.min(60, push[i].x * heat));
      p.y += Math.max(-60, Math.min(60, push[i].y * heat));
    });
  }
  // On a grid, so that what is nearly level is level.
  const snap = (value) => Math.round(value / 20) * 20;
  const put = ({ x, y }, i) => (free[i] ? { x: snap(x), y: snap(y) } : { x, y });
  return new Map(nodes.map((n, i) => [n.id, put(at[i], i)]));
}

/** Objects that are near push each other away; those that overlap the more so. */
function repel(nodes, at, push, width) {
  for (let i = 0; i < nodes.length; i++) {
    for (let j = 0; j < i; j++) {
      let x = at[i].x - at[j].x;
      let y = at[i].y - at[j].y;
      if (!x && !y) x = 1 + i - j;
      const wide = (width(nodes[i]) + width(nodes[j])) / 2 + GAP;
      const near = Math.max(Math.abs(x) / wide, Math.abs(y) / (HEIGHT + GAP));
      if (near > 1.6) continue;
      const force = near < 1 ? 46 * (1 - near) + 8 : 8 * (1.6 - near);
      const length = Math.hypot(x / wide, y / (HEIGHT + GAP)) || 1;
      push[i].x += (x / wide / length) * force;
      push[j].x -= (x / wide / length) * force;
      push[i].y += (y / (HEIGHT + GAP) / length) * force;
      push[j].y -= (y / (HEIGHT + GAP) / length) * force;
    }
  }
}

/** Objects that nothing relates stay near the others. */
function gather(at, push) {
  const mean = (axis) => at.reduce((sum, p) => sum + p[axis], 0) / at.length;
  const [x, y] = [mean("x"), mean("y")];
  at.forEach((p, i) => {
    push[i].x += (x - p.x) * 0.09;
    push[i].y += (y - p.y) * 0.09;
  });
}

/** Names of relations keep clear of each other and of objects: the ends of the relation give way, the shorter way. */
function part(links, nodes, at, push, width) {
  const middle = ({ a, b }) => ({ x: (at[a].x + at[b].x) / 2, y: (at[a].y + at[b].y) / 2 });
  const names = links.map((link) => ({ ...middle(link), wide: link.wide, high: 24, moves: [link.a, link.b] }));
  const boxes = nodes.map((n, i) => ({ ...at[i], wide: width(n), high: HEIGHT, moves: [i] }));
  names.forEach((one, i) => {
    for (const other of [...names.slice(0, i), ...boxes]) {
      if (other.moves.length === 1 && one.moves.includes(other.moves[0])) continue;
      const x = one.x - other.x;
      const y = one.y - other.y;
      const across = (one.wide + other.wide) / 2 + 14 - Math.abs(x);
      const down = (one.high + other.high) / 2 + 14 - Math.abs(y);
      if (across <= 0 || down <= 0) continue;
      const axis = across < 2 * down ? "x" : "y";
      const force = axis === "x" ? across * (x < 0 ? -2 : 2) : down * (y < 0 ? -2 : 2);
      for (const end of one.moves) push[end][axis] += force;
      for (const end of other.moves) push[end][axis] -= force;
    }
  });
}

/** A free place near (x, y) for an object of that width. */
export function freePlace(state, width, x, y, own) {
  const taken = (px, py) =>
    state.nodes.some(
      (n) => Math.abs(n.x - px) < (width(n) + own) / 2 + 24 && Math.abs(n.y - py) < HEIGHT + 24,
    );
  for (let ring = 0; ring < 40; ring++) {
    const count = Math.max(1, ring * 8);
    for (let k = 0; k < count; k++) {
      const angle = (2 * Math.PI * k) / count;
      const [px, py] = [x + ring * 42 * Math.cos(angle), y + ring * 32 * Math.sin(angle)];
      if (!taken(px, py)) return { x: Math.round(px), y: Math.round(py) };
    }
  }
  return { x, y };
}
