"""A model's list of names as objects, predicates and attributes."""

from __future__ import annotations

from sgg_fast.drawing.vocabulary import known_words, vocabulary


def test_what_a_model_was_trained_on_is_sorted_into_kinds():
    names = ["__image__", "__in_image__", "hat", "red hat", "sheep", "standing on", "left of", "wearing", "fire truck"]
    assert vocabulary(names) == {
        "objects": ["fire truck", "hat", "red hat", "sheep"],
        "predicates": ["left of", "standing on", "wearing"],
        "attributes": ["red"],
    }


def test_words_are_told_with_the_attributes_that_each_object_had():
    names = ["__image__", "__in_image__", "sheep", "red hat", "hat", "blue hat", "fire truck", "left of", "wearing"]
    assert known_words(names) == "things: fire truck, hat (blue, red), sheep\nrelations: left of, wearing"
    assert known_words([]) == "things: \nrelations: "
