// Graphs to begin with, inside the world of the model that ships.

export const EXAMPLES = [
  ["A sheep on the grass", ["sheep", "grass", "sky"], [[0, "standing on", 1], [2, "above", 1]]],
  ["Rider in a red hat", ["sky", "grass", "horse", "person", "red hat"],
    [[0, "above", 1], [2, "standing on", 1], [3, "riding", 2], [3, "wearing", 4]]],
  ["House between two trees", ["sky", "grass", "house", "tree", "tree"],
    [[0, "above", 1], [2, "standing on", 1], [3, "left of", 2], [4, "right of", 2]]],
  ["Boats at sea", ["sky", "sea", "red boat", "yellow boat", "sun"],
    [[0, "above", 1], [2, "left of", 3], [4, "above", 2]]],
  ["A kite above the snow", ["sky", "snow", "person", "blue kite", "white dog"],
    [[0, "above", 1], [2, "standing on", 1], [2, "holding", 3], [4, "right of", 2]]],
  ["Next to the house", ["sky", "grass", "house", "person", "blue hat", "dog"],
    [[2, "on", 1], [3, "next to", 2], [3, "with", 4], [5, "in front of", 2]]],
  ["Car by the flowers", ["sky", "grass", "green car", "flowers", "cloud"],
    [[0, "above", 1], [2, "standing on", 1], [3, "left of", 2], [4, "above", 2]]],
].map(([title, objects, relationships]) => ({ title, graph: { objects, relationships } }));
