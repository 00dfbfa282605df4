"""Other systems' Vision Transformers, each in a worker process of their own interpreter.

    PEERS/bin/python -I peers.py SPEC

SPEC is a JSON object (see ``jobs.py``). Vitrail need not be installed there: of our files, only
``worker.py`` is imported, which needs only torch.

Peers use the fused AdamW and the dropout of the measured model; the reference implementation
trains as its train.py does.
"""

import json
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version as installed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[1]))
from speed.worker import Measure, Spec, autocast, random_batch, serve

# The systems: a model of the spec's shape, its logits and its attention.


def reference_model(spec: Spec) -> Any:
    """Return the reference implementation's model, from its own code."""
    folder = str(Path(spec["reference_path"]).resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    vit = import_module("model").VisionTransformer
    names = (
        "n_channels", "embed_dim", "n_layers", "n_attention_heads", "image_size", "patch_size",
        "n_classes", "dropout",
    )  # fmt: skip
    m = spec["model"]
    return vit(forward_mul=int(m["forward_mul"]), **{name: m[name] for name in names})


def timm_model(spec: Spec) -> Any:
    """Return timm's ViT."""
    from timm.models.vision_transformer import VisionTransformer

    m = spec["model"]
    return VisionTransformer(
        img_size=m["image_size"], patch_size=m["patch_size"], in_chans=m["n_channels"],
        num_classes=m["n_classes"], embed_dim=m["embed_dim"], depth=m["n_layers"],
        num_heads=m["n_attention_heads"], mlp_ratio=m["forward_mul"], pos_drop_rate=m["dropout"],
        proj_drop_rate=m["dropout"],
    )  # fmt: skip


def vit_pytorch_model(spec: Spec) -> Any:
    """Return lucidrains' ViT; its dropout also applies to the attention."""
    from vit_pytorch import ViT

    m = spec["model"]
    return ViT(
        image_size=m["image_size"], patch_size=m["patch_size"], channels=m["n_channels"],
        num_classes=m["n_classes"], dim=m["embed_dim"], depth=m["n_layers"],
        heads=m["n_attention_heads"], dim_head=m["embed_dim"] // m["n_attention_heads"],
        mlp_dim=int(m["embed_dim"] * m["forward_mul"]), dropout=m["dropout"],
        emb_dropout=m["dropout"],
    )  # fmt: skip


def transformers_model(spec: Spec) -> Any:
    """Return transformers' ViT with the attention kernel named at the end of the system's name."""
    from transformers import ViTConfig, ViTForImageClassification

    m = spec["model"]
    config = ViTConfig(
        image_size=m["image_size"], patch_size=m["patch_size"], num_channels=m["n_channels"],
        num_labels=m["n_classes"], hidden_size=m["embed_dim"], num_hidden_layers=m["n_layers"],
        num_attention_heads=m["n_attention_heads"],
        intermediate_size=int(m["embed_dim"] * m["forward_mul"]),
        hidden_dropout_prob=m["dropout"], attn_implementation=spec["system"].split()[-1],
    )  # fmt: skip
    return ViTForImageClassification(config)


MODELS: dict[str, Callable[[Spec], Any]] = {
    "reference": reference_model,
    "timm": timm_model,
    "vit-pytorch": vit_pytorch_model,
    "transformers sdpa": transformers_model,
    "transformers eager": transformers_model,
}


def logits_of(system: str, output: Any) -> torch.Tensor:
    """Return the logits in a model's output."""
    if system == "reference":
        return output[0]  # type: ignore[no-any-return]
    return output.logits if system.startswith("transformers") else output  # type: ignore[no-any-return]


def attention_getter(spec: Spec, model: Any) -> Callable[[torch.Tensor], Any]:
    """Return a function from images to the attention of every layer, each (B, A, T, T)."""
    system = spec["system"]
    if system == "reference":
        return lambda images: model(images)[1].chunk(spec["model"]["n_layers"])
    if system == "transformers eager":
        return lambda images: model(images, output_attentions=True).attentions
    if system == "vit-pytorch":
        from vit_pytorch.recorder import Recorder

        recorder = Recorder(model)
        return lambda images: recorder(images)[1].unbind(1)
    caught: list[torch.Tensor] = []
    for block in model.blocks:  # timm: the fused kernel does not return attention
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: caught.append(out))

    def catch(images: torch.Tensor) -> list[torch.Tensor]:
        caught.clear()
        model(images)
        return caught

    return catch


# The workloads.


