"""Training updates: every setting has an effect; averages and accumulated batches are exact."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config.files import from_json
from vitrail.config.settings import AugmentConfig, Config, ModelConfig, TrainingConfig
from vitrail.data.batches import Batches
from vitrail.data.images import ImageSet
from vitrail.errors import DataError
from vitrail.model.layers import BatchNorm
from vitrail.model.vit import VisionTransformer
from vitrail.training.loop import count_flops, train
from vitrail.training.optim import make_optimizers
from vitrail.training.state import TrainingState

BASE = from_json(
    {
        "model": {
            "image_size": [8, 12], "patch_size": 4, "embed_dim": 12, "n_layers": 2,
            "n_attention_heads": 3, "n_classes": 5,
        },
        "augment": {"crop_padding": 1},
        "training": {
            "epochs": 3, "batch_size": 4, "warmup_epochs": 1, "precision": "float32",
            "weight_decay": 0.1, "learning_rate": 1e-3,
        },
    }
)  # fmt: skip
TRAINING: dict[str, Any] = {
    "batch_size": 5,
    "epochs": 4,
    "learning_rate": 2e-3,
    "warmup_epochs": 2.0,
    "schedule": "linear",
    "minimum_learning_rate": 1e-4,
    "schedule_by": "epoch",
    "optimizer": "muon",
    "weight_decay": 0.2,
    "decay": "all",
    "label_smoothing": 0.1,
    "clip_norm": 1e-3,
    "layer_decay": 0.5,
    "precision": "bfloat16",
}
"""For each setting of training another value, which must give other weights."""
APART = {"muon_learning_rate", "accumulate", "ema_decay", "compile"} | {
    "init", "new_head", "freeze_backbone",  # in test_finetune.py
}  # fmt: skip
"""Settings with tests of their own."""
APART_AUGMENT = {"randaugment_magnitude", "mix_probability", "mix_until", "strong_until"}
"""In test_augment.py."""
AUGMENT: dict[str, Any] = {
    "crop_padding": 2,
    "flip": "none",
    "randaugment_ops": 3,
    "random_erasing": 0.9,
    "mixup": 0.5,
    "cutmix": 0.5,
    "patch_drop": 1.0,
}


def images() -> ImageSet:
    """Ten images of noise, five classes."""
    generator = torch.Generator().manual_seed(3)
    raw_BCHW = torch.randint(256, (10, 3, 8, 12), generator=generator, dtype=torch.uint8)
    return ImageSet(raw_BCHW, torch.arange(10) % 5, tuple("abcde"))


def batches(config: Config) -> Batches:
    return make_batches(config, images())


def make_batches(config: Config, images: ImageSet) -> Batches:
    return Batches(images, config, device=torch.device("cpu"))


def trained(config: Config, updates: int = 9) -> TrainingState:
    """Return the state after some updates, from the same first weights every time."""
    torch.manual_seed(2)
    state = TrainingState.start(VisionTransformer(config.model), config.training)
    for update in train(state, batches(config), config):
        if update.step == updates:
            break
    return state


def changed(section: str, **values: Any) -> Config:
    return dataclasses.replace(
        BASE, **{section: dataclasses.replace(getattr(BASE, section), **values)}
    )


def distance(one: TrainingState, other: TrainingState) -> float:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_the_lists_here_name_every_setting() -> None:
    assert {f.name for f in dataclasses.fields(TrainingConfig)} == {*TRAINING, *APART}
    names = {f.name for f in dataclasses.fields(AugmentConfig)}
    assert names == {*AUGMENT, *APART_AUGMENT}


@pytest.mark.parametrize("name", TRAINING)
def test_every_training_setting_changes_the_weights(name: str) -> None:
    base, other = trained(BASE), trained(changed("training", **{name: TRAINING[name]}))
    assert distance(base, trained(BASE)) == 0
    assert distance(base, other) > 1e-7


@pytest.mark.parametrize("name", AUGMENT)
def test_every_augmentation_changes_the_batch(name: str) -> None:
    base, other = (batches(c)(0) for c in (BASE, changed("augment", **{name: AUGMENT[name]})))
    assert base.images_BCHW.shape == other.images_BCHW.shape
    assert not torch.equal(base.images_BCHW, other.images_BCHW)
    assert torch.equal(base.labels_B, other.labels_B)
    mixes = name in ("mixup", "cutmix")
    assert torch.equal(base.targets_BY, other.targets_BY) is not mixes
    assert other.targets_BY.sum(1).allclose(torch.ones(4))


def test_the_magnitude_of_randaugment_changes_the_batch() -> None:
    weak, strong = (
        batches(changed("augment", randaugment_ops=2, randaugment_magnitude=m))(0) for m in (3, 30)
    )
    assert not torch.equal(weak.images_BCHW, strong.images_BCHW)


def test_muon_has_a_rate_of_its_own() -> None:
    slow, fast = (
        trained(changed("training", optimizer="muon", muon_learning_rate=rate))
        for rate in (0.001, 0.1)
    )
    assert distance(slow, fast) > 1e-3


def test_parts_of_a_batch_add_up_to_it() -> None:
    at_once, parts = (
        trained(
            dataclasses.replace(
                BASE,
                model=dataclasses.replace(BASE.model, dropout=0.0),
                training=dataclasses.replace(BASE.training, batch_size=10, accumulate=n),
            ),
            updates=1,
        )
        for n in (1, 3)
    )
    gradients = zip(at_once.model.parameters(), parts.model.parameters(), strict=True)
    for one, other in gradients:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def one_patch(**training: Any) -> Config:
    """A conv stem whose image is one patch, on eleven images."""
    sections = {
        "model": {"image_size": 4, "patch_size": 4, "stem": "conv", "pool": "mean"},
        "training": training,
    }
    return from_json(sections, BASE)


@pytest.mark.parametrize(
    "training", [{"batch_size": 5}, {"batch_size": 4, "accumulate": 4}, {"batch_size": 1}]
)
def test_batches_of_one_image_of_one_patch_train(training: dict[str, Any]) -> None:
    config = one_patch(**training)
    eleven = images().take(torch.arange(11) % 10)
    small = dataclasses.replace(eleven, raw_BCHW=eleven.raw_BCHW[..., :4, :4].contiguous())
    torch.manual_seed(2)
    state = TrainingState.start(VisionTransformer(config.model), config.training)
    before = {name: t.clone() for name, t in state.model.state_dict().items()}
    done = list(train(state, make_batches(config, small), config))
    assert sum(update.images for update in done) == 33
    for name, tensor in state.model.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.endswith("running_var"):  # of a batch of one value there is none
            one = config.training.batch_size < 5 and name != "stem.4.running_var"
            assert torch.equal(tensor, before[name]) is one, name


def test_a_batch_of_one_value_is_normalized_as_in_evaluation() -> None:
    ours, theirs = BatchNorm(5), torch.nn.BatchNorm2d(5)
    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 5, 2, 4), (1, 5, 1, 2), (2, 5, 1, 1)):  # torch's own, to the bit
        x_BCHW = torch.randn(shape, generator=generator)
        assert torch.equal(ours(x_BCHW), theirs(x_BCHW))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])
    one_BCHW = torch.randn(1, 5, 1, 1, generator=generator)
    assert torch.equal(ours(one_BCHW), theirs.eval()(one_BCHW))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


def test_the_average_follows_its_formula_and_warms_up() -> None:
    config = changed("training", ema_decay=0.25, learning_rate=0.1)
    torch.manual_seed(2)
    state = TrainingState.start(VisionTransformer(config.model), config.training)
    wanted: list[Tensor] = []
    # min(0.25, (1 + n) / (10 + n)) after n = 1, 2, 3, 4 updates; the first update is copied
    decays = [0.0, 2 / 11, 3 / 12, 0.25, 0.25]
    for update, decay in zip(train(state, batches(config), config), decays, strict=False):
        weights = [p.detach().clone() for p in state.model.parameters()]
        pairs = zip(wanted or weights, weights, strict=True)
        wanted = [decay * a + (1 - decay) * w for a, w in pairs]
        if update.step == len(decays):
            break
    assert state.average is not None
    for average, weight in zip(state.eval_model.parameters(), wanted, strict=True):
        torch.testing.assert_close(average, weight)


def test_the_average_of_a_short_run_is_not_its_first_weights() -> None:
    state = trained(changed("training", ema_decay=0.9999), updates=9)
    torch.manual_seed(2)
    first = VisionTransformer(BASE.model)
    for name, last in state.model.named_parameters():
        average, start = (m.get_parameter(name) for m in (state.eval_model, first))
        if (last - start).norm() > 1e-3:
            assert (average - last).norm() < 0.5 * (last - start).norm(), name


def test_clipping_bounds_the_gradient() -> None:
    state = trained(changed("training", clip_norm=1e-3), updates=1)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(1e-3, rel=1e-3)


def test_matrices_decay_and_the_rest_does_not() -> None:
    model = VisionTransformer(dataclasses.replace(BASE.model, n_registers=2))
    names = {id(p): name for name, p in model.named_parameters()}
    (optimizer,) = make_optimizers(model, BASE.training)
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0
    assert {names[id(p)] for p in free["params"]} == {
        n
        for n in names.values()
        if n.endswith("bias") or "norm" in n or n.startswith(("pos", "cl", "reg"))
    }
    (optimizer,) = make_optimizers(model, dataclasses.replace(BASE.training, decay="all"))
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(names)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = VisionTransformer(BASE.model)
    training = dataclasses.replace(BASE.training, optimizer="muon")
    muon, adamw = make_optimizers(model, training)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert {group["betas"] for group in adamw.param_groups} == {(0.9, 0.95)}
    (alone,) = make_optimizers(model, dataclasses.replace(training, optimizer="adamw"))
    assert {group["betas"] for group in alone.param_groups} == {(0.9, 0.999)}
    for name, parameter in model.named_parameters():
        mine = name.startswith("blocks.") and parameter.ndim == 2
        assert (id(parameter) in taken) == mine
        assert (id(parameter) in rest) != mine


def test_muon_takes_the_kernels_of_the_stem_and_vectors_learn_faster() -> None:
    config = dataclasses.replace(
        BASE.model, stem="conv", stem_channels=(8, 10, 9), patch_size=4, pool="cls"
    )
    model = VisionTransformer(config)
    training = dataclasses.replace(
        BASE.training, optimizer="muon", muon_learning_rate=0.03, learning_rate=0.002
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, adamw = make_optimizers(model, training)
    peaks = [
        {names[p]: group["peak"] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (muon, adamw)
    ]
    # The whitened patches are not trained.
    assert {*peaks[0], *peaks[1]} == set(names.values()) - {"stem.0.weight"}
    kernels = {n for n in names.values() if n.startswith("stem.") and "weight" in n}
    hidden = {n for n in kernels if model.get_parameter(n).ndim == 4} - {"stem.0.weight"}
    assert len(hidden) == 4
    assert {name for name in peaks[0] if name.startswith("stem.")} == hidden
    assert set(peaks[0].values()) == {0.03}
    for name, peak in peaks[1].items():
        vector = model.get_parameter(name).ndim == 1 and name != "class_token_D"
        assert peak == pytest.approx(0.01 if vector else 0.002), name


def test_an_epoch_visits_every_image_once_in_another_order_each_time() -> None:
    config = changed("augment", crop_padding=0, flip="none")
    source = batches(config)
    orders = []
    for epoch in range(2):
        steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
        seen = torch.cat([source(step).images_BCHW for step in steps])
        flat = ((seen + 1) * 127.5).round().flatten(1)
        raw = images().raw_BCHW.float().flatten(1)
        orders.append([int((raw == row).all(1).nonzero()) for row in flat])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1]


def test_a_batch_depends_on_the_step_alone() -> None:
    one, other = batches(BASE), batches(BASE)
    for step in (7, 2, 5):
        one(step)
    assert torch.equal(one(4).images_BCHW, other(4).images_BCHW)


def test_no_images_are_refused() -> None:
    with pytest.raises(DataError, match="no images to train on"):
        Batches(images().take(torch.arange(0)), BASE, device=torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_a_compiled_model_learns_the_same() -> None:
    still = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, dropout=0.0))
    compiling = dataclasses.replace(still.training, compile="on")
    plain = trained(still, 3)
    compiled = trained(dataclasses.replace(still, training=compiling), 3)
    assert 0 < distance(plain, compiled) < 1e-4


def test_every_model_setting_changes_the_model() -> None:
    other: dict[str, Any] = {
        "image_size": (12, 8), "n_channels": 1, "n_classes": 6, "patch_size": 2, "embed_dim": 24,
        "n_layers": 3, "n_attention_heads": 1, "forward_mul": 3.0, "dropout": 0.5,
        "drop_path": 0.5, "pool": "mean", "stem": "conv", "position": "sincos", "head": "linear",
        "class_token": True, "fc_norm": True, "hidden_act": "gelu_tanh", "layer_norm_eps": 1e-2,
        "n_registers": 2, "pre_norm": True, "layer_scale": 0.5,
    }  # fmt: skip
    assert {*other, "stem_channels", "stem_pools", "init_std"} == {
        f.name for f in dataclasses.fields(ModelConfig)
    }
    conv = dataclasses.replace(BASE.model, stem="conv")
    assert describe(conv) != describe(dataclasses.replace(conv, stem_channels=(5, 7, 9)))
    assert describe(conv) != describe(dataclasses.replace(conv, stem_pools=(1, 3)))
    for name, value in other.items():
        of_a_mean = name in ("class_token", "fc_norm")
        base = dataclasses.replace(BASE.model, pool="mean") if of_a_mean else BASE.model
        config = dataclasses.replace(base, **{name: value})
        assert describe(config) != describe(base), name


def describe(config: ModelConfig) -> tuple[Any, ...]:
    """Shapes of a model's tensors, and its output in training mode."""
    torch.manual_seed(4)
    model = VisionTransformer(config)
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    H, W = config.image_hw
    images_BCHW = torch.linspace(-1, 1, 2 * config.n_channels * H * W)
    logits_BY = model.train()(images_BCHW.view(2, config.n_channels, H, W))
    shapes = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    return shapes, tuple(images_BCHW.shape), logits_BY.tolist()


