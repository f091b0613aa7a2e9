// What can be done with the chosen items, beside the canvas: for touch, and for who does not know the keys.

import { clean, find, isEdge } from "./doc.js";
import { parted, words } from "./words.js";

export class Inspector {
  constructor(root, editor, view, picture) {
    Object.assign(this, { root, editor, view, picture });
    const actions = {
      rename: () => editor.edit(view.current),
      connect: () => editor.connect(),
      reverse: () => editor.reverse(),
      duplicate: () => editor.duplicate(),
      delete: () => editor.remove(),
      attention: () => this.pin(),
    };
    this.buttons = {};
    for (const [id, action] of Object.entries(actions)) {
      this.buttons[id] = root.querySelector(`#${id}`);
      this.buttons[id].addEventListener("click", action);
    }
    this.chips = root.querySelector("#attributes");
    view.addEventListener("select", () => this.refresh());
  }

  refresh() {
    const { view, editor, buttons } = this;
    const items = editor.selection.map((id) => find(editor.state, id)).filter(Boolean);
    const one = items.length === 1 ? items[0] : null;
    const held = this.root.contains(document.activeElement);
    this.root.hidden = !items.length;
    buttons.rename.hidden = !one;
    buttons.connect.hidden = !one || isEdge(one);
    buttons.reverse.hidden = !one || !isEdge(one);
    buttons.duplicate.hidden = items.every(isEdge);
    buttons.attention.hidden = !one;
    this.attributes(one && !isEdge(one) ? one : null);
    if (this.picture.pinned !== null && this.picture.pinned !== one?.id) this.pin(one?.id ?? null);
    // The button in focus may have gone with what it was about.
    if (held && !document.activeElement?.checkVisibility?.()) view.focus();
  }

  /** Keep the attention of the chosen item over the picture, or take it away. */
  pin(id = this.picture.pinned === null ? this.view.current : null) {
    this.picture.pinned = id;
    this.buttons.attention.setAttribute("aria-pressed", String(id !== null));
    this.picture.attend(id);
  }

  /** Attributes that the model knows of this object, and one more by name. */
  attributes(item) {
    const [front, name] = item ? parted(item.name) : ["", ""];
    const has = front.split(" ").filter(Boolean);
    const known = item ? words.attributes.filter((word) => words.known.has(`${word} ${name}`)) : [];
    const offered = [...new Set([...known, ...has])];
    const key = item ? `${item.id} ${name} ${offered.join()}` : "";
    if (this.chips.dataset.key !== key) {
      this.chips.dataset.key = key;
      this.chips.replaceChildren(...offered.map((word) => this.chip(word)), ...(item ? [this.more()] : []));
      this.chips.hidden = !item;
    }
    for (const chip of this.chips.children) {
      if (chip.dataset.word) chip.setAttribute("aria-pressed", String(has.includes(chip.dataset.word)));
    }
  }

  chip(word) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "tag";
    button.dataset.word = word;
    button.textContent = word;
    button.addEventListener("click", () => this.editor.attribute(word));
    return button;
  }

  more() {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "tag";
    button.textContent = "+ attribute";
    button.addEventListener("click", async () => {
      const id = this.view.current;
      const at = this.view.toScreen(this.view.centre(id));
      const word = await this.editor.ask("Attribute", words.attributes, at, "", () => "");
      this.view.focus(id);
      if (word !== null) this.editor.attribute(clean(word));
    });
    return button;
  }
}
