// The page: everything wired together.

import { Gone, Refused, adopt, get } from "./api.js";
import { Combo } from "./combo.js";
import { Doc, clean, labels, revive, toGraph } from "./doc.js";
import { Drawer } from "./drawing.js";
import { Editor } from "./editor.js";
import { EXAMPLES } from "./examples.js";
import * as files from "./files.js";
import { History } from "./history.js";
import { Inspector } from "./inspector.js";
import { Picture } from "./picture.js";
import { Settings } from "./settings.js";
import { Source } from "./source.js";
import { View } from "./view.js";
import { learn } from "./words.js";

const $ = (id) => document.getElementById(id);
const STORE = "sgg_fast.page";

const doc = new Doc();
const view = new View($("canvas"));
const picture = new Picture($("picture"));
const settings = new Settings($("settings"));
const history = new History($("history"));
const drawer = new Drawer(() => model !== null);
const combo = new Combo($("combo"));
const editor = new Editor(doc, view, combo, (id) => picture.attend(id ?? picture.pinned));
const inspector = new Inspector($("inspector"), editor, view, picture);
const source = new Source(doc, editor, view);
let model = null;

const say = (text) => ($("status").textContent = text);

// The graph on the canvas, and what hangs on it.

function refresh() {
  view.render(doc.state);
  inspector.refresh();
  $("hint").hidden = doc.state.nodes.length > 0;
  $("undo").setAttribute("aria-disabled", String(!doc.past.length));
  $("redo").setAttribute("aria-disabled", String(!doc.future.length));
}
doc.addEventListener("change", refresh);
doc.addEventListener("change", ({ detail }) => detail.source !== "drag" && keep());
settings.addEventListener("change", () => keep());
view.addEventListener("camera", () => ($("zoom").textContent = `${Math.round(100 * view.camera.k)} %`));

/** In this tab, and for the next one that is opened. */
function keep() {
  const kept = JSON.stringify({ state: doc.state, settings: settings.read() });
  for (const store of [sessionStorage, localStorage]) {
    try {
      store.setItem(STORE, kept);
    } catch {
      // Full or forbidden: the page works without.
    }
  }
}

function kept() {
  try {
    const found = JSON.parse(sessionStorage.getItem(STORE) ?? localStorage.getItem(STORE));
    return Array.isArray(found?.state?.nodes) ? { ...found, state: revive(found.state) } : null;
  } catch {
    return null;
  }
}

// The server: its model, and whether it is still there.

function banner(text) {
  if ($("banner").textContent !== text) $("banner").textContent = text;
  $("banner").hidden = !text;
}

function chip(state, text) {
  $("model").dataset.state = state;
  $("model-text").textContent = text;
}

async function watch() {
  let wait = 1500;
  try {
    const found = await get("/api/model", { timeout: 3000 });
    banner("");
    if (found.state === "ready" && found.weights !== model?.weights) meet(found);
    else if (found.state === "loading") [wait] = [500, chip("loading", "Loading the model…")];
    else if (found.state === "failed") banner(`The model cannot be loaded: ${found.error}`);
    if (model) chip("ready", model.model === "toy" ? "Toy model, ready" : `${model.model}, ready`);
  } catch (error) {
    const gone = "The server has stopped. Start it again with python -m sgg_fast.app; this page keeps your graph.";
    const old = "This page needs the address that the server printed when it started. Your graph is kept.";
    banner(error instanceof Gone ? gone : error instanceof Refused && error.status === 401 ? old : error.message);
    chip("gone", "No server");
  }
  setTimeout(watch, document.hidden ? 5000 : wait);
}

function meet(found) {
  model = found;
  learn(found.words);
  settings.learn(found, start?.settings ?? {});
  refresh();
}
window.addEventListener("hashchange", () => adopt() && banner(""));

// Drawing.

function draw() {
  const fault = settings.fault();
  if (fault) return say(fault);
  if (!doc.state.nodes.length) return say("There is nothing to draw: add an object first.");
  const { state } = doc;
  const request = { graph: toGraph(state), settings: settings.request(), maps: $("maps").checked };
  return drawer.draw({ ...request, state });
}

function stop() {
  if (drawer.stop()) say("Stopping…");
}

function running(on) {
  $("stop").setAttribute("aria-disabled", String(!on));
  $("picture").classList.toggle("drawing", on);
  if (!on) {
    $("progress").value = 0;
    $("step").textContent = "";
  }
}

drawer.addEventListener("begin", () => {
  running(true);
  $("progress").removeAttribute("value");
  $("step").textContent = model ? "Starting" : "Model is loading";
  say("");
  // On a narrow page the picture lies below the graph.
  if (matchMedia("(max-width: 900px)").matches) $("picture").scrollIntoView({ behavior: "smooth" });
});

drawer.addEventListener("progress", ({ detail: at }) => {
  if (at.state === "waiting") {
    const line = at.ahead > 0 ? `${at.ahead} before yours` : "Next in line";
    $("step").textContent = model ? line : "Model is loading";
    return;
  }
  if (!at.step) return;
  const left = (at.seconds / at.step) * (at.steps - at.step);
  $("progress").max = at.steps;
  $("progress").value = at.step;
  $("step").textContent = `Step ${at.step} of ${at.steps}${left >= 1 ? ` · ${Math.round(left)} s` : ""}`;
  if (at.preview) picture.progress(at.preview);
});

