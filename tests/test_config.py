"""Settings: names, JSON and TOML round trips, invalid values, presets."""

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitrail
from vitrail.config.files import from_json, read_toml, to_json
from vitrail.config.presets import PRESETS, get_preset
from vitrail.config.settings import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from vitrail.errors import ConfigError


def test_no_two_sections_share_a_name() -> None:
    config = Config()
    names = [f.name for s in dataclasses.fields(config) for f in dataclasses.fields(s.type)]
    assert len(names) == len(set(names)) == len(config.flat())


def names_in(tree: ast.AST) -> set[str]:
    """Attributes that the code reads, and its string constants (for getattr)."""
    nodes = list(ast.walk(tree))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


def test_every_setting_is_read_somewhere() -> None:
    """No setting is accepted and then ignored: it is read outside of config/, or by a property."""
    package = Path(vitrail.__file__).parent
    files = [path for path in package.rglob("*.py") if path.parent.name != "config"]
    read = set().union(*(names_in(ast.parse(path.read_text())) for path in files))
    settings = ast.parse((package / "config/settings.py").read_text())
    for node in ast.walk(settings):
        if isinstance(node, ast.FunctionDef) and node.name in read:
            read |= names_in(node)
    assert set(Config().flat()) - read == set()


@pytest.mark.parametrize("name", PRESETS)
def test_settings_round_trip_through_json(name: str) -> None:
    config = get_preset(name)
    model = dataclasses.replace(config.model, image_size=(24, 40))
    for each in (config, dataclasses.replace(config, model=model)):
        assert from_json(to_json(each)) == each


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ([], "settings must be a table"),
        ({"modle": {}}, "did you mean 'model'"),
        ({"model": 3}, "section model"),
        ({"model": {"embed_dims": 3}}, "did you mean 'embed_dim'"),
        ({"model": {"embed_dim": "64"}}, "embed_dim is '64': give a whole number"),
        ({"model": {"embed_dim": True}}, "embed_dim is True"),
        ({"model": {"pool": "max"}}, "'cls', 'mean'"),
        ({"data": {"mean": [0.5, 0.5]}}, "a list of 3 numbers"),
        ({"augment": {"flip": 1}}, "'random', 'alternating', 'none'"),
        ({"training": {"new_head": 1}}, "true or false"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate is nan"),
    ],
)
def test_wrong_json_is_refused(sections: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_json(sections)
    assert words in str(refusal.value)


def test_toml_overrides_a_preset_with_and_without_sections(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('epochs = 3\npool = "cls"\n[training]\nbatch_size = 7\nlearning_rate = 1\n')
    config = read_toml(path, get_preset("quick"))
    assert (config.training.epochs, config.training.batch_size) == (3, 7)
    assert config.training.learning_rate == 1.0
    assert config.model == dataclasses.replace(get_preset("quick").model, pool="cls")


@pytest.mark.parametrize(
    ("text", "words"), [("epoch = 3", "did you mean 'epochs'"), ("epochs = ", "invalid TOML")]
)
def test_wrong_toml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_toml(path, Config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 5, "warmup_epochs": 5}, "--warmup_epochs"),
        ({"minimum_learning_rate": 1.0}, "minimum_learning_rate"),
        ({"accumulate": 999}, "accumulate"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_invalid_training_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainingConfig(**changes)


def test_the_reference_preset_is_the_references_recipe() -> None:
    flat = get_preset("reference").flat()
    expected = {
        "batch_size": 128, "learning_rate": 5e-4, "epochs": 200, "image_size": 32, "n_channels": 3,
        "patch_size": 4, "embed_dim": 128, "n_layers": 6, "n_attention_heads": 4, "forward_mul": 2,
        "dropout": 0.1, "weight_decay": 1e-3, "decay": "all", "minimum_learning_rate": 1e-5,
        "schedule": "cosine", "schedule_by": "epoch", "optimizer": "adamw", "seed": 1234,
        "crop_padding": 4, "flip": "random", "randaugment_ops": 2, "randaugment_magnitude": 9,
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "validation_images": 0, "pool": "cls",
        "stem": "patch", "position": "learned", "head": "mlp", "label_smoothing": 0, "mixup": 0,
    }  # fmt: skip
    assert {name: flat[name] for name in expected} == expected
    assert get_preset("reference").training.warmup == 10
    assert get_preset("reference12").model.n_layers == 12


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quick'"):
        get_preset("quik")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TrainingConfig(optimizer="sgd"), "optimizer is 'sgd': give 'adamw', 'muon'"),
        (lambda: TrainingConfig(schedule="constant"), "schedule is 'constant'"),
        (lambda: TrainingConfig(precision="float16"), "precision is 'float16'"),
        (lambda: TrainingConfig(batch_size=2.5), "batch_size is 2.5: give a whole number"),
        (lambda: TrainingConfig(batch_size=True), "batch_size is True: give a whole number"),
        (lambda: TrainingConfig(learning_rate="1"), "learning_rate is '1': give a number"),
        (lambda: TrainingConfig(epochs=None), "epochs is None: give a whole number"),
        (lambda: ModelConfig(pool="max"), "pool is 'max'"),
        (lambda: ModelConfig(head="lin"), "head is 'lin': give 'mlp', 'linear'"),
        (lambda: ModelConfig(fc_norm=1), "fc_norm is 1: give true or false"),
        (lambda: ModelConfig(image_size=(32, 32, 3)), "image_size is (32, 32, 3)"),
        (lambda: DataConfig(dataset="imagenet"), "dataset is 'imagenet'"),
        (lambda: DataConfig(mean=0.5), "mean is 0.5: give a list of 3 numbers"),
        (lambda: AugmentConfig(flip="no"), "flip is 'no': give 'random', 'alternating', 'none'"),
        (lambda: RunConfig(device="tpu"), "device is 'tpu'"),
    ],
)
def test_wrong_values_from_python_are_refused_when_built(
    build: Callable[[], object], words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        build()
    assert words in str(refusal.value)


def test_values_from_python_become_the_declared_types() -> None:
    data = DataConfig(data_path="pictures", mean=[0, 0.25, np.float32(0.5)])  # type: ignore[arg-type]
    assert data == DataConfig(data_path=Path("pictures"), mean=(0.0, 0.25, 0.5))
    assert isinstance(data.data_path, Path)
    assert [type(value) for value in data.mean] == [float] * 3
    training = TrainingConfig(learning_rate=1, batch_size=np.int64(7))  # type: ignore[arg-type]
    assert (type(training.learning_rate), type(training.batch_size)) == (float, int)
    assert ModelConfig(image_size=[8, 12]).image_size == (8, 12)  # type: ignore[arg-type]
    config = Config(data=data, training=training)
    assert from_json(to_json(config)) == config
