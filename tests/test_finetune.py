"""Starting a run from weights: which settings it takes, what it trains, what it refuses."""

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from layouts import make_state
from vitrail.cli import main
from vitrail.cli.train import read
from vitrail.config.files import from_json, read_json
from vitrail.config.presets import get_preset
from vitrail.config.settings import Config, ModelConfig, TrainingConfig
from vitrail.data.batches import Batches
from vitrail.data.images import ImageSet
from vitrail.errors import CheckpointError, ConfigError
from vitrail.model.finetune import resize_positions
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import distributed
from vitrail.training.loop import set_training_mode, train
from vitrail.training.optim import make_optimizers
from vitrail.training.run import Run
from vitrail.training.state import TrainingState
from vitrail.weights import pretrained
from vitrail.weights.checkpoint import CheckpointInfo, save_weights_file
from vitrail.weights.formats.convert import convert

pytestmark = pytest.mark.usefixtures("rough_plots")

TINY = shlex.split(
    "--batch_size 40 --num_train_images 80 --num_test_images 30 --validation_images 50 "
    "--device cpu --epochs 1 --folder_name a"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in its own folder with a file of timm weights."""
    monkeypatch.chdir(tmp_path)
    save_file(make_state("timm"), "timm.safetensors")
    return tmp_path


def peaks(config: TrainingConfig, model: VisionTransformer) -> dict[str, float]:
    """Each parameter's highest learning rate, and that each is in one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, float] = {}
    for optimizer in make_optimizers(model, config):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[parameter] not in found
                found[names[parameter]] = group["peak"]
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_learning_rate_decays_with_depth(tiny_model: ModelConfig, optimizer: str) -> None:
    model = VisionTransformer(tiny_model)
    config = TrainingConfig(learning_rate=0.8, muon_learning_rate=0.8, optimizer=optimizer)  # type: ignore[arg-type]
    flat = peaks(config, model)
    sloped = peaks(dataclasses.replace(config, layer_decay=0.5), model)
    assert set(flat.values()) == ({0.8, 4.0} if optimizer == "muon" else {0.8})  # vectors x 5
    assert flat.keys() == sloped.keys() == dict(model.named_parameters()).keys()
    shares = {"head": 1.0, "norm": 1.0, "blocks.1": 0.5, "blocks.0": 0.25, "stem": 0.125,
              "position_ND": 0.125, "class_token_D": 0.125}  # fmt: skip
    for name, rate in sloped.items():
        share = next(share for start, share in shares.items() if name.startswith(start))
        assert rate == pytest.approx(flat[name] * share), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_a_frozen_backbone_only_the_head_is_trained(
    tiny_model: ModelConfig, optimizer: str
) -> None:
    config = TrainingConfig(init="x", freeze_backbone=True, optimizer=optimizer, ema_decay=0.5)  # type: ignore[arg-type]
    state = TrainingState.start(VisionTransformer(tiny_model), config)
    trained = [p for o in state.optimizers for group in o.param_groups for p in group["params"]]
    assert set(trained) == set(state.model.head.parameters())


FROZEN = from_json(
    {
        "model": {
            "image_size": 8, "patch_size": 4, "embed_dim": 12, "n_layers": 3,
            "n_attention_heads": 3, "n_classes": 5, "stem": "conv", "dropout": 0.5,
            "drop_path": 0.5,
        },
        "training": {
            "init": "x", "freeze_backbone": True, "batch_size": 4, "epochs": 2, "ema_decay": 0.9,
            "precision": "float32",
        },
    }
)  # fmt: skip


def noise_batches(config: Config) -> Batches:
    generator = torch.Generator().manual_seed(3)
    raw_BCHW = torch.randint(256, (10, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = ImageSet(raw_BCHW, torch.arange(10) % 5, tuple("abcde"))
    return Batches(images, config, device=torch.device("cpu"))


def test_a_frozen_backbone_with_batch_norm_is_unchanged_bit_for_bit() -> None:
    torch.manual_seed(1)
    state = TrainingState.start(VisionTransformer(FROZEN.model), FROZEN.training)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    assert any("running_var" in name for name in before)
    for _ in train(state, noise_batches(FROZEN), FROZEN):
        pass
    for weights in (state.model.state_dict(), state.weights()):  # the model's and the average's
        for name, tensor in weights.items():
            assert torch.equal(tensor, before[name]) is not name.startswith("head."), name


def test_a_frozen_backbone_uses_no_dropout_while_the_head_trains() -> None:
    torch.manual_seed(1)
    model = VisionTransformer(FROZEN.model)
    state, batches = TrainingState.start(model, FROZEN.training), noise_batches(FROZEN)
    images_BCHW, targets_BY, _ = batches(0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model.eval()(images_BCHW), targets_BY)
    assert next(train(state, batches, FROZEN)).loss == pytest.approx(expected.item(), rel=1e-6)
    assert model.head.training
    unfrozen = dataclasses.replace(FROZEN.training, freeze_backbone=False)
    assert next(
        train(state, batches, dataclasses.replace(FROZEN, training=unfrozen))
    ).loss != pytest.approx(expected.item(), rel=1e-3)


def test_ranks_leave_a_frozen_backbones_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(FROZEN.model)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(distributed, "count", lambda: 3)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.mul_(3))
    set_training_mode(model, frozen=True)
    distributed.merge(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    set_training_mode(model, frozen=False)
    distributed.merge(model)  # three times a third is not exactly one
    assert not all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_run_from_timms_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my.toml").write_text(
        'init = "timm.safetensors"\nimage_size = 20\nfreeze_backbone = true\n'
    )
    words = ["train", *TINY, "--config", "my.toml", "--n_attention_heads", "3", "--new_head"]
    assert main(words) == 0
    printed = capsys.readouterr().err
    assert "timm.safetensors: positions resized from 3 x 3 patches to 4 x 4" in printed
    assert "timm.safetensors: a new head for" in printed
    config = from_json(read_json(here / "output/a/config.json"))
    assert (config.model.image_size, config.model.patch_size) == (20, 5)
    assert (config.model.layer_norm_eps, config.model.head) == (1e-6, "linear")
    assert (config.training.init, config.training.freeze_backbone) == ("timm.safetensors", True)
    weights = convert(make_state("timm"), n_attention_heads=3).weights
    weights["position_ND"] = resize_positions(weights["position_ND"], (3, 3), (4, 4))
    model = pretrained.load("output/a", device="cpu").model
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, weights[name]), name
    assert model.head.weight.abs().max() < 0.2  # a fresh head, hardly trained
    (here / "timm.safetensors").unlink()  # resuming does not need the weights
    assert Run.resume(here / "output/a", config).state.step == 2


def test_positions_are_resized_once_as_their_library_does(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = convert(make_state("timm"), n_attention_heads=3)
    # As DINOv2: the files' pictures are smaller than the grid of positions in them.
    made = found._replace(image_hw=(10, 10), antialias=True)
    monkeypatch.setattr(pretrained, "read_foreign", lambda *_: made)
    words = ["train", *TINY, "--init", "timm.safetensors", "--n_attention_heads", "3"]
    assert main([*words, "--new_head", "--freeze_backbone", "--image_size", "20"]) == 0
    expected = resize_positions(found.weights["position_ND"], (3, 3), (4, 4), antialias=True)
    model = pretrained.load("output/a", device="cpu").model
    assert torch.equal(model.state_dict()["position_ND"], expected)


def test_a_run_without_a_frozen_backbone_trains_all_weights(here: Path) -> None:
    words = ["train", *TINY, "--init", "timm.safetensors", "--n_attention_heads", "3", "--new_head"]
    words += ["--muon_learning_rate", "0.01"]
    assert main([*words, "--layer_decay", "0.6", "--ema_decay", "0.5"]) == 0
    weights = convert(make_state("timm"), n_attention_heads=3).weights
    for name, tensor in pretrained.load("output/a", device="cpu").model.state_dict().items():
        if not name.startswith("head."):
            assert not torch.equal(tensor, weights[name]), name
            assert torch.allclose(tensor, weights[name], atol=0.05), name


def test_normalization_comes_with_the_weights(here: Path, tiny_model: ModelConfig) -> None:
    config = Config(model=tiny_model)
    data = dataclasses.replace(config.data, mean=(0.1, 0.2, 0.3))
    info = CheckpointInfo(dataclasses.replace(config, data=data), tuple("abcdefg"), {}, {})
    weights = VisionTransformer(tiny_model).state_dict()
    save_weights_file(here / "own.safetensors", info, weights)
    begun = pretrained.with_init(Config(), "own.safetensors")
    assert begun.data.mean == (0.1, 0.2, 0.3)
    assert begun.training.muon_learning_rate == 0.01
    assert begun.model == dataclasses.replace(tiny_model, n_classes=0)


def test_a_settings_file_overrides_the_weights_and_flags_override_both(
    here: Path, tiny_model: ModelConfig
) -> None:
    info = CheckpointInfo(Config(model=tiny_model), tuple("abcdefg"), {}, {})
    save_weights_file(here / "own.safetensors", info, VisionTransformer(tiny_model).state_dict())
    quick = get_preset("quick").model
    assert (tiny_model.position, quick.position) == ("learned", "rope")
    words = ["--init", "own.safetensors", "--config", "my.toml"]
    for text, flags, position in (
        ("", [], "learned"),
        ('position = "sincos"', [], "sincos"),
        ('position = "rope"', [], "rope"),  # as the preset, not as the weights
        ('[model]\nposition = "rope"', [], "rope"),
        ('position = "rope"', ["--position", "sincos"], "sincos"),
    ):
        (here / "my.toml").write_text(f"n_layers = 2\n{text}\n")
        _, settings = read([*words, *flags], "vitrail train")
        assert settings.model.position == position, text
        assert settings.model.embed_dim == tiny_model.embed_dim
    assert settings.training.muon_learning_rate == 0.01  # the preset's would undo the weights
    (here / "my.toml").write_text("muon_learning_rate = 0.07")
    assert read(words, "vitrail train")[1].training.muon_learning_rate == 0.07
    flag = ["--muon_learning_rate", "0.08"]
    assert read([*words, *flag], "vitrail train")[1].training.muon_learning_rate == 0.08


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--init timm.safetensors", "give n_attention_heads"),
        ("--init timm.safetensors --n_attention_heads 3", "have a head for 7 classes"),
        ("--init timm.safetensors --n_attention_heads 3 --new_head --embed_dim 48",
         "a different model: embed_dim 24, not 48"),
        ("--init nothing.pt", "nothing.pt: no such model"),
        ("--new_head", "new_head needs weights to start from: give --init"),
        ("--freeze_backbone", "freeze_backbone needs weights"),
        ("--init timm.safetensors --n_attention_heads 3 --freeze_backbone --layer_decay 0.5",
         "layer_decay 0.5 has no effect with freeze_backbone"),
    ],
)  # fmt: skip
def test_invalid_settings_are_one_line(
    here: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, *words.split()]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (here / "output" / "a").exists()


