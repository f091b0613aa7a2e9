"""Graph formats, training sets and the cache of the frozen models' outputs."""
