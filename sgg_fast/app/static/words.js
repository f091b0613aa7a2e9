// The words that the model was trained on, and what to offer for letters typed.

export const words = { objects: [], predicates: [], attributes: [], known: null };

export function learn(found) {
  Object.assign(words, found, { known: new Set([...found.objects, ...found.predicates]) });
}

/** Whether the model never saw it; nothing is until its words are known. */
export const unseen = (name) => words.known !== null && name !== "" && !words.known.has(name);

/** At most `most` of `list` that fit: those that begin with the letters, then those with a word that does, the short first. */
export function suggest(list, typed, most = 8) {
  const letters = typed.trim().toLowerCase();
  const rank = (word) => {
    const lower = word.toLowerCase();
    if (lower.startsWith(letters)) return 0;
    return lower.includes(` ${letters}`) ? 1 : lower.includes(letters) ? 2 : 3;
  };
  return list
    .map((word) => [letters ? rank(word) : 0, word.includes(" ") && !letters ? 1 : 0, word])
    .filter(([fit]) => fit < 3)
    .sort((a, b) => a[0] - b[0] || a[1] - b[1] || (a[2] < b[2] ? -1 : 1))
    .slice(0, most)
    .map(([, , word]) => word);
}

/** ["red big", "hat"]: attributes in front of a name. */
export function parted(name) {
  const all = name.split(" ");
  let count = 0;
  while (count < all.length - 1 && words.attributes.includes(all[count])) count++;
  return [all.slice(0, count).join(" "), all.slice(count).join(" ")];
}
