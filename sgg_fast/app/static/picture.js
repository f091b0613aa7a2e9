// The picture: as it is being made, beside an earlier one under a slider, and where each word had the attention.

const RAMP = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]; // as --explain paints it

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

export class Picture {
  constructor(root) {
    this.root = root;
    for (const name of ["now", "before", "preview", "heat", "empty", "caption", "slider", "split", "compare", "changes"]) {
      this[name] = root.querySelector(`#picture-${name}`);
    }
    this.entry = null;
    this.earlier = null;
    this.index = 0;
    this.pinned = null;
    this.slider.addEventListener("input", () => this.slide());
    this.frame = root.querySelector(".frame");
    this.frame.addEventListener("pointerdown", (event) => this.grab(event));
    this.frame.addEventListener("pointermove", (event) => event.buttons && this.grab(event));
  }

  /** Show picture `index` of a history entry, with an earlier entry to compare with, or null. */
  show(entry, earlier, index = 0) {
    Object.assign(this, { entry, earlier, index });
    this.preview.hidden = true;
    this.empty.hidden = entry !== null;
    this.now.hidden = entry === null;
    if (entry) {
      this.now.src = entry.urls[index];
      const { seed } = entry.records[index];
      this.now.alt = `Picture of: ${entry.text || "the graph"} (seed ${seed})`;
      this.now.classList.toggle("small", entry.records[index].size < 192);
    }
    this.compare.hidden = !earlier;
    this.before.hidden = !earlier;
    this.split.hidden = !earlier;
    if (earlier) {
      this.before.src = earlier.urls[Math.min(index, earlier.urls.length - 1)];
      this.before.alt = `The earlier picture: ${earlier.text}`;
      this.before.classList.toggle("small", earlier.records[0].size < 192);
      this.changes.textContent = changed(earlier, entry);
    }
    this.slider.value = 0;
    this.slide();
    this.attend(null);
  }

  /** The picture as it is predicted now; a JPEG in base64. */
  async progress(jpeg) {
    const url = URL.createObjectURL(new Blob([bytes(jpeg)], { type: "image/jpeg" }));
    const old = this.preview.src;
    this.preview.src = url;
    this.preview.hidden = false;
    this.empty.hidden = true;
    await this.preview.decode().catch(() => {});
    if (old) URL.revokeObjectURL(old);
  }

  /** Back from the preview to what was there. */
  settle() {
    this.preview.hidden = true;
    this.empty.hidden = this.entry !== null;
  }

  /** Reveal the earlier picture from the left, as far as the slider says. */
  slide() {
    const share = Number(this.slider.value);
    this.before.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    this.split.style.left = `${share}%`;
    this.split.classList.toggle("resting", share === 0);
  }

  grab(event) {
    if (!this.earlier || (event.type === "pointerdown" && event.button)) return;
    const box = this.frame.getBoundingClientRect();
    this.slider.value = Math.round((100 * (event.clientX - box.left)) / box.width);
    this.slide();
  }

  /** Lay the attention of an item (its id on the canvas) over the picture; null for none. */
  attend(id) {
    const { entry } = this;
    const place = entry?.ids?.indexOf(id) ?? -1;
    const maps = entry?.maps;
    const on = id !== null && maps && place >= 0 && place < maps.heat[this.index].length && this.preview.hidden;
    this.root.classList.toggle("attending", Boolean(on));
    this.heat.hidden = !on;
    this.caption.textContent = "";
    if (!on) return;
    paint(this.heat, bytes(maps.heat[this.index][place]), maps.width, maps.height);
    this.heat.dataset.item = id;
    const share = (100 * maps.share[this.index][place]).toFixed(1);
    this.caption.textContent = `Where “${entry.labels[place]}” had the attention (${share} % overall)`;
  }
}

function paint(canvas, heat, width, height) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  heat.forEach((value, i) => {
    const at = (value / 255) * (RAMP.length - 1);
    const k = Math.min(Math.floor(at), RAMP.length - 2);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = RAMP[k][c] + (RAMP[k + 1][c] - RAMP[k][c]) * (at - k);
    image.data[4 * i + 3] = 255 * (0.3 + (0.55 * value) / 255);
  });
  context.putImageData(image, 0, 0);
}

/** What differs between two history entries, in a few words. */
export function changed(before, after) {
  const parts = [];
  const kept = (list, { id }) => list.find((item) => item.id === id);
  for (const kind of ["nodes", "edges"]) {
    const [old, now] = [before.state[kind], after.state[kind]];
    for (const item of old) {
      const same = kept(now, item);
      const moved = same && (same.from !== item.from || same.to !== item.to);
      if (!same) parts.push(`− ${labelOf(before, item)}`);
      else if (moved) parts.push(`${labelOf(before, item)} → ${labelOf(after, same)}`);
      else if (same.name !== item.name) parts.push(`${item.name} → ${same.name}`);
    }
    parts.push(...now.filter((item) => !kept(old, item)).map((item) => `+ ${labelOf(after, item)}`));
  }
  for (const name of ["seed", "steps", "guidance", "relation_guidance", "scheduler", "size"]) {
    const [old, now] = [before.records[0][name], after.records[0][name]];
    if (old !== now) parts.push(`${name.replace("_", " ")} ${old} → ${now}`);
  }
  if (!parts.length) return "Nothing has changed.";
  return parts.length > 4 ? `${parts.slice(0, 4).join(", ")} and ${parts.length - 4} more` : parts.join(", ");
}

/** An item of an entry's graph, as its labels say it. */
const labelOf = (entry, item) => entry.labels[entry.ids.indexOf(item.id)];
