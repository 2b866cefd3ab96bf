"""Settings are validated all at once, survive JSON, and give the paper's figures."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsinks.errors import ConfigError, refuse
from memsinks.sinks.config import FORMAT_VERSION, SinkConfig

GOOD = {"neurons": 256, "active": 64}

BAD = {
    "neurons not int": ({"neurons": 2.5}, ["neurons must be an int of at least 1, got 2.5"]),
    "neurons bool": ({"neurons": True}, ["neurons must be an int of at least 1, got True"]),
    "neurons zero": ({"neurons": 0}, ["neurons must be an int of at least 1, got 0"]),
    "active text": ({"active": "64"}, ["active must be an int of at least 1, got '64'"]),
    "active zero": ({"active": 0}, ["active must be an int of at least 1, got 0"]),
    "active exceeds": ({"active": 288}, ["active (288) exceeds neurons (256)"]),
    "block zero": ({"block_size": 0}, ["block_size must be an int of at least 1, got 0"]),
    "block neurons": ({"neurons": 250}, ["block_size (32) does not divide neurons (250)"]),
    "block active": ({"active": 65}, ["block_size (32) does not divide active (65)"]),
    "block both": (
        {"block_size": 48},
        ["block_size (48) does not divide neurons (256)", "block_size (48) does not divide active (64)"],
    ),
    "block exact": ({"routing": "exact", "block_size": 16}, ['routing="neurons" opens single neurons', "got 16"]),
    "block bernoulli": ({"routing": "bernoulli", "block_size": 2}, ['routing="bernoulli" opens single neurons']),
    "reserved negative": ({"reserved_blocks": -1}, ["reserved_blocks must be an int of at least 0, got -1"]),
    "reserved too many": ({"reserved_blocks": 7}, ["8 blocks less 7 reserved leave 1", "a document opens 2"]),
    "reserved, bernoulli": ({"routing": "bernoulli", "reserved_blocks": 6}, ["reserved_blocks must be 0, got 6"]),
    "open_from zero": ({"open_from": 0}, ["open_from must be an int of at least 1, got 0"]),
    "open_from none": ({"open_from": None}, ["open_from must be an int of at least 1, got None"]),
    "seed negative": ({"seed": -1}, ["seed must be an int in [0, 2**63), got -1"]),
    "seed too large": ({"seed": 2**63}, [f"got {2**63}"]),
    "routing": ({"routing": "hash"}, ["routing must be one of 'blocks', 'neurons', 'bernoulli', got 'hash'"]),
    "shared": ({"shared": "exact"}, ["shared must be one of 'decay', 'none', got 'exact'"]),
    "per_layer": ({"per_layer": 1}, ["per_layer must be True or False, got 1"]),
    "decay negative": ({"shared_decay": -0.5}, ["shared_decay must be a finite number of at least 0, got -0.5"]),
    "decay infinite": ({"shared_decay": float("inf")}, ["shared_decay must be a finite number of at least 0, got inf"]),
    "decay nan": ({"shared_decay": float("nan")}, ["got nan"]),
    "decay text": ({"shared_decay": "1"}, ["shared_decay must be a finite number of at least 0, got '1'"]),
    "decay bool": ({"shared_decay": True}, ["shared_decay must be a finite number of at least 0, got True"]),
    "start zero": ({"start_scale": 0}, ["start_scale must be positive and finite, got 0"]),
    "start text": ({"start_scale": "3"}, ["start_scale must be positive and finite, got '3'"]),
    "layers empty": ({"layers": []}, ["layers is empty; give None for all layers"]),
    "layers negative": ({"layers": (0, -1)}, ["layers must be non-negative ints, got (0, -1)"]),
    "layers float": ({"layers": [0.0]}, ["layers must be non-negative ints, got (0.0,)"]),
    "layers an int": ({"layers": 3}, ["layers must be non-negative ints, got 3"]),
    "layers twice": ({"layers": (1, 2, 1)}, ["layers names a layer twice: (1, 2, 1)"]),
    "intermediate_size": ({"intermediate_size": 0}, ["intermediate_size must be an int of at least 1, got 0"]),
    "intermediate_size float": (
        {"intermediate_size": 128.0},
        ["intermediate_size must be an int of at least 1, got 128.0"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_each_invalid_setting_is_named_with_its_value(name):
    changes, parts = BAD[name]
    with pytest.raises(ConfigError, match="invalid SinkConfig") as caught:
        SinkConfig(**(GOOD | changes))
    for part in parts:
        assert part in str(caught.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        SinkConfig(
            neurons=1.5, active=0, block_size="x", routing="r", per_layer=None, reserved_blocks=-2, open_from=0,
            shared="s", shared_decay=-1, layers=(), start_scale=0, seed=-3, intermediate_size=-4,
        )  # fmt: skip
    message = str(caught.value)
    for field in dataclasses.fields(SinkConfig):
        assert field.name in message.split(": ", 1)[1]
    assert message.count(";") >= len(dataclasses.fields(SinkConfig)) - 1


def test_defaults():
    config = SinkConfig(neurons=256, active=64)
    assert (config.block_size, config.routing, config.per_layer, config.open_from) == (32, "blocks", True, 2)
    assert (config.shared, config.reserved_blocks, config.layers, config.seed) == ("none", 0, None, 0)
    assert SinkConfig(neurons=100, active=7, routing="exact").block_size == 1
    assert SinkConfig(neurons=100, active=7, routing="bernoulli").block_size == 1


@pytest.mark.parametrize(
    ("given", "shared", "decay"),
    [({}, "none", 0.25), ({"shared": "decay"}, "decay", 0.25), ({"shared_decay": 0.5}, "decay", 0.5),
     ({"shared_decay": 0}, "decay", 0), ({"shared_decay": 0.5, "shared": "none"}, "none", 0.5)],
)  # fmt: skip
def test_a_decay_that_is_given_is_meant(given, shared, decay):
    config = SinkConfig(**GOOD, **given)
    assert (config.shared, config.shared_decay) == (shared, decay)
    assert SinkConfig.from_dict(config.to_dict()) == dataclasses.replace(config, seed=config.seed) == config


def test_block_counts():
    config = SinkConfig(neurons=256, active=64, block_size=16, reserved_blocks=5)
    assert (config.blocks, config.hashed_blocks, config.open_blocks) == (16, 11, 4)


def test_whole_pool_may_be_open_and_all_but_the_needed_blocks_reserved():
    assert SinkConfig(neurons=64, active=64).open_blocks == 2
    assert SinkConfig(neurons=256, active=64, reserved_blocks=6).hashed_blocks == 2


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"open_from": 1, "shared_decay": 0.0}, False),
        ({"open_from": 2, "shared_decay": 0.0}, True),
        ({"open_from": 1, "shared_decay": 0.5}, True),
        ({"open_from": 1, "shared_decay": 0.0, "shared": "none"}, False),
    ],
)
def test_when_exposures_are_needed(changes, needed):
    assert SinkConfig(**GOOD, **changes).needs_exposures is needed


def test_frozen_hashable_and_equal_by_value():
    config = SinkConfig(neurons=256, active=64, layers=[0, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.active = 32
    assert config.layers == (0, 2)
    assert config == SinkConfig(neurons=256, active=64, layers=(0, 2))
    assert len({config, SinkConfig(neurons=256, active=64, layers=(0, 2))}) == 1


CONFIGS = st.builds(
    lambda more, size, opens, reserved, **rest: SinkConfig(
        neurons=(more + opens + reserved) * size, active=opens * size, block_size=size, reserved_blocks=reserved, **rest
    ),
    st.integers(0, 40), st.integers(1, 64), st.integers(1, 8), st.integers(0, 5),
    per_layer=st.booleans(), open_from=st.integers(1, 100), shared=st.sampled_from(["decay", "none"]),
    shared_decay=st.floats(0, 10), layers=st.none() | st.lists(st.integers(0, 50), min_size=1, unique=True),
    seed=st.integers(0, 2**63 - 1), intermediate_size=st.none() | st.integers(1, 10**6),
)  # fmt: skip


@given(CONFIGS)
def test_json_round_trip(config):
    assert SinkConfig.from_json(config.to_json()) == config
    assert SinkConfig.from_dict(config.to_dict()) == config


def test_json_names_every_field_and_the_format():
    values = json.loads(SinkConfig(neurons=256, active=64).to_json())
    assert values.pop("format_version") == FORMAT_VERSION == 2
    assert set(values) == {field.name for field in dataclasses.fields(SinkConfig)}


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_other_format_versions_are_refused(version):
    values = SinkConfig(neurons=256, active=64).to_dict() | {"format_version": version}
    with pytest.raises(ConfigError, match=f"format_version {version!r}, this memsinks reads 1 to 2"):
        SinkConfig.from_dict(values)


def test_settings_of_format_1_are_read():
    first = {
        "format_version": 1, "neurons": 32, "active": 8, "block_size": 1, "routing": "exact", "per_layer": True,
        "reserved_blocks": 0, "open_from": 2, "shared": "none", "shared_decay": 0.25, "layers": None, "seed": 0,
        "host_width": 64,
    }  # fmt: skip
    config = SinkConfig.from_dict(first)
    assert (config.routing, config.intermediate_size, config.shared) == ("neurons", 64, "none")
    assert SinkConfig(neurons=32, active=8, routing="exact").routing == "neurons"


def test_what_a_version_did_not_know_yet_has_its_default():
    values = SinkConfig(neurons=256, active=64).to_dict()
    for name in ("shared_decay", "reserved_blocks"):
        del values[name]
    assert SinkConfig.from_dict(values) == SinkConfig(neurons=256, active=64)


def test_unknown_and_missing_keys_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        SinkConfig.from_dict({"format_version": 1, "neurons": 256, "activ": 64, "zeal": 1})
    for part in ("unknown setting 'activ'", "unknown setting 'zeal'", "setting 'active' is missing"):
        assert part in str(caught.value)


def test_invalid_values_in_json_are_refused():
    with pytest.raises(ConfigError, match=r"active \(512\) exceeds neurons"):
        SinkConfig.from_dict(SinkConfig(neurons=256, active=64).to_dict() | {"active": 512})


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(ConfigError, match="JSON"):
        SinkConfig.from_json(text)


def test_reading_leaves_the_dict_alone():
    values = SinkConfig(neurons=256, active=64).to_dict()
    SinkConfig.from_dict(values)
    assert values["format_version"] == 2


def test_published_setting():
    config = SinkConfig.published()
    assert (config.intermediate_size, config.neurons, config.active) == (2867, 1229, 369)
    assert (config.routing, config.per_layer, config.open_from, config.shared_decay) == ("bernoulli", False, 1, 0.0)
    assert not config.needs_exposures


def test_published_setting_with_changes():
    config = SinkConfig.published(total=1000, general_share=0.5, active_share=0.1, routing="exact", seed=3)
    assert (config.intermediate_size, config.neurons, config.active, config.routing, config.seed) == (
        500,
        500,
        50,
        "neurons",
        3,
    )


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["general_share", "active_share"])
def test_published_shares_lie_inside_0_and_1(name, share):
    with pytest.raises(ConfigError, match=rf"{name} must lie in \(0, 1\), got"):
        SinkConfig.published(**{name: share})


def test_rescale_factors_of_the_paper():
    factors = SinkConfig(neurons=300, active=90, routing="bernoulli").rescale_factors(intermediate_size=700)
    assert factors == {"none": 1.0, "expected": pytest.approx(0.79 / 0.7), "released": pytest.approx(1 / 0.7)}
    assert (round(factors["expected"], 4), round(factors["released"], 4)) == (1.1286, 1.4286)


def test_refuse_without_problems_does_nothing():
    refuse([], "anything")
