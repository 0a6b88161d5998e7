"""Shifts by hand, against scipy's quadrature and a dense loop; repairs that must work, random ones that must not."""

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipshift_core import repair, shift_attribution
from clipshift_core.sae import TopK
from clipshift_core.sae_kernels import Codes

SETTINGS = {"n_resamples": 500, "seed": 3}


def _hand() -> dict:
    """One image, three latents in two dimensions, y = 2 x_0 + 10 x_1.

    d_0 = (1, 0), d_1 = (0, 1), d_2 = (0.6, 0.8); y along them: 2, 10, 9.2
    image: latent 0 at 3, latent 2 at 1, and an error of (0.1, 0)
    view: latent 0 at 1, latent 1 at 0.5, and an error of (0.1, -0.2)
    """
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    return {
        "x0": torch.tensor([[3.7, 0.8]]),
        "x1": torch.tensor([[1.1, 0.3]]),
        "codes0": (torch.tensor([[2, 0, 1]]), torch.tensor([[1.0, 3.0, 0.0]])),
        "codes1": (torch.tensor([[0, 0, 1]]), torch.tensor([[1.0, 0.0, 0.5]])),
        "W_dec": W_dec,
        "embed": lambda x: x,
        "target": lambda e: e @ torch.tensor([2.0, 10.0]),
    }


class Tail(nn.Module):
    """What follows a last block: layer norm, class token, projection. In float64, for the oracles' sake."""

    def __init__(self, width: int, dim: int, *, mixed: bool = False):
        super().__init__()
        made = torch.Generator().manual_seed(5)
        self.norm = nn.LayerNorm(width).double()
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(width, generator=made) + 0.5)
            self.norm.bias.copy_(torch.randn(width, generator=made) / 5)
        self.proj = torch.randn(width, dim, generator=made).double() / width**0.5
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        if self.mixed:  # tokens attend to each other
            x = x + (x @ x.mT / x.shape[-1]).softmax(-1) @ x
        return self.norm(x if x.ndim == 2 else x[:, 0]) @ self.proj


def _drawn(shape: tuple[int, ...] = (12,), width: int = 16, n_latents: int = 40, k: int = 5, seed: int = 0) -> dict:
    """Activations of images and views that an untrained dictionary writes badly, a tail, and the cosine to a text."""
    made = torch.Generator().manual_seed(seed)
    x0 = torch.randn(*shape, width, generator=made)
    x1 = x0 + 0.8 * torch.randn(*shape, width, generator=made)
    sae = TopK(width, n_latents, k, seed=seed).double()
    tail, text = Tail(width, 8, mixed=len(shape) == 2), F.normalize(torch.randn(8, generator=made), dim=0).double()
    x0, x1 = x0.double(), x1.double()
    codes = []
    for x in (x0, x1):
        found = sae.encode(x.reshape(-1, width))
        codes.append(Codes(*(part.detach().reshape(*shape, k) for part in found)))
    return {
        "x0": x0,
        "x1": x1,
        "codes0": codes[0],
        "codes1": codes[1],
        "W_dec": sae.W_dec.detach(),
        "embed": tail,
        "target": lambda e: F.normalize(e, dim=1) @ text,
    }


def _dense(codes: Codes, n_latents: int) -> Tensor:
    """Activations (image, token, latent)."""
    indices, values = codes
    if indices.ndim == 2:
        indices, values = indices[:, None], values[:, None]
    return torch.zeros(*indices.shape[:2], n_latents, dtype=values.dtype).scatter_add_(2, indices, values)


def _without(arguments: dict, *names: str) -> dict:
    return {name: value for name, value in arguments.items() if name not in names}


# one image at a time


def test_hand_worked():
    found = shift_attribution.decompose(**_hand())
    assert found.latent.tolist() == [[0, 1, 2]]
    assert found.before.tolist() == [[3, 0, 1]] and found.after.tolist() == [[1, 0.5, 0]]
    # (1 - 3) 2 = -4, (0.5 - 0) 10 = 5, (0 - 1) 9.2 = -9.2; the error's change is (0, -0.2), so -2
    torch.testing.assert_close(found.part, torch.tensor([[-4, 5, -9.2]]).double(), atol=1e-5, rtol=0)
    assert found.error.tolist() == pytest.approx([-2], abs=1e-5)
    # y(x0) = 7.4 + 8 = 15.4, y(x1) = 2.2 + 3 = 5.2
    assert found.change.tolist() == pytest.approx([-10.2], abs=1e-5) and found.gap.abs().max() < 1e-5