def step_measure(spec: Spec) -> Measure:
    """Training steps on one batch in memory."""
    model = MODELS[spec["system"]](spec).to(spec["device"]).train()
    images, labels = random_batch(spec)
    reference = spec["system"] == "reference"
    rate, decay = 5e-4, 1e-3
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, weight_decay=decay, fused=None if reference else True
    )

    def measure(steps: int) -> float:
        for _ in range(steps):
            with autocast(spec):
                logits = logits_of(spec["system"], model(images))
            update(logits.float(), labels, optimizer, accuracy=reference)
        return float(steps * len(labels))

    return measure


def update(
    logits: torch.Tensor, labels: torch.Tensor, optimizer: torch.optim.Optimizer, *, accuracy: bool
) -> None:
    """Make one update as the reference's train.py does."""
    loss = F.cross_entropy(logits, labels)
    loss.item()
    if accuracy:
        (labels == logits.max(1)[1]).float().mean().item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def inference_measure(spec: Spec) -> Measure:
    """Logits of one batch in memory."""
    model = MODELS[spec["system"]](spec).to(spec["device"]).eval()
    images, _ = random_batch(spec)

    def measure(batches: int) -> float:
        with torch.inference_mode(), autocast(spec):
            for _ in range(batches):
                model(images)
        return float(batches * len(images))

    return measure


def explanation_measure(spec: Spec) -> Measure:
    """Attention rollout of a batch: heads averaged, the skip added, the layers multiplied."""
    model = MODELS[spec["system"]](spec).to(spec["device"]).eval()
    images, _ = random_batch(spec)
    attentions = attention_getter(spec, model)

    def measure(batches: int) -> float:
        with torch.inference_mode(), autocast(spec):
            for _ in range(batches):
                rollout(attentions(images)).cpu()
        return float(batches * len(images))

    return measure


def rollout(attentions: Any) -> torch.Tensor:
    """Return the contribution of each patch to the class token (B, N)."""
    flow = skip = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for attention in attentions:
        flow = (attention.float().mean(dim=1) + skip) / 2 @ flow
    return flow[:, 0, 1:]


def reference_options(spec: Spec) -> Any:
    """Return the command-line options that the reference's functions read."""
    return SimpleNamespace(
        **spec["model"], batch_size=spec["batch_size"], num_workers=2, device=spec["device"],
        data_path=spec["data_path"], num_train_images=None, num_test_images=spec["images"],
        no_image=True,
    )  # fmt: skip


def epoch_measure(spec: Spec) -> Measure:
    """The reference's training with its own DataLoader and worker processes."""
    model = reference_model(spec).to(spec["device"]).train()
    loader, _ = import_module("train").dataloader(reference_options(spec))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=1e-3)

    def measure(steps: int) -> float:
        images = 0
        for number, (x, y) in enumerate(loader, 1):
            x, y = x.to(spec["device"]), y.to(spec["device"])
            update(model(x)[0], y, optimizer, accuracy=True)
            images += len(y)
            if number == steps:
                break
        return float(images)

    return measure


def test_measure(spec: Spec) -> Measure:
    """The reference's test.py on the first test images; its weights and logits are saved.

    The matrices are drawn with standard deviation 2 / sqrt(inputs), so that the untrained model is
    as confident as a trained one and a difference between systems is visible in the probabilities.
    """
    torch.manual_seed(1)
    model = reference_model(spec).to(spec["device"]).eval()
    test = import_module("test")
    options, folder = reference_options(spec), Path(spec["folder"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 2 / parameter.shape[1] ** 0.5)
        loader = test.dataloader(options)
        logits = torch.cat([model(x.to(spec["device"]))[0].cpu() for x, _ in loader])
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, folder / "w.pt")
    torch.save(logits, folder / "logits.pt")

    def measure(passes: int) -> float:
        for _ in range(passes):
            test.test(options, loader, model)
        return float(passes * spec["images"])

    return measure


WORKLOADS: dict[str, Callable[[Spec], Measure]] = {
    "step": step_measure,
    "epoch": epoch_measure,
    "inference": inference_measure,
    "test": test_measure,
    "explanation": explanation_measure,
}


def build(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Return what the spec measures, and facts about it."""
    system = spec["system"]
    warnings.simplefilter("ignore")  # so that the last line of stderr is the error
    version = "its own code" if system == "reference" else installed(system.split()[0])
    return WORKLOADS[spec["workload"]](spec), {"version": version}


if __name__ == "__main__":
    serve(build, json.loads(sys.argv[1]))
