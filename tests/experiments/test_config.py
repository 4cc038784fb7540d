"""Configs: defaults, overrides, and what is refused."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from compax.errors import ConfigError
from compax.experiments import config as configs


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("steps", "1_000", 1000),
        ("log.plot", "false", False),
        ("pipeline", "quantize(weights=int8) | cast()", "quantize(weights=int8) | cast()"),
        ("data.files", "a/*.txt,b.txt", ("a/*.txt", "b.txt")),
        ("generation.prompts", "('a, b',)", ("a, b",)),
        ("model.overrides.num_layers", "3", 3),
        ("model.overrides.tied", "true", True),
        ("model.overrides.norm", "layernorm", "layernorm"),
    ],
)
def test_override_reads_the_type_of_the_field(name, text, value):
    config = configs.default()
    configs.override(config, name, text)
    found = configs.flatten(config)[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optimizer.learning_rat", "1", "did you mean optimizer.learning_rate"),
        ("learning_rate", "1", "did you mean optimizer.learning_rate"),
        ("stepz", "1", "did you mean steps"),
        ("nothing_like_it", "1", "compax train --help lists them all"),
        ("optimizer", "adam", "is a section"),
        ("steps", "3.5", "expected a whole number"),
        ("log.plot", "perhaps", "expected true or false"),
        ("optimizer.b1", "x", "expected a number"),
        ("data.files", "(1, 2)", "list of texts"),
        ("model.overrides", "3", "give a dict"),
    ],
)
def test_override_refuses(name, text, message):
    with pytest.raises(ConfigError, match=message):
        configs.override(configs.default(), name, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "-1"}, "at least 0"),
        ({"steps": "0"}, "at least 1"),
        ({"data.eval_fraction": "nan"}, "at least 0"),
        ({"data.eval_fraction": "1"}, "between 0 and 1"),
        ({"optimizer.name": "adamax"}, "choose from adamw, adam"),
        ({"optimizer.accumulation": "3"}, "equal micro-batches"),
        ({"data.corpus": "files"}, "give a glob"),
        ({"data.files": "*.txt"}, "add --config.data.corpus=files"),
    ],
)
def test_check_refuses_impossible_values(changes, message):
    config = configs.default()
    for name, text in changes.items():
        configs.override(config, name, text)
    with pytest.raises(ConfigError, match=message):
        configs.check(config)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.optimizer.leraning_rate = 1", "line 4: unknown config field 'leraning_rate'; did you mean optimizer"),
        ("config.steps = 'many'", "line 4: TypeError"),
        ("1 / 0", "line 4: ZeroDivisionError"),
        ("config.steps =", "line 4: SyntaxError"),
        ("return 3", "returned int"),
    ],
)
def test_a_file_that_fails_is_told_by_its_line(tmp_path: Path, body, message):
    path = tmp_path / "bad.py"
    path.write_text(
        f"from compax.experiments import config as base\ndef get_config():\n    config = base.default()\n    {body}\n"
        "    return config\n"
    )
    with pytest.raises(ConfigError, match=message):
        configs.load(path)


def test_a_file_may_build_its_config_from_nothing(tmp_path: Path):
    path = tmp_path / "own.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'steps': 7})\n")
    config = configs.load(path, {"seed": "3"})
    assert (config.steps, config.seed, config.name) == (7, 3, "run")


def test_packaged_experiments_load_by_name():
    assert "quickstart" in configs.experiments()
    for name in configs.experiments():
        configs.load(name)
    with pytest.raises(ConfigError, match=r"or one of: .*quickstart"):
        configs.load("quikstart")


def test_json_round_trip(config: ConfigDict):
    again = configs.from_json(configs.to_json(config), where="here")
    assert configs.flatten(again) == configs.flatten(config)
    with pytest.raises(ConfigError, match="here is not JSON"):
        configs.from_json("{", where="here")
    with pytest.raises(ConfigError, match="lacks the field 'name'"):
        configs.from_json("{}", where="here")


def test_differences_name_what_decides_the_numbers():
    old, new = configs.default(), configs.default()
    new.checkpoint.every, new.log.every = 7, 3
    assert configs.differences(old, new) == []
    new.optimizer.learning_rate = 0.5
    assert configs.differences(old, new) == ["optimizer.learning_rate is 0.001 there and 0.5 here"]


def test_every_field_says_what_it_means():
    for name, field in configs.FIELDS.items():
        assert field.doc.rstrip().endswith((".", "?")), name
