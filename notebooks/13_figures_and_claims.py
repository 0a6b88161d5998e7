# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 Figures and claims
#
# - the ledger: every claim of the two papers that was tested, its statistic, and the verdict of this run;
# - how to read each verdict, and what it does not mean;
# - every figure of the series on two sheets.
#
# Nothing is measured here. All of it was written by notebooks 00 to 12 of this run.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
import pandas as pd
from IPython.display import Markdown, display

from clipshift_core import claims, figures_ledger, ledger
from clipshift_core.workbench import Workbench

bench = Workbench.open("13", profile, overrides)
found = claims.read(bench.profile.run_dir / "claims.csv")
counts = found["verdict"].value_counts()
Markdown(
    f"{len(found)} rows: " + ", ".join(f"**{count} {verdict}**" for verdict, count in counts.items()) + f". {claims.caveat(bench.profile)}"
)

# %% [markdown]
# ## The ledger
#
# Statistics and bounds were written down before their values were seen (`clipshift_core/claims.py`, `claims_latents.py`, where exceptions are
# named). A claim is reproduced if its whole 95 % interval lies beyond the bound. A claim that is not reproduced here is a finding about this run:
# it is not thereby false of CLIP.

# %%
display(bench.show(
    figures_ledger.claims(found),
    "claims",
    alt="Each claim of the two papers with its statistic and 95 % interval, scaled so that its bound is at zero, coloured by verdict.",
))
bench.keep(found, "claims")[["claim", "statistic", "value", "ci_low", "ci_high", "n", "verdict", "notebook"]].round(3)

# %% [markdown]
# ## How to read it

# %%
explained = bench.keep(ledger.explained(found), "meanings")
with pd.option_context("display.max_colwidth", None):
    display(explained.set_index("claim"))

# %% [markdown]
# ## Every figure
#
# Paper A's questions (notebooks 00 to 06), then paper B's and the bridge between the two (07 to 12). The two sheets are made of pictures, which a
# browser draws (Chromium or Chrome). Where none is installed, nothing is shown here; the `.html` files in this run's `figures` folder hold every figure.

# %%
pictures = sorted(path for path in (bench.profile.run_dir / "figures").glob("*.png") if path.name < "13")
for name, first in (("paper-a", "00"), ("paper-b", "07")):
    some = [path for path in pictures if (path.name < "07") == (first == "00")]
    if some:
        title = f"The figures of notebooks {first} to {some[-1].name[:2]}"
        bench.show(figures_ledger.sheet(some, title), name, alt=f"{title}, small, each with its name and title.").show("png")
