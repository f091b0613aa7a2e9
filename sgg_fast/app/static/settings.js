// How to draw: the fields, their bounds from the model, and the seed that stays while the graph is edited.

const NUMBERS = ["seed", "num_images", "steps", "guidance", "relation_guidance", "size"];

export class Settings extends EventTarget {
  constructor(form) {
    super();
    this.form = form;
    this.defaults = null;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", () => this.dispatchEvent(new Event("change")));
    form.querySelector("#random-seed").addEventListener("click", () => {
      this.set({ seed: Math.floor(Math.random() * 1e6) });
    });
    form.querySelector("#defaults").addEventListener("click", () => this.set({ ...this.defaults, seed: this.read().seed }));
  }

  /** The model is known: its schedulers, bounds and defaults, over which `kept` values go. */
  learn(model, kept) {
    this.defaults = model.defaults;
    const { scheduler, num_images: number } = this.form.elements;
    scheduler.replaceChildren(...model.schedulers.map((name) => new Option(name, name)));
    number.max = model.max_pictures;
    this.set({ ...model.defaults, ...kept });
  }

  set(values) {
    for (const [name, value] of Object.entries(values)) {
      const field = this.form.elements[name];
      if (field && value !== undefined) field.value = value;
    }
    this.dispatchEvent(new Event("change"));
  }

  /** The fields that hold something; before the model is known only what the user has typed. */
  read() {
    const found = {};
    for (const name of NUMBERS) {
      const { value } = this.form.elements[name];
      if (value !== "") found[name] = Number(value);
    }
    if (this.form.elements.scheduler.value) found.scheduler = this.form.elements.scheduler.value;
    return found;
  }

  /** As a request takes them: the model's own scheduler need not be among those that can be asked for. */
  request() {
    const found = this.read();
    if (this.defaults && found.scheduler === this.defaults.scheduler) delete found.scheduler;
    return found;
  }

  /** What the browser holds against a value, "" for nothing; that field is then in focus. */
  fault() {
    const wrong = [...this.form.elements].find((field) => !field.checkValidity());
    if (!wrong) return "";
    const folded = wrong.closest("details");
    if (folded) folded.open = true;
    wrong.focus();
    return `${wrong.labels[0].textContent.trim()}: ${wrong.validationMessage}`;
  }
}
