"""Graph formats, training sets and the cache of everything frozen."""