def test_operations_match_the_formula() -> None:
    forward, training = count_flops(ModelConfig(n_classes=10))
    patches, width, tokens, layers = 64, 128, 65, 6
    stem, head = patches * 48 * width, width * width + width * 10
    block = tokens * width * (4 * width + 2 * 2 * width) + 2 * tokens**2 * width
    # The last block computes one query per head, and one token in the rest.
    last = tokens * width * 3 * width + 2 * tokens * width + width * (width + 2 * 2 * width)
    assert forward == 2 * (stem + (layers - 1) * block + last + head)
    assert 51e6 < forward / 2 < 52e6
    assert training == 3 * forward - 2 * stem, "no gradient goes to the pixels"


def masks(config: Config) -> list[Tensor]:
    torch.manual_seed(2)
    state = TrainingState.start(VisionTransformer(config.model), config.training)
    seen: list[Tensor] = []
    state.model.dropout.register_forward_hook(lambda *args: seen.append(args[2] == 0))
    updates = train(state, batches(config), config)
    next(updates), next(updates)
    return seen


def test_dropout_differs_from_update_to_update_and_with_the_seed() -> None:
    one, two = masks(changed("run", seed=1)), masks(changed("run", seed=2))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], two[0])
    assert all(map(torch.equal, one, masks(changed("run", seed=1))))


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_another_seed_gives_other_batches(flip: str) -> None:
    config = dataclasses.replace(BASE, augment=AugmentConfig(crop_padding=0, flip=flip))
    one, two = (
        batches(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=s)))(0)
        for s in (1, 2)
    )
    assert not torch.equal(one.labels_B, two.labels_B)


