"""The reference flow of paper A, written from its facts: what this companion's pass is timed against.

Each augmentation on its own over the batch; PIL images through CLIP's processor; one forward pass of transformers'
CLIP ViT-B/32 in float32 per view, so ten a batch. Random weights: speed does not depend on them.
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel  # noqa: E402

from clipshift_core.augment import AUGMENTATIONS  # noqa: E402


def build():
    """A function images (uint8 (image, 224, 224, 3)) -> embeddings (view, image, 512)."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig()).eval()
    processor = CLIPImageProcessor()
    transforms = [getattr(A, row.transform)(**row.parameters, p=1) for row in AUGMENTATIONS.values()]

    @torch.no_grad()
    def run(images: np.ndarray) -> torch.Tensor:
        found = []
        for transform in (None, *transforms):
            drawn = [image if transform is None else transform(image=image)["image"] for image in images]
            inputs = processor(images=[Image.fromarray(image) for image in drawn], return_tensors="pt")
            vision = model.vision_model(pixel_values=inputs["pixel_values"])
            found.append(model.visual_projection(vision.pooler_output))
        return torch.stack(found)

    return run
