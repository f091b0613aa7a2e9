// The strip of pictures drawn on this page; each comes back with its graph and settings.

const MOST = 40;

export class History extends EventTarget {
  constructor(list) {
    super();
    this.list = list;
    this.entries = [];
    this.current = null;
  }

  /** entry: {state, text, records, settings, ids, labels, maps, urls, blobs}. */
  add(entry) {
    this.entries.unshift(entry);
    for (const old of this.entries.splice(MOST)) {
      old.urls.forEach((url) => URL.revokeObjectURL(url));
      old.item.remove();
    }
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = entry.urls[0];
    image.alt = "";
    if (entry.records[0].size < 192) image.className = "small";
    button.type = "button";
    button.title = entry.text;
    button.setAttribute("aria-label", `Bring back: ${entry.text}, seed ${entry.records[0].seed}`);
    button.append(image);
    if (entry.urls.length > 1) {
      const count = document.createElement("span");
      count.className = "count";
      count.textContent = entry.urls.length;
      button.append(count);
    }
    button.addEventListener("click", () => this.dispatchEvent(new CustomEvent("choose", { detail: entry })));
    item.append(button);
    entry.item = item;
    this.list.prepend(item);
    this.mark(entry);
  }

  mark(entry) {
    this.current = entry;
    for (const other of this.entries) {
      other.item.firstChild.setAttribute("aria-pressed", String(other === entry));
    }
    entry.item.scrollIntoView({ block: "nearest", inline: "nearest" });
    this.list.parentElement.hidden = false;
  }

  /** The entry drawn before this one that is most like it: the latest with the same seed and size. */
  before(entry) {
    const older = this.entries.slice(this.entries.indexOf(entry) + 1);
    const same = (other) => ["seed", "size"].every((name) => other.records[0][name] === entry.records[0][name]);
    return older.find(same) ?? null;
  }
}
