// Mouse, pen and touch on the canvas. What a gesture means is told to `tools` (see editor.js); nothing is decided here.

const SLOP = 4; // pixels before a press becomes a drag
const TWICE = 500; // milliseconds between two taps that belong together; of a mouse the system decides

/** tools: {select, toggle, marquee, drag, dropped, connect, edit, add, clear}. */
export function listen(view, tools) {
  const { svg } = view;
  const pointers = new Map();
  let gesture = null;
  let last = { time: 0, id: null };
  let space = false; // held down: pans; let go without: chooses the item in focus
  let panned = false;

  const point = (event) => ({ x: event.clientX, y: event.clientY });

  svg.addEventListener("pointerdown", (event) => {
    if (event.button > 1) return;
    const id = view.itemAt(event.target);
    pointers.set(event.pointerId, point(event));
    svg.setPointerCapture(event.pointerId);
    if (pointers.size === 2) {
      if (gesture?.kind === "move" && gesture.moved) tools.dropped(gesture.ids, 0, 0);
      hide(view);
      gesture = { kind: "pinch", ...spread(pointers) };
      return;
    }
    const near = Math.hypot(event.clientX - last.x, event.clientY - last.y) < 24;
    const soon = event.timeStamp - last.time < TWICE;
    const twice = event.pointerType !== "mouse" && near && soon && last.id === id;
    const from = point(event);
    const base = { from, at: from, id, twice, moved: false };
    if (event.button === 1 || space) {
      panned = true;
      gesture = { ...base, kind: "pan" };
    } else if (event.target.closest(".port")) gesture = { ...base, kind: "wire" };
    else if (id !== null) {
      if (event.shiftKey || event.ctrlKey || event.metaKey) tools.toggle(id);
      else tools.select(id);
      gesture = { ...base, kind: "move", ids: tools.movable(id) };
    } else gesture = { ...base, kind: event.pointerType === "touch" ? "pan" : "box", add: event.shiftKey };
  });

  svg.addEventListener("pointermove", (event) => {
    const held = pointers.get(event.pointerId);
    if (!held) {
      tools.hover(view.itemAt(event.target));
      return;
    }
    pointers.set(event.pointerId, point(event));
    if (!gesture) return;
    if (gesture.kind === "pinch") {
      const now = spread(pointers);
      view.pan(now.x - gesture.x, now.y - gesture.y);
      view.zoom(now.size / gesture.size, now.x, now.y);
      Object.assign(gesture, now);
      return;
    }
    const at = point(event);
    if (!gesture.moved && Math.hypot(at.x - gesture.from.x, at.y - gesture.from.y) < SLOP) return;
    const [dx, dy] = [at.x - gesture.at.x, at.y - gesture.at.y];
    Object.assign(gesture, { moved: true, at });
    if (gesture.kind === "pan") {
      svg.classList.add("panning");
      view.pan(dx, dy);
    } else if (gesture.kind === "move") {
      const { k } = view.camera;
      tools.drag(gesture.ids, (at.x - gesture.from.x) / k, (at.y - gesture.from.y) / k);
    } else if (gesture.kind === "wire") showWire(view, gesture.id, at);
    else if (gesture.kind === "box") showBox(view, gesture.from, at);
  });

  const end = (event) => {
    if (!pointers.delete(event.pointerId) || !gesture) return;
    if (pointers.size) {
      gesture = null; // the other finger of a pinch
      return;
    }
    const done = gesture;
    gesture = null;
    svg.classList.remove("panning");
    hide(view);
    if (event.type === "pointercancel") {
      if (done.kind === "move" && done.moved) tools.dropped(done.ids, 0, 0);
      return;
    }
    const at = point(event);
    if (!done.moved) {
      last = { time: event.timeStamp, ...at, id: done.id };
      if (done.twice) setTimeout(again, 60); // after the mouse events in its name, which move the focus
      else if (done.kind === "wire") tools.select(done.id);
      else if (done.id === null) tools.clear();
      return;
    }
    last = { time: 0, id: null };
    const { k } = view.camera;
    if (done.kind === "move") tools.dropped(done.ids, (at.x - done.from.x) / k, (at.y - done.from.y) / k);
    else if (done.kind === "wire") tools.connect(done.id, target(view, at), view.toWorld(at.x, at.y));
    else if (done.kind === "box") tools.marquee(view.toWorld(done.from.x, done.from.y), view.toWorld(at.x, at.y), done.add);
  };
  // A second click or tap at the same place.
  const again = () => {
    const { id, x, y } = last;
    if (x === undefined) return;
    last = { time: 0, id: null };
    if (id === null) tools.add(view.toWorld(x, y));
    else tools.edit(id);
  };
  svg.addEventListener("dblclick", again);
  svg.addEventListener("pointerup", end);
  svg.addEventListener("pointercancel", end);
  svg.addEventListener("pointerleave", () => tools.hover(null));

  svg.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) view.zoom(Math.exp(-event.deltaY / 240), event.clientX, event.clientY);
      else view.pan(event.shiftKey ? -event.deltaY : -event.deltaX, event.shiftKey ? 0 : -event.deltaY);
    },
    { passive: false },
  );

  const typing = (event) => event.target.closest?.("input, textarea, select, button");
  window.addEventListener("keydown", (event) => {
    if (event.key !== " " || typing(event)) return;
    event.preventDefault();
    if (!space) panned = false;
    space = true;
    svg.classList.add("pannable");
  });
  window.addEventListener("keyup", (event) => {
    if (event.key !== " ") return;
    if (space && !panned && view.hasFocus()) tools.toggle(view.current);
    space = false;
    svg.classList.remove("pannable");
  });
}

function spread(pointers) {
  const [a, b] = [...pointers.values()];
  return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, size: Math.max(Math.hypot(a.x - b.x, a.y - b.y), 1) };
}

/** The object under a point of the screen, a pointer being captured. */
function target(view, at) {
  const id = view.itemAt(document.elementFromPoint(at.x, at.y) ?? view.svg);
  return id !== null && !view.isEdge(id) ? id : null;
}

function showWire(view, id, at) {
  const from = view.centre(id);
  const to = view.toWorld(at.x, at.y);
  view.wire.removeAttribute("hidden");
  view.wire.setAttribute("d", `M${from.x} ${from.y}L${to.x} ${to.y}`);
  const over = target(view, at);
  for (const [other, { root }] of view.elements) root.classList.toggle("drop", other === over && other !== id);
}

function showBox(view, from, at) {
  const [a, b] = [view.toWorld(from.x, from.y), view.toWorld(at.x, at.y)];
  view.box.removeAttribute("hidden");
  const size = { x: Math.min(a.x, b.x), y: Math.min(a.y, b.y), width: Math.abs(a.x - b.x), height: Math.abs(a.y - b.y) };
  for (const [name, value] of Object.entries(size)) view.box.setAttribute(name, value);
}

function hide(view) {
  view.wire.setAttribute("hidden", "");
  view.box.setAttribute("hidden", "");
  for (const { root } of view.elements.values()) root.classList.remove("drop");
}
