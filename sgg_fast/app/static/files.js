// In and out of files: dropped and opened ones are read by the server, as infer.py reads them; downloads.

import { send } from "./api.js";
import { toJson } from "./doc.js";

/** What the server read in a file: {graphs, notices}, or {error}. */
export async function read(file) {
  if (file.size > 8 * 1024 * 1024) return { error: `${file.name}: over 8 MiB` };
  const path = `/api/file?name=${encodeURIComponent(file.name)}`;
  return (await send("POST", path, { body: await file.arrayBuffer() })).json();
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** A file name that says what is in it. */
export const stem = (state) =>
  state.nodes.map((n) => n.name).join("-").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "") || "graph";

export const jsonFile = (state) => new Blob([`${toJson(state)}\n`], { type: "application/json" });

/** The canvas as a drawing of its own, its colours written out. */
export function svgFile(view) {
  const copy = view.svg.cloneNode(true);
  const look = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-family", "font-size", "font-weight", "opacity"];
  const originals = view.svg.querySelectorAll("*");
  copy.querySelectorAll("*").forEach((element, i) => {
    const style = getComputedStyle(originals[i]);
    if (element.closest("defs")) return;
    for (const name of look) element.setAttribute(name, style.getPropertyValue(name));
    for (const name of ["class", "tabindex", "role", "data-id", "data-line", "aria-selected"]) element.removeAttribute(name);
  });
  copy.querySelectorAll("defs, [hidden], #background").forEach((element) => element.remove());
  // Handles to draw relations from are no part of the graph.
  copy.querySelectorAll("g > g > g > g").forEach((element) => element.querySelector("circle") && element.remove());
  const world = copy.querySelector("#world");
  world.removeAttribute("transform");
  const box = view.world.getBBox();
  const edges = [box.x - 20, box.y - 20, box.width + 40, box.height + 40].map((value) => Math.round(value));
  copy.setAttribute("viewBox", edges.join(" "));
  copy.setAttribute("width", edges[2]);
  copy.setAttribute("height", edges[3]);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  for (const name of ["id", "class", "tabindex", "aria-label", "aria-describedby"]) copy.removeAttribute(name);
  return new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
}