def test_the_average_averages_running_statistics_too() -> None:
    config = dataclasses.replace(
        changed("training", ema_decay=0.25), model=dataclasses.replace(BASE.model, stem="conv")
    )
    torch.manual_seed(2)
    state = TrainingState.start(VisionTransformer(config.model), config.training)
    wanted: Tensor | None = None
    for decay, _ in zip([0.0, 2 / 11, 3 / 12], train(state, batches(config), config), strict=False):
        now = state.model.state_dict()["stem.4.running_mean"].clone()
        wanted = now if wanted is None else decay * wanted + (1 - decay) * now
    torch.testing.assert_close(state.weights()["stem.4.running_mean"], wanted)


def test_dropped_patches_are_those_of_the_model() -> None:
    config = dataclasses.replace(
        changed("augment", patch_drop=1.0, crop_padding=0, flip="none"),
        model=dataclasses.replace(BASE.model, patch_size=2),
    )
    plain = changed("augment", crop_padding=0, flip="none")
    differs = (batches(config)(0).images_BCHW != batches(plain)(0).images_BCHW).any(1).float()
    by_patch = F.avg_pool2d(differs[:, None], 2)
    assert set(by_patch.unique().tolist()) <= {0.0, 1.0}
    coarse = F.avg_pool2d(differs[:, None], 4)
    assert not set(coarse.unique().tolist()) <= {0.0, 1.0}
