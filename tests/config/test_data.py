"""Settings of the training set: what can be known of it before it is opened."""

from __future__ import annotations

import pytest

from sgg_fast.config import ConfigError, DataConfig
from sgg_fast.recipes import recipe


@pytest.mark.parametrize(
    ("source", "drawn", "num"), [("toy", True, 9), ("toy-words", True, 9), ("some/set", False, 70)]
)
def test_the_size_of_a_set_is_that_of_the_scenes_or_of_the_published_one(source, drawn, num):
    config = DataConfig(source=source, num_scenes=9, num_published=70)
    assert (config.is_drawn, config.num_expected) == (drawn, num)


def test_a_folder_of_data_that_is_not_there_is_refused(tmp_path):
    recipe("toy", data=str(tmp_path)).check_given()
    with pytest.raises(
        ConfigError,
        match=r"absent: there is no such folder, and it is not toy or toy-rare or toy-words or toy-words-mixed or "
        "toy-words-crowded or toy-words-spread",
    ):
        recipe("toy", data=str(tmp_path / "absent")).check_given()
