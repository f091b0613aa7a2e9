"""The table of a ds.json's keys: unknown ones, wrong types and absurd values are refused; DeepSpeed knows each."""

from __future__ import annotations

import json

import pytest

from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe
from sgg_fast.train.engines.ds_config import load_ds_config
from sgg_fast.train.engines.ds_keys import KEYS, Flag, Number, Word, check_keys

RULES = {
    "size": Number(1, 10),
    "share": Number(0, 1, fraction=True, may_be_auto=False),
    "offload_param": {"device": Word(("none", "cpu")), "pinned": Flag()},
    "bf16": {"enabled": Flag(), "checked": Flag(only=True)},
}


def test_what_passes_becomes_whole_numbers_and_a_section_that_is_null_goes():
    given = {"size": 1e1, "share": 0.5, "offload_param": None, "bf16": {"enabled": "auto", "checked": True}}
    check_keys(given, RULES)
    assert given == {"size": 10, "share": 0.5, "bf16": {"enabled": "auto", "checked": True}}
    assert type(given["size"]) is int
    check_keys(given := {"size": "auto", "offload_param": {"device": "cpu", "pinned": False}}, RULES)
    assert given["size"] == "auto"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 11}, "size must be a whole number, 1 to 10, not 11"),
        ({"size": 2.5}, "size must be a whole number, 1 to 10, not 2.5"),
        ({"share": True}, "share must be a number, 0 to 1, not true"),
        ({"share": "auto"}, 'share must be a number, 0 to 1, not "auto"'),
        ({"offload_param": {"device": "gpu"}}, 'offload_param.device must be "none" or "cpu", not "gpu"'),
        ({"offload_param": {"device": "auto"}}, 'offload_param.device must be "none" or "cpu", not "auto"'),
        ({"offload_param": {"pinned": 0}}, "offload_param.pinned must be true or false, not 0"),
        ({"bf16": {"checked": False}}, "bf16.checked must be true: train.py needs it, not false"),
        ({"bf16": None}, 'bf16 must be an object, such as {"enabled": "auto"}, not null'),
        ({"offload_param": 1}, 'offload_param must be an object, such as {"device": ...}, not 1'),
        ({"size": "9" * 100}, f'size must be a whole number, 1 to 10, not "{"9" * 59}...'),
        ({"sise": 1}, "sise is no key that train.py takes (did you mean size?): leave it out, it would do nothing"),
        ({"bf16": {"x": 1}}, "bf16.x is no key that train.py takes: leave it out, it would do nothing"),
    ],
)
def test_the_first_key_at_fault_is_named_with_what_it_must_be(given, said):
    with pytest.raises(ConfigError) as caught:
        check_keys(given, RULES)
    assert str(caught.value) == said


def _places(node, where=()):
    for key, value in node.items():
        yield (*where, key)
        if isinstance(value, dict):
            yield from _places(value, (*where, key))


WRONG = ["2", "gpu", [], {"a": 1}, None, -1, 1e300, True, 0.5]


def test_any_wrong_type_at_any_place_is_refused_or_a_value_of_the_table(tmp_path):
    """Each wrong value at each key of the table: what passes is of the key's own type."""
    refused = passed = 0
    path, optim = tmp_path / "ds.json", recipe("toy", batch_size=4, max_grad_norm=0.5).optim
    for place in list(_places(KEYS)):
        for value in WRONG:
            given, node = {}, KEYS
            inner = given
            for key in place[:-1]:
                inner, node = inner.setdefault(key, {}), node[key]
            inner[place[-1]], rule = value, node[place[-1]]
            try:
                path.write_text(json.dumps(given))
                load_ds_config(path, optim, "fp32", 1)
                passed += 1
                assert value is None or (type(value) in (bool, float, int) and not isinstance(rule, dict)), (
                    place,
                    value,
                )
                assert value is not True or isinstance(rule, Flag), place
            except ConfigError as error:
                refused += 1
                assert place[-1] in str(error), (place, value, str(error))
    assert refused > 300 and 0 < passed < refused / 3


def test_the_table_holds_keys_that_deepspeed_knows():
    """A key that DeepSpeed does not know would be ignored by it at the top, and refused by it in a section."""
    constants = pytest.importorskip("deepspeed.runtime.constants")
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
    top = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization"}
    assert set(KEYS) <= top

    def fields(model):
        return {field.alias or name for name, field in model.model_fields.items()}

    assert set(KEYS["zero_optimization"]) <= fields(zero.DeepSpeedZeroConfig)
    assert set(KEYS["bf16"]) <= fields(precision.DeepSpeedBF16Config)
    assert set(KEYS["fp16"]) <= fields(precision.DeepSpeedFP16Config)
    for name, model in (
        ("offload_optimizer", offload.DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param", offload.DeepSpeedZeroOffloadParamConfig),
    ):
        assert set(KEYS["zero_optimization"][name]) <= fields(model)
