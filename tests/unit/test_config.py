"""Configurations: every fault at once, with a way out."""

from __future__ import annotations

import pytest
import yaml

from mmchat.config import ConfigError, dump_config, load_config, parse_config
from tests import tiny

TINY = tiny.ROOT / "configs/tiny.yaml"


def _values():
    return yaml.safe_load(TINY.read_text())


def test_round_trip():
    config = load_config(TINY)
    assert parse_config(yaml.safe_load(dump_config(config)), "again") == config


def test_overrides_address_list_items_by_name_and_convert_numbers():
    config = load_config(TINY, ["stages.align.steps=3", "stages.align.train.connectors=1e-4", "stages.1.steps=4",
                                "model.fusion={kind: lora, rank: 2}"])  # fmt: skip
    assert [stage.steps for stage in config.stages] == [3, 4]
    assert config.stages[0].train["connectors"].lr == 1e-4  # PyYAML reads 1e-4 as a string
    assert config.model.fusion.kind == "lora"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.alight.steps=3", "has no item 'alight'; it has ['align', 'instruct']"),
        ("stages.align.steps", "wanted path.to.key=value"),
        ("run.name=3", "run is the value 'tiny', it has no keys"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [override])
    assert message in str(caught.value)


def test_all_faults_at_once_with_the_nearest_key():
    values = _values()
    values["modle"] = 1
    values["model"]["fusion"]["rnk"] = 4
    values["model"]["modalities"]["image"]["encoder"]["pretraned"] = "x"
    values["stages"][0]["stepps"] = 4
    values["stages"][1]["steps"] = "many"
    values["stages"][1]["batch"]["lanes"] = 0
    del values["run"]
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "bad.yaml")
    text = str(caught.value)
    for expected in (
        "bad.yaml: 7 fault(s)",
        "modle: unknown key; did you mean 'model'?",
        "model.fusion.rnk: unknown key; did you mean 'rank'?",
        "model.modalities.image.encoder.pretraned: unknown key; did you mean 'pretrained'?",
        "stages.0.stepps: unknown key; did you mean 'steps'?",
        "stages.1.steps: Input should be a valid integer",
        "stages.1.batch.lanes: Input should be greater than 0 (found 0)",
        "run: missing",
    ):
        assert expected in text, text


def test_wrong_kind_lists_the_kinds():
    values = _values()
    values["model"]["fusion"] = {"kind": "flroa"}
    with pytest.raises(ConfigError, match=r"flora.*lora.*early.*full.*late"):
        parse_config(values, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "Use zero: 1"),
        ({"batch": {"lanes": 4, "tokens": 64, "packs_per_micro_batch": 3}}, "must divide batch.lanes"),
    ],
)
def test_conflicts(change, message):
    values = _values()
    values["stages"][0].update(change)
    with pytest.raises(ConfigError, match=message):
        parse_config(values, "x")


def test_absent_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="wanted a mapping"):
        load_config(tmp_path / "list.yaml")