def test_equals_scipys_quadrature():
    arguments = _drawn()
    found = shift_attribution.decompose(**arguments, n_nodes=24)
    a0, a1 = (_dense(arguments[name], 40)[:, 0] for name in ("codes0", "codes1"))

    def slope(t: float, i: int, direction: Tensor) -> float:
        """dy/dx . direction at x(t), of one image."""
        x = (arguments["x0"][i] + t * (arguments["x1"][i] - arguments["x0"][i])).requires_grad_()
        y = arguments["target"](arguments["embed"](x[None]))[0]
        return float(torch.autograd.grad(y, x)[0] @ direction)

    for i in (0, 7):
        used = [j for j in found.latent[i].tolist() if j >= 0]
        assert used == sorted(set(a0[i].nonzero()[:, 0].tolist()) | set(a1[i].nonzero()[:, 0].tolist()))
        for slot in (0, len(used) - 1):
            direction = (a1[i] - a0[i])[used[slot]] * arguments["W_dec"][used[slot]]
            oracle = scipy.integrate.quad(slope, 0, 1, args=(i, direction))[0]
            assert float(found.part[i, slot]) == pytest.approx(oracle, abs=1e-9)
        error = [x[i] - a[i] @ arguments["W_dec"] for x, a in ((arguments["x0"], a0), (arguments["x1"], a1))]
        oracle = scipy.integrate.quad(slope, 0, 1, args=(i, error[1] - error[0]))[0]
        assert float(found.error[i]) == pytest.approx(oracle, abs=1e-9)


def test_as_many_nodes_as_completeness_asks_for():
    """Along a path on which y = sin(40 t), eight nodes are far from enough; a given number is kept to."""
    x0, codes = torch.zeros(1, 1).double(), (torch.zeros(1, 1).long(), torch.zeros(1, 1).double())
    path = (x0, x0 + 1, codes, codes, torch.ones(1, 1).double(), lambda x: x, lambda e: torch.sin(40 * e[:, 0]))
    assert shift_attribution.decompose(*path, n_nodes=shift_attribution.FEWEST_NODES).gap.abs() > 1e-2
    found = shift_attribution.decompose(*path)
    assert found.gap.abs() <= 1e-4 and found.error.tolist() == pytest.approx([np.sin(40)], abs=1e-4)
    # a path too wild for the most nodes comes back with its gap
    wild = (*path[:-1], lambda e: torch.sin(4000 * e[:, 0]))
    assert shift_attribution.decompose(*wild).gap.abs() > 1e-2


@pytest.mark.parametrize("shape", [(12,), (6, 7)])
def test_parts_sum_to_the_change(shape):
    arguments = _drawn(shape)
    found = shift_attribution.decompose(**arguments)
    assert found.change.abs().max() > 0.1 and found.gap.abs().max() < 1e-4
    whole = [arguments["target"](arguments["embed"](arguments[x])) for x in ("x0", "x1")]
    torch.testing.assert_close(found.part.sum(1) + found.error, whole[1] - whole[0], atol=1e-4, rtol=0)
    # more nodes close the gap; two leave it open, so that the bound says something
    assert shift_attribution.decompose(**arguments, n_nodes=32).gap.abs().max() < 1e-8
    assert shift_attribution.decompose(**arguments, n_nodes=1).gap.abs().max() > 1e-3
    single = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    single |= {name: Codes(arguments[name].indices, arguments[name].values.float()) for name in ("codes0", "codes1")}
    single |= {"embed": lambda x: arguments["embed"](x.double())}
    assert shift_attribution.decompose(**single).gap.abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [1, shift_attribution.CHUNK_ENTRIES])