drawer.addEventListener("done", ({ detail }) => {
  const { request, records, maps, pictures, seconds } = detail;
  const { state } = request;
  const labelOf = labels(state);
  const relations = state.edges.map((e) => `${labelOf.get(e.from)} ${e.name} ${labelOf.get(e.to)}`);
  const lone = state.nodes.filter((n) => !state.edges.some((e) => e.from === n.id || e.to === n.id));
  const text = [...relations, ...lone.map((n) => labelOf.get(n.id))].join("; ");
  const entry = {
    state, text, records, maps, blobs: pictures,
    settings: { ...settings.read(), ...records[0], num_images: records.length },
    ids: [...state.nodes, ...state.edges].map((item) => item.id),
    labels: [...labelOf.values(), ...relations],
    urls: pictures.map((blob) => URL.createObjectURL(blob)),
  };
  history.add(entry);
  show(entry);
  say(`Drawn in ${seconds.toFixed(1)} s.`);
});

drawer.addEventListener("over", ({ detail: at }) => {
  running(false);
  picture.settle();
  if (at.state === "stopped") say("Stopped.");
  if (at.state === "failed") say(at.error);
  if (at.state === "gone") say("The server does not answer; nothing was drawn.");
});

function show(entry, index = 0) {
  history.mark(entry);
  picture.show(entry, history.before(entry), index);
  $("pictures").hidden = entry.urls.length < 2;
  $("pictures").replaceChildren(
    ...entry.urls.map((url, i) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      const image = new Image();
      Object.assign(image, { src: url, alt: "", className: entry.records[i].size < 192 ? "small" : "" });
      button.type = "button";
      button.setAttribute("aria-label", `Picture ${i + 1}, seed ${entry.records[i].seed}`);
      button.setAttribute("aria-pressed", String(i === index));
      button.append(image);
      button.addEventListener("click", () => {
        show(entry, i);
        $("pictures").children[i].firstChild.focus();
      });
      item.append(button);
      return item;
    }),
  );
}

history.addEventListener("choose", ({ detail: entry }) => {
  doc.commit(entry.state);
  view.select([]);
  settings.set(entry.settings);
  show(entry);
});

// Files.

async function open(file) {
  let found;
  try {
    found = await files.read(file);
  } catch (error) {
    found = { error: error.message };
  }
  if (found.error) return say(found.error);
  say(found.notices.join(" "));
  if (found.graphs.length === 1) return take(found.graphs[0]);
  $("choices").replaceChildren(
    ...found.graphs.map((graph) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.textContent = graph.text;
      button.addEventListener("click", () => $("choose").close() || take(graph));
      item.append(button);
      return item;
    }),
  );
  return $("choose").showModal();
}

function take({ graph, settings: how = {} }) {
  editor.replace(graph, "file", { fresh: true });
  settings.set(how.seed === undefined ? {} : { ...how, num_images: 1 });
  if (how.weights && model && how.weights !== model.weights) {
    say(`That picture was drawn with other weights (${how.model}) than these: a new one will differ.`);
  }
  view.focus();
}

window.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
window.addEventListener("dragleave", (event) => event.relatedTarget === null && ($("drop").hidden = true));
window.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
});
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files[0]) open($("file").files[0]);
  $("file").value = "";
});

for (const { title, graph } of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = title;
  button.addEventListener("click", () => {
    $("examples-menu").hidePopover();
    take({ graph });
  });
  $("examples-menu").append(button);
}

const saves = {
  png: () => {
    if (!picture.entry) return say("There is no picture yet: draw one first.");
    const { blobs, state } = picture.entry;
    return files.save(blobs[picture.index], `${files.stem(state)}.png`);
  },
  json: () => files.save(files.jsonFile(doc.state), `${files.stem(doc.state)}.json`),
  svg: () => files.save(files.svgFile(view), `${files.stem(doc.state)}.svg`),
};
for (const [kind, save] of Object.entries(saves)) {
  $(`save-${kind}`).addEventListener("click", () => {
    $("download-menu").hidePopover();
    save();
  });
}

// Buttons and keys of the whole page.

const THEMES = { automatic: "", light: "light", dark: "dark" };
function theme(name) {
  document.documentElement.dataset.theme = THEMES[name] ?? "";
  $("theme").setAttribute("aria-label", `Theme: ${name}`);
  localStorage.setItem("sgg_fast.theme", name);
}
const nextTheme = () => {
  const names = Object.keys(THEMES);
  const now = localStorage.getItem("sgg_fast.theme");
  theme(names[(names.indexOf(now) + 1) % names.length]);
};

const clicks = {
  draw, stop, theme: nextTheme,
  add: () => editor.add(),
  undo: () => editor.undo(),
  redo: () => editor.redo(),
  arrange: () => editor.arrange(),
  fit: () => view.fit(),
  "zoom-in": () => view.zoom(1.1),
  "zoom-out": () => view.zoom(1 / 1.1),
  help: () => $("help-dialog").showModal(),
};
for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);

window.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open], :popover-open")) return;
  const typing = event.target.closest?.("input, textarea, select");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    combo.settle(clean(combo.input.value));
    setTimeout(draw); // after what was typed there has been taken
  } else if (event.key === "Escape") stop();
  else if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "n") {
    event.preventDefault();
    editor.add();
  } else if (event.key === "a") inspector.pin();
  else if (event.key === "?") $("help-dialog").showModal();
});
new ResizeObserver(() => view.resize()).observe($("canvas"));

// The beginning: what was here before, else an example.

const start = kept();
theme(localStorage.getItem("sgg_fast.theme") ?? "automatic");
if (start) {
  settings.set(start.settings ?? {});
  doc.show(start.state);
} else {
  editor.replace(EXAMPLES[0].graph, "start", { fresh: true });
  doc.past = [];
}
refresh();
view.fit();
watch();
