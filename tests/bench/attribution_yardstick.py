"""The yardstick for attribution: paper B's protocol, plainly, from the facts of its public code.

For each batch of images and each of six methods the whole image encoder runs with the autoencoder put into its last
block by a hook, in dense products over all latents; then, for each of six deletion steps, it runs again with the first
0 to 5 latents of the method's order at zero. That makes 42 forward passes of every image. Gradients are taken with
respect to the latents alone, so that backward stops behind the encoder's last block. As in that code "integrated
gradients" are the values of act x grad, computed once more, orders go over all latents of the dictionary, on or off,
and insertion is left out. The logit lens, which does not depend on the image, is computed beforehand.
"""

import torch
import torch.nn.functional as F

METHODS = ("act_x_grad", "integrated_gradients", "logit_lens", "act_x_logit_lens", "energy", "random")
STEPS = (0, 1, 2, 3, 4, 5)


class Yardstick:
    """visual: OpenCLIP's ViT. weights: those of a `TopK`, by name. texts: (image, dim), one of unit length an image."""

    def __init__(self, visual, weights, k: int, texts):
        self.visual, self.k, self.texts = visual, k, texts
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (weights[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
        with torch.no_grad():
            self.directions = F.normalize(visual.ln_post(self.W_dec) @ visual.proj, dim=1)
        self.norms = self.W_dec.norm(dim=1)
        self.keep = self.latents = None
        visual.transformer.resblocks[-1].register_forward_hook(self.splice)

    def splice(self, block, inputs, stream):
        """Class token = decoded latents, some of them deleted, + what the whole of them leaves of it."""
        x = stream[:, 0]
        pre = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        values, indices = pre.topk(self.k, dim=1)
        latents = torch.zeros_like(pre).scatter(1, indices, values.relu())
        error = x - self.decode(latents)
        self.latents = latents.detach().requires_grad_(torch.is_grad_enabled())
        kept = self.latents if self.keep is None else self.latents * self.keep
        stream = stream.clone()
        stream[:, 0] = self.decode(kept) + error.detach()
        return stream

    def decode(self, latents):
        return latents @ self.W_dec + self.b_dec

    def cosine(self, pixels):
        return (F.normalize(self.visual(pixels), dim=1) * self.texts).sum(1)

    def attribution(self, pixels, method: str):
        self.keep = None
        if method in ("act_x_grad", "integrated_gradients"):
            y = self.cosine(pixels)
            (slope,) = torch.autograd.grad(y.sum(), self.latents)
            return self.latents.detach() * slope
        with torch.no_grad():
            self.cosine(pixels)
        lens = self.texts @ self.directions.T
        return {
            "logit_lens": lambda: lens,
            "act_x_logit_lens": lambda: self.latents * lens,
            "energy": lambda: self.latents * self.norms,
            "random": lambda: torch.rand_like(lens),
        }[method]()

    @torch.no_grad()
    def deletion(self, pixels, scores):
        order, found = scores.argsort(dim=1, descending=True), []
        for n in STEPS:
            self.keep = torch.ones_like(scores).scatter(1, order[:, :n], 0.0)
            found.append(self.cosine(pixels))
        return torch.stack(found, dim=1)

    def __call__(self, pixels) -> dict:
        """Each method's deletion curve, (image, step), of preprocessed pixels (image, 3, h, w)."""
        return {method: self.deletion(pixels, self.attribution(pixels, method)) for method in METHODS}
