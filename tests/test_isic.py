"""ISIC folders: what is read, what is set aside and why, no patient on two sides, and the whole study end to end."""

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipshift_core import dictionaries, isic, lesion_latents, lesion_study, lesions
from clipshift_core.encoder import Encoder
from clipshift_core.isic import IsicError
from clipshift_core.profiles import ROOT
from clipshift_core.splice import Splice

MODELS = ROOT / "data" / "models"
SETTINGS = {"n_resamples": 100, "seed": 0}


def photograph(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 16, 3), shade, np.uint8)).save(path)


def written(folder, text, name="metadata.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def simple(tmp_path, header="isic_id,benign_malignant", *rows):
    """Three photographs, and a table of them."""
    for i in range(3):
        photograph(tmp_path / f"ISIC_{i}.png", 40 * i + 1)
    return written(tmp_path, "\n".join((header, *rows)))


def reasons(found):
    return dict(zip(found.manifest.set_aside["image_id"], found.manifest.set_aside["reason"], strict=True))


def test_matched_whatever_the_ending_and_set_aside_with_a_reason(tmp_path):
    photograph(tmp_path / "ISIC_1.jpg", 10)
    photograph(tmp_path / "deep" / "er" / "ISIC_2.PNG", 20)
    photograph(tmp_path / "ISIC_3.jpg", 30)
    photograph(tmp_path / "ISIC_4.jpg", 40)
    photograph(tmp_path / "ISIC_5.jpg", 50)
    photograph(tmp_path / "a" / "ISIC_6.jpg", 60)
    photograph(tmp_path / "b" / "ISIC_6.png", 61)
    photograph(tmp_path / "unlisted.jpg", 70)
    (tmp_path / "ISIC_7.jpg").write_bytes((tmp_path / "ISIC_1.jpg").read_bytes()[:300])
    photograph(tmp_path / "ISIC_10.jpg", 80)
    written(tmp_path, """isic_id,benign_malignant,diagnosis_1,age_approx
ISIC_1,benign,,30
ISIC_2.jpg, Malignant ,Malignant,40
ISIC_3,,Indeterminate,50
ISIC_4,benign,Malignant,50
ISIC_5,,Malignant,
ISIC_6,benign,,1
ISIC_7,benign,,1
ISIC_8,malignant,,1
ISIC_10,benign,,1
ISIC_10,malignant,,1
""")  # fmt: skip
    found = isic.read(tmp_path)
    images = found.manifest.images
    assert dict(zip(images["image_id"], images["malignant"], strict=True)) == {
        "ISIC_1": False, "ISIC_2": True, "ISIC_5": True,
    }  # fmt: skip
    assert images["path"].tolist() == ["ISIC_1.jpg", "deep/er/ISIC_2.PNG", "ISIC_5.jpg"]
    said = reasons(found)
    assert "JPEG" in said.pop("ISIC_7")
    assert said == {
        "ISIC_3": "neither benign nor malignant: benign_malignant '', diagnosis_1 'Indeterminate'",
        "ISIC_4": "both benign and malignant: benign_malignant 'benign', diagnosis_1 'Malignant'",
        "ISIC_6": "2 different files are named ISIC_6",
        "ISIC_8": "no image for its row in metadata.csv",
        "ISIC_10": "several rows in metadata.csv",
        "unlisted": "no row in metadata.csv",
    }
    assert found.artefacts == () and found.manifest.summary == "11 listed, 3 used, 8 set aside"


def test_artefacts_of_both_tables_and_of_the_skin(tmp_path):
    header = "isic_id,benign_malignant,melanocytic,Ruler,fitzpatrick_skin_type,patient_id"
    simple(tmp_path, header, "ISIC_0,benign,true,1,II,a", "ISIC_1,malignant,false,0,,b", "ISIC_2,benign,true,,3,a")
    written(
        tmp_path, "image,hair,patch,score\nISIC_2.jpg,TRUE,0,0.7\nISIC_0,0,1.0,0.2\nother,1,1,1.5\n", "artefacts.csv"
    )
    found = isic.read(tmp_path)
    images = found.manifest.images
    assert found.artefacts == ("light_skin", "ruler", "hair", "patch")
    table = {name: [None if pd.isna(v) else bool(v) for v in images[name]] for name in found.artefacts}
    assert table == {
        "light_skin": [True, None, False],
        "ruler": [True, False, None],
        "hair": [False, None, True],
        "patch": [True, None, False],
    }
    group = images["group"].tolist()
    assert group[0] == group[2] != group[1]
    elsewhere = written(tmp_path, "isic_id,ink\nISIC_1,1\nISIC_0,0\n", "mine.txt") / "mine.txt"
    assert isic.read(tmp_path, artefacts=elsewhere).artefacts == ("light_skin", "ruler", "ink")


@pytest.mark.parametrize(
    ("column", "values", "malignant"),
    [("benign_malignant", "benign malignant benign", "010"), ("diagnosis_1", "Malignant Benign Malignant", "101"),
     ("mel", "1 0 0", "100"), ("mel", "True False benign", "100")],
)  # fmt: skip
def test_labels_of_old_and_new_exports_and_of_a_column_by_name(tmp_path, column, values, malignant):
    simple(tmp_path, f"isic_id,{column}", *[f"ISIC_{i},{value}" for i, value in enumerate(values.split())])
    found = isic.read(tmp_path, label="MEL" if column == "mel" else None)
    assert found.manifest.images["malignant"].tolist() == [bool(int(x)) for x in malignant]
    assert found.artefacts == ()


def test_errors_name_the_file_the_value_and_what_is_accepted(tmp_path):
    with pytest.raises(IsicError, match="nowhere: no such folder"):
        isic.read(tmp_path / "nowhere")
    simple(tmp_path)
    for text, message in (
        ("name,benign_malignant\nISIC_0,benign\n", "metadata.csv: has the columns name.*one of isic_id, image_name"),
        ("isic_id,dx\nISIC_0,mel\n", "metadata.csv: has no column benign_malignant or diagnosis_1.*it has dx"),
        ("isic_id,diagnosis_1\nISIC_0,?\n", "no row has a label.*ISIC_0: neither.*'\\?'.*accepted: benign, malignant"),
        ("isic_id,benign_malignant,fitzpatrick_skin_type\nISIC_0,benign,VII\n",
         "fitzpatrick_skin_type of ISIC_0 is 'VII'; accepted: I to VI"),
        ("isic_id,benign_malignant\nother,benign\n", "names none of the 3 images"),
        ("isic_id,benign_malignant,split\nISIC_0,benign,1\n", "called 'split'.*rename"),
        ("isic_id,benign_malignant\nISIC_0,benign,1,2\n", "metadata.csv: cannot be read"),
        ("", "metadata.csv: cannot be read"),
    ):  # fmt: skip
        with pytest.raises(IsicError, match=message):
            isic.read(written(tmp_path, text))
    (tmp_path / "metadata.csv").write_bytes(b"isic_id,benign_malignant\nISIC_0,benign\xff\n")
    with pytest.raises(IsicError, match="metadata.csv: cannot be read.*UTF-8"):
        isic.read(tmp_path)
    written(tmp_path, "isic_id,benign_malignant\nISIC_0,benign\n")
    written(tmp_path, "isic_id,hair\nISIC_0,1\nISIC_1,2\n", "artefacts.csv")
    with pytest.raises(IsicError, match=r"artefacts.csv: hair of ISIC_1 is '2'; accepted: 0, 1, true, false"):
        isic.read(tmp_path)
    (tmp_path / "metadata.csv").rename(tmp_path / "a.csv")
    written(tmp_path, "", "b.csv")
    with pytest.raises(IsicError, match="metadata.csv, or one .csv, is wanted; there are: a.csv, b.csv"):
        isic.read(tmp_path)


def test_no_patient_and_no_lesion_on_two_sides():
    rng = np.random.default_rng(0)
    n = 400
    patient = [f"p{i}" if i < 90 else "" for i in rng.integers(0, 120, n)]
    lesion = [f"l{i}" if i < 150 else "" for i in rng.integers(0, 400, n)]
    rows = pd.DataFrame({"patient_id": patient, "lesion_id": lesion})
    group = isic._groups(rows)
    malignant = rng.random(n) < 0.2
    slow = np.arange(n)  # merged by hand: whoever shares a value gets the lowest number, until nothing changes
    while True:
        before = slow.copy()
        for name in rows:
            for value in set(rows[name]) - {""}:
                slow[rows[name] == value] = slow[rows[name] == value].min()
        if (slow == before).all():
            break
    assert len(set(zip(slow, group, strict=True))) == len(set(slow)) == len(set(group))

    table = pd.DataFrame({"group": rng.integers(0, 130, n), "malignant": malignant})
    split = isic.split(table, seed=0)
    assert table.groupby("group").apply(lambda part: split[part.index].nunique()).max() == 1
    sizes, shares = split.value_counts() / n, table.groupby(split)["malignant"].mean()
    assert sizes["test"] == pytest.approx(0.3, abs=0.03) and sizes["valid"] == pytest.approx(0.15, abs=0.03)
    assert shares.to_numpy() == pytest.approx(malignant.mean(), abs=0.03)
    assert split.equals(isic.split(table, seed=0)) and not split.equals(isic.split(table, seed=1))


def test_too_few_patients_to_split():
    table = pd.DataFrame({"group": [0, 0, 1, 1], "malignant": [True, False] * 2})
    with pytest.raises(IsicError, match="2 malignant and 2 benign images of 2 patients.*too few"):
        isic.split(table, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn lesions as an archive exports them: JPEGs and two tables; one broken, one missing, one without a label."""
    folder = tmp_path_factory.mktemp("isic")
    table, made = lesion_study.drawn({"train": 110, "balanced": 70})
    for i, lesion in enumerate(made):
        Image.fromarray(lesions.render(lesion, 96)).save(folder / f"ISIC_{i:07}.jpg", quality=95)
    (folder / "ISIC_0000003.jpg").write_bytes(b"\xff\xd8 broken")
    (folder / "ISIC_0000004.jpg").unlink()
    ids = [f"ISIC_{i:07}" for i in range(len(made))]
    label = table["label"].mask(table.index == 5, "indeterminate")
    skin = table["skin_tone"].map(dict(enumerate(("I", "II", "III", "IV", "V", "VI"), 1)))
    metadata = pd.DataFrame({"isic_id": ids, "attribution": "drawn", "age_approx": 50, "benign_malignant": label,
                             "fitzpatrick_skin_type": skin.mask(table.index % 9 == 0, "")})  # fmt: skip
    metadata["patient_id"] = [f"IP_{i // 2}" for i in range(len(made))]
    metadata.to_csv(folder / "metadata.csv", index=False)
    names = ["ruler", "patch", "hair"]
    pd.concat([metadata["isic_id"].rename("image"), table[names].astype(int)], axis=1).to_csv(
        folder / "artefacts.csv", index=False
    )
    return folder


def test_the_study_on_a_folder_from_end_to_end(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = isic.read(folder)
    said = reasons(found)
    assert set(said) == {"ISIC_0000003", "ISIC_0000004", "ISIC_0000005"}
    assert said["ISIC_0000004"] == "no image for its row in metadata.csv" and "indeterminate" in said["ISIC_0000005"]
    assert found.artefacts == ("light_skin", "ruler", "patch", "hair")

    encoder = Encoder.load(str(MODELS / "scene-s16"), device="cpu", precision="fp32")
    images = isic.images(found, partial(lesion_study.encoded, encoder=encoder), encoder.image_size, seed=0)
    row = 40
    pixels = np.asarray(Image.open(folder / images.table["path"].iloc[row]))
    assert np.allclose(images.embeddings[row], encoder.encode(pixels[None]).embedding[0], atol=1e-4)

    readers = {"probe": lesion_study.probe_reader(images), "text": lesion_study.text_reader(encoder)}
    made = lesion_study.study(images, readers, **SETTINGS)
    assert made.accuracy["split"].unique().tolist() == ["test"] and len(made.gaps) == 4 * 2 and made.means.empty
    assert (made.accuracy["accuracy"] > 0.6).all()
    ruler = made.gaps[(made.gaps["artefact"] == "ruler")]
    test = images.table[images.table["split"] == "test"].groupby("ruler")["malignant"].mean()
    assert ruler["labels"].to_numpy() == pytest.approx(test[True] - test[False])
    assert made.gaps["amplification"].notna().all() and not made.gaps["planted"].any()

    sae = dictionaries.read(MODELS / "sae-scene-s16-lesions", encoder, 4, "class").sae
    splice = Splice(encoder, sae, 4, "class")
    latents = lesion_latents.latents(images, readers, splice, split="test", **SETTINGS)
    assert latents.factors["factor"].tolist() == list(found.artefacts)
    table = lesion_latents.suppressed(images, readers, splice, latents, n_draws=3, **SETTINGS)
    assert set(table["measure"]) == {"accuracy", *(f"gap of {name}" for name in found.artefacts)}
    assert table["value"].notna().all()


def test_values_over_several_lines_make_an_error_of_one(tmp_path):
    folder = simple(tmp_path, "isic_id,benign_malignant,fitzpatrick_skin_type", 'ISIC_0,benign,"VII\n\x1b[31m"')
    with pytest.raises(IsicError, match=r"fitzpatrick_skin_type of ISIC_0 is 'VII\\n\\x1b\[31m'") as caught:
        isic.read(folder)
    assert str(caught.value).isprintable()