def test_a_latents_parts_are_summed_over_tokens(chunk, monkeypatch):
    monkeypatch.setattr(shift_attribution, "CHUNK_ENTRIES", chunk)
    arguments = _drawn((6, 7))
    found = shift_attribution.decompose(**arguments)
    gradient, _, _ = shift_attribution.path_gradient(*(arguments[n] for n in ("x0", "x1", "embed", "target")))
    a0, a1 = (_dense(arguments[name], 40) for name in ("codes0", "codes1"))
    oracle = torch.einsum("itl,lw,itw->il", a1 - a0, arguments["W_dec"], gradient[0])
    for i in range(6):
        used = found.latent[i][found.latent[i] >= 0]
        assert used.tolist() == ((a0[i] != 0) | (a1[i] != 0)).any(0).nonzero()[:, 0].tolist()
        torch.testing.assert_close(found.part[i, : len(used)], oracle[i, used])
        torch.testing.assert_close(found.before[i, : len(used)], a0[i].sum(0)[used])
        torch.testing.assert_close(found.after[i, : len(used)], a1[i].sum(0)[used])
        assert not found.part[i, len(used) :].any() and (found.latent[i, len(used) :] == -1).all()


def test_tokens_without_codes_are_the_rest():
    """Codes of tokens 1 to 5 alone: as if the others had empty ones, but their change is told from the error."""
    arguments, some = _drawn((6, 7)), slice(1, 6)
    empty = {}
    for name in ("codes0", "codes1"):
        indices, values = arguments[name]
        values = values.clone()
        values[:, [0, 6]] = 0
        empty[name] = Codes(indices, values)
    few = {name: Codes(*(part[:, some] for part in arguments[name])) for name in empty}
    found = shift_attribution.decompose(**arguments | few, tokens=some)
    oracle = shift_attribution.decompose(**arguments | empty)
    torch.testing.assert_close(found.part, oracle.part)
    torch.testing.assert_close(found.error + found.rest, oracle.error)
    gradient, _, _ = shift_attribution.path_gradient(*(arguments[n] for n in ("x0", "x1", "embed", "target")))
    moved = arguments["x1"] - arguments["x0"]
    torch.testing.assert_close(found.rest, (gradient[0] * moved)[:, [0, 6]].sum((1, 2)))
    assert found.rest.abs().min() > 1e-6 and not oracle.rest.any() and found.gap.abs().max() < 1e-4
    repairs = [
        repair.repair(shift, **_without(arguments, "x0") | codes, seed=1, sizes=(2,), tokens=tokens)
        for shift, codes, tokens in ((found, few, some), (oracle, empty, slice(None)))
    ]
    for a, b in zip(*(r.target for r in repairs), strict=True):
        torch.testing.assert_close(a, b)


def test_several_texts_are_each_alone():
    arguments = _drawn()
    texts = F.normalize(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), dim=0).double()
    several = shift_attribution.decompose(**arguments | {"target": lambda e: texts.T @ F.normalize(e, dim=1).T})
    assert len(several.part) == 3 and several.gap.shape == (3, 12)
    for t in range(3):
        one = shift_attribution.decompose(**arguments | {"target": lambda e, t=t: F.normalize(e, dim=1) @ texts[:, t]})
        for a, b in zip(several.text(t), one, strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="3 texts"):
        shift_attribution.concentration(several)


def test_an_unchanged_view_has_no_parts():
    arguments = _drawn()
    found = shift_attribution.decompose(**arguments | {"x1": arguments["x0"], "codes1": arguments["codes0"]})
    assert found.part.abs().max() == 0 and found.error.abs().max() == 0
    assert shift_attribution.concentration(found)["half"].isnan().all()


def test_joined_and_order_of_images():
    arguments = _drawn((20,))
    whole = shift_attribution.decompose(**arguments)

    def some(rows: Tensor) -> dict:
        codes = {name: Codes(*(part[rows] for part in arguments[name])) for name in ("codes0", "codes1")}
        return {**arguments, "x0": arguments["x0"][rows], "x1": arguments["x1"][rows], **codes}

    joined = shift_attribution.joined(shift_attribution.decompose(**some(r)) for r in torch.arange(20).split(7))
    for a, b in zip(joined, whole, strict=True):
        torch.testing.assert_close(a, b)
    two = {"target": lambda e: torch.stack([arguments["target"](e), e[:, 0]])}
    parts = [shift_attribution.decompose(**some(r) | two) for r in torch.arange(20).split(7)]
    for a, b in zip(shift_attribution.joined(parts).text(0), whole, strict=True):
        torch.testing.assert_close(a, b)
    order = torch.randperm(20)
    mixed = shift_attribution.decompose(**some(order))
    for a, b in zip(mixed, whole, strict=True):
        torch.testing.assert_close(a, b[order])
    pd.testing.assert_frame_equal(shift_attribution.latent_means(mixed), shift_attribution.latent_means(whole))


