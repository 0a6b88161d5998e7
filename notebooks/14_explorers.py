# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14 Explorers
#
# - an image of the run, or one of yours, under an augmentation as strong as you like: what the model sees, and what changes;
# - the components of the dictionary: search, sort, look;
# - one image and a prompt that you type: which components make the similarity, and what is left without them.
#
# They answer while a kernel runs (`make lab`). Read online, each is followed by what it shows at first. `Tab` and the arrow keys reach every control.

# %% tags=["parameters"]
profile = "demo"  # demo, paper, or the path of a yaml file
overrides = {}  # any key of the profile, such as {"n_images": 64}

# %%
from IPython.display import Markdown, display

from clipshift_core.dictionaries import Dictionaries
from clipshift_core.explore import Explorer
from clipshift_core.explore_attribution import attribution_explorer
from clipshift_core.explore_components import component_explorer
from clipshift_core.explore_shift import ShiftExplorer
from clipshift_core.workbench import Workbench

bench = Workbench.open("14", profile, overrides)
dictionaries = Dictionaries(bench)
Markdown(f"{bench.encoder.name} on {len(bench.manifest.images):,} images. What the explorers read was computed by notebooks 00 to 10 of this run; else it is computed now, which takes minutes.")

# %% [markdown]
# ## Shift
#
# Choose an image or upload one, an augmentation, and how strong it is: 0 is none, 1 as published. Where does the view lie among those of this run?

# %%
shift = ShiftExplorer(dictionaries)
display(shift)

# %%
display(bench.show(shift.static(), "shift", alt="The shift explorer as it opens: an image and its view with attention, where its cosine and L2 lie among this run's, and the latents that changed most."))

# %% [markdown]
# ## Components
#
# Type a label or a factor ("duck", "ripples"), choose how to sort, and pick a latent.

# %%
components = component_explorer(dictionaries)
display(components)

# %%
if isinstance(components, Explorer):
    display(bench.show(components.static(), "components", alt="The component explorer as it opens: a latent's examples, and the classes it drives."))
else:
    display(Markdown(f"Left out: {dictionaries.left_out}."))

# %% [markdown]
# ## Attribution
#
# Choose an image, type a prompt and press Enter. Tick components to delete them from the forward pass, all together.

# %%
attribution = attribution_explorer(dictionaries)
display(attribution)

# %%
if isinstance(attribution, Explorer):
    display(bench.show(attribution.static(), "attribution", alt="The attribution explorer as it opens: an image, the components of its similarity to its own word, and exact ablation beside."))
else:
    display(Markdown(f"Left out: {dictionaries.left_out}."))
