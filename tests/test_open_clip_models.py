"""Every model that OpenCLIP lists, built small: what is read of it is right, and what is not read is listed here.

The checks are in `open_clip_models`; their oracles are OpenCLIP's own forward, its own transform and finite
differences. `test_attention` compares attention itself, a tower of each family, with independent ones.
"""

import open_clip
import pytest
import timm
from open_clip_models import COMMAND, COVERAGE, Found, measure, table

NO_BLOCKS = "visual.trunk ({}): found no blocks"
NOT_READ = {
    **dict.fromkeys(
        [
            *("convnext_base", "convnext_base_w", "convnext_base_w_320", "convnext_large", "convnext_large_d"),
            *("convnext_large_d_320", "convnext_small", "convnext_tiny", "convnext_xlarge", "convnext_xxlarge"),
            "convnext_xxlarge_320",
        ],
        Found("ConvNeXt", "", NO_BLOCKS.format("ConvNeXt"), NO_BLOCKS.format("ConvNeXt")),
    ),
    **dict.fromkeys(
        ["MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP2-S0", "MobileCLIP2-S2", "MobileCLIP2-S3", "MobileCLIP2-S4"],
        Found("FastVit", "", NO_BLOCKS.format("FastVit"), NO_BLOCKS.format("FastVit")),
    ),
    **dict.fromkeys(
        [f"{name}{end}" for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64") for end in ("", "-quickgelu")],
        Found("ModifiedResNet", "", "", "layer -1: it has no blocks"),
    ),
    "swin_base_patch4_window7_224": Found(
        "SwinTransformer", "", NO_BLOCKS.format("SwinTransformer"), NO_BLOCKS.format("SwinTransformer")
    ),
}
"""Those that are not read whole, with what the code says. A model that becomes readable is to be taken out."""


@pytest.mark.parametrize("name", open_clip.list_models())
def test_what_is_read_of_a_model(name):
    found = measure(name)
    assert found == NOT_READ.get(name, Found(found.tower))


def test_the_list_names_openclips_models_alone():
    assert set(NOT_READ) <= set(open_clip.list_models()) and len(open_clip.list_models()) >= 144
    assert all(each.attention or each.dictionary for each in NOT_READ.values())


def test_the_committed_table_is_what_is_measured():
    measured, committed = table({name: measure(name) for name in open_clip.list_models()}), COVERAGE.read_text()
    lines = {line for line in committed.splitlines() if line.startswith("| ") and line.endswith("|")}
    rows = {line for line in lines if line.split(" | ")[0].removeprefix("| ") in open_clip.list_models()}
    assert len(rows) >= 144 and rows <= set(measured.splitlines()), f"measured otherwise; write it again: {COMMAND}"
    # A newer OpenCLIP or timm may know more models, and their versions are in the text.
    if f"OpenCLIP {open_clip.__version__} and timm {timm.__version__}:" in committed:
        assert committed == measured