def test_a_head_for_other_classes_is_refused(tiny_model: ModelConfig, here: Path) -> None:
    info = CheckpointInfo(Config(model=tiny_model), tuple("abcdefg"), {}, {})
    model = VisionTransformer(tiny_model)
    save_weights_file(here / "own.safetensors", info, model.state_dict())
    training = TrainingConfig(init="own.safetensors")
    with pytest.raises(CheckpointError, match="its head is for a, b, c…, the dataset has g, f"):
        pretrained.start_from(model, training, tuple("gfedcba"))
    assert pretrained.start_from(model, training, tuple("abcdefg")) == []
    with pytest.raises(ConfigError, match="layer_decay is 2"):
        TrainingConfig(layer_decay=2)


def test_dropout_of_the_run_is_kept(tmp_path: Path, tiny_model: ModelConfig) -> None:
    info = CheckpointInfo(Config(model=tiny_model), tuple("abcdefg"), {}, {})
    save_weights_file(
        tmp_path / "own.safetensors", info, VisionTransformer(tiny_model).state_dict()
    )
    mine = Config(model=ModelConfig(dropout=0.33, drop_path=0.22))
    begun = pretrained.with_init(mine, str(tmp_path / "own.safetensors"))
    assert (begun.model.dropout, begun.model.drop_path) == (0.33, 0.22)