def test_bad_input_is_refused():
    good = _hand()
    for bad, message in (
        ({"x1": torch.zeros(2, 2)}, "activations of shape"),
        ({"x0": torch.zeros(0, 2), "x1": torch.zeros(0, 2)}, "at least one image"),
        ({"codes0": (torch.zeros(2, 3).long(), torch.zeros(2, 3))}, "codes of shape"),
        ({"target": lambda e: e.sum()}, "target of shape"),
        ({"target": lambda e: e[:, 0] / 0}, "finite"),
        ({"n_nodes": 0}, "n_nodes = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            shift_attribution.decompose(**good | bad)


# over many images


def _shift(part: list, before: list | None = None, after: list | None = None, error: list | None = None):
    part = torch.tensor(part).double()
    n, slots = part.shape
    latent = torch.arange(slots).repeat(n, 1)
    before, after = (torch.zeros(n, slots) if x is None else torch.tensor(x) for x in (before, after))
    error = torch.zeros(n) if error is None else torch.tensor(error)
    return shift_attribution.Shift(
        latent, before, after, part, error, torch.zeros(n), torch.zeros(n), part.sum(1) + error
    )


def test_concentration_by_hand():
    # sizes 4, 3, 2, 1: 40 %, 70 %, 90 %; (10)^2 / (16 + 9 + 4 + 1) = 10 / 3; an error of 10 beside 10
    # equal parts: 2 of 4 make half, all 4 make 90 %, participation 4; one alone: 1, 1, 1
    shift = _shift([[1.0, -4, 2, -3], [5, 5, -5, -5], [0, 0, -7, 0], [0, 0, 0, 0]], error=[10.0, 0, 7, 1])
    found = shift_attribution.concentration(shift)
    assert found["half"][:3].tolist() == [2, 2, 1] and found["ninety"][:3].tolist() == [3, 4, 1]
    assert found["participation"][:3].tolist() == pytest.approx([10 / 3, 4, 1])
    assert found["latents"][:3].tolist() == [4, 4, 1] and found["error"][:3].tolist() == [0.5, 0, 0.5]
    assert all(each[3].isnan() for each in found.values())
    table = shift_attribution.concentration_table({"blur": shift}, **SETTINGS).set_index("quantity")
    assert table.loc["half", "mean"] == pytest.approx(5 / 3) and (table["n"] == 3).all()
    assert table.loc["half", "low"] == 1 and table.loc["half", "high"] == 2


def test_account_by_hand():
    shift = _shift([[1.0, -4, 2], [-1, -1, 0]], error=[0.5, -0.5])
    table = shift_attribution.account_table({"blur": shift}, **SETTINGS)
    # change -0.5 and -2.5, lost -4 and -2, gained 3 and 0, error 0.5 and -0.5
    means = dict(zip(table["quantity"], table["mean"], strict=True))
    assert means == pytest.approx({"change": -1.5, "lost": -3, "gained": 1.5, "error": 0, "rest": 0, "gap": 0})
    assert list(table.columns) == ["augmentation", "quantity", "mean", "low", "high", "n"]


def test_fingerprint_by_hand():
    # latent 0: destroyed in image 0, fell in image 1; latent 1: invented in image 0; latent 2: grew in both
    shift = _shift([[-3.0, 1, 0.5], [-1, 0, 0.5]], before=[[2.0, 0, 1], [2, 0, 1]], after=[[0.0, 3, 2], [1.5, 0, 3]])
    table = shift_attribution.fingerprints({"blur": shift, "noise": shift}, n_shown=2, **SETTINGS)
    assert table["augmentation"].tolist() == ["blur", "blur", "noise", "noise"]
    first, second = table.iloc[0], table.iloc[1]
    # mean parts -2, 0.5, 0.5: of equal ones the lower number first
    assert (first["latent"], first["part"], second["latent"], second["part"]) == (0, -2, 1, 0.5)
    assert first["share"] == pytest.approx(4 / 6) and second["share"] == pytest.approx(1 / 6)
    assert first[["lost", "gained", "destroyed", "invented"]].tolist() == [1.25, 0, 0.5, 0]
    assert second[["lost", "gained", "destroyed", "invented"]].tolist() == [0, 1.5, 0, 0.5]
    # of two images, a resample holds one twice or both: the interval runs from one to the other
    assert first[["part_low", "part_high"]].tolist() == [-3, -1] and second["invented_high"] == 1
    full = shift_attribution.latent_means(shift)
    assert full["latent"].tolist() == [0, 1, 2] and full["gained"].tolist() == [0, 1.5, 1.5]


def test_latent_means_equal_a_dense_mean():
    arguments = _drawn((30,))
    found = shift_attribution.decompose(**arguments)
    table = shift_attribution.latent_means(found).set_index("latent")
    a0, a1 = (_dense(arguments[name], 40)[:, 0].numpy() for name in ("codes0", "codes1"))
    part = np.zeros((30, 40))
    for i, s in np.ndindex(*found.latent.shape):
        if found.latent[i, s] >= 0:
            part[i, found.latent[i, s]] = found.part[i, s]
    oracle = {
        "part": part.mean(0),
        "share": np.abs(part).sum(0) / np.abs(part).sum(),
        "lost": np.maximum(a0 - a1, 0).mean(0),
        "gained": np.maximum(a1 - a0, 0).mean(0),
        "destroyed": ((a0 > 0) & (a1 == 0)).mean(0),
        "invented": ((a0 == 0) & (a1 > 0)).mean(0),
    }
    for name, values in oracle.items():
        np.testing.assert_allclose(table[name], values[table.index], atol=1e-12)
    assert (table["part"].abs().diff().dropna() <= 1e-15).all()
    shown = shift_attribution.fingerprints({"a": found}, n_shown=5, **SETTINGS)
    assert (shown["part_low"] <= shown["part"]).all() and (shown["part"] <= shown["part_high"]).all()
    assert len(table) == ((a0 > 0) | (a1 > 0)).any(0).sum()


# repair


def _planted(n: int = 60, n_latents: int = 50) -> tuple[dict, dict]:
    """Images whose class latent (0 or 1) the view has lost, among ten others that change without effect.

    The embedding is the first two dimensions, which latents 0 and 1 alone write; the others write into the rest.
    """
    made = torch.Generator().manual_seed(2)
    W_dec = torch.zeros(n_latents, n_latents).double()
    W_dec.fill_diagonal_(1.0)
    label = torch.arange(n) % 2
    other = torch.stack([torch.randperm(n_latents - 2, generator=made)[:10] + 2 for _ in range(n)])
    codes0 = Codes(
        torch.cat([label[:, None], other], 1), torch.cat([torch.full((n, 1), 4.0), torch.ones(n, 10)], 1).double()
    )
    values = torch.rand(n, 10, generator=made).double()
    codes1 = Codes(torch.cat([1 - label[:, None], other], 1), torch.cat([torch.full((n, 1), 0.5), values], 1).double())
    x0, x1 = ((_dense(codes, n_latents)[:, 0] @ W_dec) for codes in (codes0, codes1))
    texts = torch.eye(2).double()
    arguments = {"x1": x1, "codes0": codes0, "codes1": codes1, "W_dec": W_dec, "embed": lambda x: x[:, :2]}
    arguments["target"] = lambda e: (e * texts[label[: len(e)]]).sum(1)
    return {"x0": x0}, arguments


def test_the_right_latent_repairs_and_random_ones_do_not():
    original, arguments = _planted()
    shift = shift_attribution.decompose(**original, **arguments)
    np.testing.assert_allclose(shift.part.min(1).values, -4)
    found = repair.repair(
        shift,
        **arguments,
        seed=0,
        original=original["x0"][:, :2],
        directions=torch.eye(2).double(),
        sizes=(1, 3, 12),
        n_draws=100,
    )
    # the view has 0 of 4 along its class, and 0.5 along the other: predicted wrongly, always
    assert not found.target.view.any() and not found.prediction.view.any()
    assert (found.target.top == 4).all() and (found.prediction.top == 1).all()
    assert (found.target.every == 4).all() and (found.target.original == 4).all()
    table = repair.table(found, **SETTINGS).set_index(["measure", "chosen", "size"])
    assert list(table.columns) == ["share", "low", "high", "n"]
    assert table.loc[("target", "top", 1), "share"] == 1 and table.loc[("predictions", "top", 1), "share"] == 1
    # one of twelve drawn at random is the right one in a twelfth of the cases, three in a quarter, twelve always
    for size in (1, 3, 12):
        row = table.loc[("target", "random", size)]
        assert row["share"] == pytest.approx(size / 12, abs=0.03) and row["low"] <= row["share"] <= row["high"]
    gain = table.loc[("target", "top - random", 1)]
    assert gain["low"] > 0.85 and gain["share"] == pytest.approx(1 - table.loc[("target", "random", 1), "share"])
    assert table.loc[("broken", "top", 1), "n"] == 0 and np.isnan(table.loc[("broken", "top", 1), "share"])
    assert table.loc[("predictions", "random", 3), "n"] == 60


def test_repair_equals_restoring_one_by_one_over_tokens():
    arguments = _drawn((6, 4), n_latents=12, k=3)
    shift = shift_attribution.decompose(**arguments)
    found = repair.repair(shift, **_without(arguments, "x0"), seed=1, sizes=(2,), n_draws=1)
    assert found.prediction is None
    a0, a1 = (_dense(arguments[name], 12) for name in ("codes0", "codes1"))
    for i in range(6):
        used = shift.latent[i][shift.latent[i] >= 0]
        for chosen, seen in ((shift.part[i, : len(used)].argsort()[:2], "top"), (torch.arange(len(used)), "every")):
            back = torch.zeros(12).double()
            back[used[chosen]] = 1
            x = arguments["x1"][i] + ((a0 - a1)[i] * back) @ arguments["W_dec"]
            y = float(arguments["target"](arguments["embed"](x[None])).detach())
            assert float(getattr(found.target, seen).flatten()[i]) == pytest.approx(y)
    torch.testing.assert_close(found.target.view, shift.view)


def test_restoring_all_leaves_the_error_alone():
    """On a linear tail what all latents do not bring back is the error's part, exactly."""
    arguments = _hand()
    shift = shift_attribution.decompose(**arguments)
    found = repair.repair(shift, **_without(arguments, "x0"), seed=0, sizes=(1,))
    assert found.target.every.tolist() == pytest.approx([15.4 - 2], abs=1e-5)
    # the latent that costs most is number 2, with -9.2
    assert found.target.top[0].tolist() == pytest.approx([5.2 + 9.2], abs=1e-5)


def test_random_choice_follows_from_seed_image_and_latent_alone():
    original, arguments = _planted()
    shift = shift_attribution.decompose(**original, **arguments)
    some = slice(20, 44)
    part = {name: Codes(*(x[some] for x in arguments[name])) for name in ("codes0", "codes1")}
    few = {**arguments, **part, "x1": arguments["x1"][some]}
    of_few = shift_attribution.Shift(*(x[some] for x in shift))
    numbers = np.arange(60)

    def run(shift, arguments, seed, images):
        return repair.repair(shift, **arguments, seed=seed, sizes=(1, 3), images=images)

    whole = run(shift, arguments, 7, None)
    torch.testing.assert_close(run(of_few, few, 7, numbers[some]).target.random, whole.target.random[:, some])
    assert not torch.equal(run(of_few, few, 7, None).target.random, whole.target.random[:, some])
    assert not torch.equal(run(shift, arguments, 8, None).target.random, whole.target.random)
    halves = [Codes(*(x[:30] for x in arguments[n])) for n in ("codes0", "codes1")]
    first = {**arguments, "codes0": halves[0], "codes1": halves[1], "x1": arguments["x1"][:30]}
    halves = [Codes(*(x[30:] for x in arguments[n])) for n in ("codes0", "codes1")]
    second = {**arguments, "codes0": halves[0], "codes1": halves[1], "x1": arguments["x1"][30:]}
    joined = repair.joined(
        run(shift_attribution.Shift(*(x[rows] for x in shift)), part, 7, numbers[rows])
        for rows, part in ((slice(0, 30), first), (slice(30, 60), second))
    )
    torch.testing.assert_close(joined.target.random, whole.target.random)


def test_random_keys_are_uniform_and_independent():
    latent = torch.arange(200).repeat(300, 1)
    latent[:, 150:] = -1
    keys = repair._random_keys(latent, np.arange(300), 4, 0)
    assert keys[:, 150:].isinf().all()
    keys = keys[:, :150].numpy()
    assert np.abs(np.histogram(keys, bins=10, range=(0, 1))[0] - 4500).max() < 300  # 5 standard deviations are 318
    assert np.abs(np.corrcoef(keys)[np.triu_indices(300, 1)]).max() < 0.45  # 45,000 pairs, 5.5 / sqrt(150)
    other = repair._random_keys(latent, np.arange(300), 4, 1)[:, :150].numpy()
    assert abs(np.corrcoef(keys.ravel(), other.ravel())[0, 1]) < 0.03


def test_views_of_one_image_are_drawn_together():
    """Every image twice is as much evidence as every image once."""
    made = torch.Generator().manual_seed(5)
    parts = [torch.rand(30, generator=made) for _ in range(5)]
    once = repair.Outcome(parts[0] + 1, parts[1], parts[2][None], parts[3][None], parts[4])
    twice = repair.Outcome(*(torch.cat([each, each], dim=-1) for each in once))
    of = np.tile(np.arange(30), 2)
    single = repair.table(repair.Repair((2,), once, None), **SETTINGS)
    paired = repair.table(repair.Repair((2,), twice, None), of=of, **SETTINGS)
    columns = ["share", "low", "high"]
    np.testing.assert_allclose(paired[columns], single[columns], rtol=1e-12)
    apart = repair.table(repair.Repair((2,), twice, None), **SETTINGS)  # as if they were sixty images: too narrow
    assert (apart["high"] - apart["low"] < 0.9 * (single["high"] - single["low"])).all()


def test_ratio_of_means_by_hand_and_where_it_has_no_meaning():
    # original 1 everywhere; views 0, 0.5, 1.0: losses 1, 0.5, 0; brought back 0.5, 0.5, 0.3: 1.3 / 1.5
    y = repair.Outcome(
        torch.ones(3), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[0.5, 1.0, 1.3]]), torch.zeros(1, 3), torch.ones(3)
    )
    table = repair.table(repair.Repair((2,), y, None), **SETTINGS)
    assert table["chosen"].tolist() == ["top", "random", "top - random", "every"]
    # random: -(0 + 0.5 + 1) / 1.5
    assert table["share"].tolist() == pytest.approx([1.3 / 1.5, -1, 1.3 / 1.5 + 1, 1])
    assert table["size"].tolist() == [2, 2, 2, pd.NA] and (table["n"] == 3).all()
    rng = np.random.default_rng(0)
    view = torch.from_numpy(1 + rng.normal(0, 1, 50))
    view += 0.95 - view.mean()  # lost on average is 0.05 of a spread of 1
    vague = repair.Outcome(torch.ones(50), view, view[None] + 0.1, view[None], view)
    table = repair.table(repair.Repair((2,), vague, None), **SETTINGS)
    assert table[["share", "low", "high"]].isna().all(axis=None)


def test_interval_of_the_recovered_share_covers_the_truth():
    """Losses of mean 1, of which a repair brings back 0.6 on average."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        loss = rng.normal(1, 0.5, 80)
        back = 0.6 * loss + rng.normal(0, 0.3, 80)
        _, low, high = repair._ratio(torch.from_numpy(back), torch.from_numpy(loss), 200, 1)
        hits += low <= 0.6 <= high
    assert hits >= 88


def test_repair_refuses_another_shift_and_half_a_question():
    original, arguments = _planted()
    shift = shift_attribution.decompose(**original, **arguments)
    with pytest.raises(ValueError, match="not that of these codes"):
        repair.repair(shift._replace(latent=shift.latent + 1), **arguments, seed=0)
    with pytest.raises(ValueError, match="together only"):
        repair.repair(shift, **arguments, seed=0, directions=torch.eye(2).double())
