// A field with a list of suggestions, floating over the canvas: names of objects, relations, what to connect to.

import { clean } from "./doc.js";
import { suggest } from "./words.js";

export class Combo {
  /** root: the element that holds label, input, list and note. */
  constructor(root) {
    this.root = root;
    this.input = root.querySelector("input");
    this.list = root.querySelector("ul");
    this.note = root.querySelector(".note");
    this.label = root.querySelector("label");
    this.close = null;
    this.input.addEventListener("input", () => this.refresh());
    this.input.addEventListener("keydown", (event) => this.key(event));
    // Another window in front is no answer.
    this.input.addEventListener("blur", () => document.hasFocus() && this.settle(clean(this.input.value)));
    // Before the blur that a press would cause.
    this.list.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const option = event.target.closest("li");
      if (option) this.settle(option.textContent);
    });
  }

  get isOpen() {
    return this.close !== null;
  }

  /**
   * The name that was chosen or typed; null where it was left with Escape, or empty. at: the point of the screen that
   * it is about. strange(name): what to say of a name, "" for nothing.
   */
  ask({ label, value = "", list, at, strange = () => "" }) {
    this.settle(null);
    this.words = list;
    this.strange = strange;
    this.label.textContent = label;
    this.input.value = value;
    this.root.hidden = false;
    const box = this.root.offsetParent.getBoundingClientRect();
    const left = Math.min(Math.max(at.x - box.left - 110, 8), Math.max(box.width - this.root.offsetWidth - 8, 8));
    const top = Math.min(Math.max(at.y - box.top - 16, 8), Math.max(box.height - 250, 8));
    this.root.style.left = `${left}px`;
    this.root.style.top = `${top}px`;
    this.refresh(true);
    this.input.focus({ preventScroll: true });
    this.input.select();
    return new Promise((resolve) => {
      this.close = resolve;
    });
  }

  /** End with `value`. */
  settle(value) {
    if (!this.close) return;
    const close = this.close;
    this.close = null;
    this.root.hidden = true;
    close(value || null);
  }

  refresh(all = false) {
    const found = suggest(this.words, all ? "" : this.input.value);
    this.active = -1;
    this.list.replaceChildren(
      ...found.map((word, i) => {
        const option = document.createElement("li");
        option.id = `${this.list.id}-${i}`;
        option.setAttribute("role", "option");
        option.setAttribute("aria-selected", "false");
        option.textContent = word;
        return option;
      }),
    );
    this.list.hidden = !found.length;
    this.input.setAttribute("aria-expanded", String(found.length > 0));
    this.input.removeAttribute("aria-activedescendant");
    // The beginning of a known word is not strange yet.
    const typed = clean(this.input.value);
    const begun = typed && this.words.some((word) => word.toLowerCase().startsWith(typed.toLowerCase()));
    this.note.textContent = begun ? "" : this.strange(typed);
  }

  key(event) {
    const num = this.list.children.length;
    if (event.ctrlKey || event.metaKey) return;
    event.stopPropagation();
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (num) this.point((this.active + (event.key === "ArrowDown" ? 1 : this.active < 0 ? 0 : -1) + num) % num);
    } else if ((event.key === "Enter" && !event.isComposing) || event.key === "Tab") {
      event.preventDefault();
      const option = this.list.children[this.active];
      this.settle(option ? option.textContent : clean(this.input.value));
    } else if (event.key === "Escape") {
      event.preventDefault();
      this.settle(null);
    }
  }

  point(index) {
    this.list.children[this.active]?.setAttribute("aria-selected", "false");
    this.active = index;
    const option = this.list.children[index];
    option.setAttribute("aria-selected", "true");
    option.scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", option.id);
  }
}
