"""The reference flow of paper A, written from its facts: what this companion's pass is timed against.

Each augmentation on its own over the batch; PIL images through CLIP's processor; one forward pass of transformers'
CLIP ViT-B/32 in float32 per view, so ten a batch. Then, as a pass of its own, the metrics: for each image and
augmentation a new draw, the attention of the original and of the view by two forward passes of one image each, and the
pixel metrics in numpy, patch by patch. Random weights: speed does not depend on them.
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel  # noqa: E402

from clipshift_core.augment import AUGMENTATIONS  # noqa: E402


def build():
    """A function images (uint8 (image, 224, 224, 3)) -> embeddings (view, image, 512), metrics (image, view, 4)."""
    torch.manual_seed(0)
    # transformers gives attention out only where it computes it without a fused kernel
    model = CLIPModel(CLIPConfig(attn_implementation="eager")).eval()
    processor = CLIPImageProcessor()
    transforms = [getattr(A, row.transform)(**row.parameters, p=1) for row in AUGMENTATIONS.values()]

    def inputs(images):
        return processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]

    def attention(image):
        found = model.vision_model(pixel_values=inputs([image]), output_attentions=True).attentions[-1]
        row = found[0].mean(0)[0, 1:].reshape(7, 7).numpy()
        row = cv2.resize(row, (224, 224))
        return (row - row.min()) / (row.max() - row.min())

    @torch.no_grad()
    def run(images: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        found = []
        for transform in (None, *transforms):
            drawn = [image if transform is None else transform(image=image)["image"] for image in images]
            vision = model.vision_model(pixel_values=inputs(drawn))
            found.append(model.visual_projection(vision.pooler_output))
        metrics = []
        for image in images:
            for transform in transforms:
                view = transform(image=image)["image"]
                shift = ((attention(image) - attention(view)) ** 2).mean()
                metrics.append([1 / (1 + shift), patches(image, view), edges(image, view), details(image, view)])
        return torch.stack(found), np.reshape(metrics, (len(images), len(transforms), 4))

    return run


def patches(image: np.ndarray, view: np.ndarray) -> float:
    """Patch similarity, with the published wrap of uint8."""
    side, found = len(image) // 4, []
    for y in range(4):
        for x in range(4):
            part = slice(y * side, (y + 1) * side), slice(x * side, (x + 1) * side)
            found.append(1 / (1 + ((image[part] - view[part]) ** 2).mean() / 255**2))
    return float(np.mean(found))


def edges(image: np.ndarray, view: np.ndarray) -> float:
    def edge(pixels):
        down, across = np.gradient(grey(pixels))
        edge = (np.abs(down) + np.abs(across)) / 2
        return edge / edge.max()

    return float(1 - np.abs(edge(image) - edge(view)).mean())


def details(image: np.ndarray, view: np.ndarray) -> float:
    image, view, side, found = grey(image), grey(view), len(image) // 8, []
    for y in range(8):
        for x in range(8):
            part = slice(y * side, (y + 1) * side), slice(x * side, (x + 1) * side)
            before, after = image[part].std(), view[part].std()
            if before >= 1e-6:
                found.append(np.exp(-np.abs(np.log(after / before))))
    return float(np.mean(found))


def grey(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114])
