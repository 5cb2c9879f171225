"""Values that are of the right shape and wrong: each is refused when the config is loaded, and named."""

from __future__ import annotations

import pytest
import yaml

from rtshpc.core.config import ModalityConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.load import load_run


def refusal(*sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run("demo", sets)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("site", ["../../esc", "a/b", ".", "", "-x", "a b"])
def test_a_generated_site_that_is_no_file_name_is_refused(site: str) -> None:
    text = refusal(f"data.scenes.generated.sites={yaml.safe_dump([site]).strip()}")
    assert "data.scenes.generated.sites" in text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("evaluate.size_edges_m2=[12000, 2000]", "evaluate.size_edges_m2 = [12000.0, 2000.0] must be more than 0 and rise"),
        ("evaluate.size_edges_m2=[0, 2000]", "must be more than 0"),
        ("evaluate.size_edges_m2=[1, .inf]", "must be a finite number"),
        ("finetune.steps=[0.9, 0.8]", "finetune.steps = [0.9, 0.8] must be between 0 and 1 and rise"),
        ("pretrain.steps=[0.9, 1.0]", "must be between 0 and 1"),
        ("finetune.augment.scale=[1.2, 0.8]", "finetune.augment.scale = [1.2, 0.8] must be the smallest, then"),
        ("finetune.augment.scale=[0, 1]", "must be more than 0"),
        ("data.scenes.generated.slumps_per_scene=[5, 1]", "slumps_per_scene = [5, 1] must be the smallest, then"),
        ("data.scenes.generated.slumps_per_scene=[-1, 1]", "must be at least 0"),
        ("data.scenes.generated.slump_px=[0, 10]", "must be more than 0"),
        ("data.modalities.ndvi.valid_range=[1, -1]", "ndvi.valid_range = [1.0, -1.0] must be the smallest, then"),
    ],
)  # fmt: skip
def test_ranges_and_rising_values_are_so(given: str, wanted: str) -> None:
    assert wanted in refusal(given)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("finetune.modalities=[rgb, ndvi, rgb]", 'finetune.modalities: "rgb" is given twice'),
        ("finetune.modalities=[]", "finetune.modalities = [] must have at least 1 items"),
        ("pretrain.modalities=[rgb, rgb]", 'pretrain.modalities: "rgb" is given twice'),
        ("grid.finetune.modalities=[[rgb, rgb]]", 'finetune.modalities: "rgb" is given twice'),
        ("grid.finetune.modalities=[[rgb, foo]]", 'finetune.modalities = "foo" is unknown'),
        ("measure.modality_sets=[[rgb, foo]]", 'measure.modality_sets = "foo" is unknown'),
        ("measure.modality_sets=[[rgb, rgb]]", 'measure.modality_sets.0: "rgb" is given twice'),
        ("measure.modality_sets=[[rgb], []]", "holds an empty value"),
        ("measure.arms=[full, full]", 'measure.arms: "full" is given twice'),
        ("data.classes=[rts, rts]", 'data.classes: "rts" is given twice'),
        ("data.scenes.generated.sites=[a, a]", 'data.scenes.generated.sites: "a" is given twice'),
    ],
)
def test_lists_of_names_are_not_empty_known_and_without_doubles(given: str, wanted: str) -> None:
    assert wanted in refusal(given)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("finetune.epochs=true", "finetune.epochs = true must be a whole number"),
        ("seed='1'", 'seed = "1" must be a whole number'),
        ("finetune.learning_rate=true", "finetune.learning_rate = true must be a number"),
        ("finetune.augment.flip='yes'", 'finetune.augment.flip = "yes" must be true or false'),
        ("finetune.augment.flip=1", "finetune.augment.flip = 1 must be true or false"),
        ("data.scenes.generated.slumps_per_scene=[true, 2]", "slumps_per_scene.0 = true must be a whole number"),
        ("model.backbone.depth=true", "model.backbone.depth = true must be a whole number"),
        ("data.missing_value=true", "data.missing_value = true must be a number"),
    ],
)
def test_what_only_looks_like_a_value_of_the_type_is_refused(given: str, wanted: str) -> None:
    assert wanted in refusal(given)


def test_a_key_and_a_section_above_it_are_not_varied_at_once_but_for_models() -> None:
    grid = "{finetune.augment: [{flip: false}], finetune.augment.flip: [true]}"
    assert '"finetune.augment.flip" is part of "finetune.augment", which is varied too' in refusal(f"grid={grid}")
    assert load_run("demo", ["grid={model: [tiny], model.fusion.mixer: [cross, stacked]}"]).grid


def test_a_number_with_an_exponent_is_a_number_though_yaml_takes_it_for_text() -> None:
    assert load_run("demo", ["finetune.learning_rate=1e-4"]).finetune.learning_rate == 1e-4


@pytest.mark.parametrize("key", ["finetune.learning_rate", "data.missing_value", "data.scenes.generated.resolution_m"])
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_are_finite(key: str, value: str) -> None:
    assert f"{key} = {value[1:]} must be" in refusal(f"{key}={value}")


def test_a_valid_range_may_have_an_open_end() -> None:
    def limits(low: float | None, high: float | None) -> object:
        return ModalityConfig(bands=("b",), valid_range=(low, high)).limits

    assert (limits(0.5, None), limits(None, 1.0)) == ((0.5, float("inf")), (float("-inf"), 1.0))
    assert ModalityConfig(bands=("b",)).limits is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("data.modalities.ndvi={expression: nir +}", 'data.modalities.ndvi.expression = "nir +": no arithmetic'),
        ("data.modalities.ndvi={expression: __import__(1)}", 'function "__import__" is unknown'),
        ("data.modalities={rgb: {bands: [red]}, ../x: {bands: [nir]}}", 'the name "../x" must match'),
        ("data.modalities={rgb: {bands: [red]}, a.b: {bands: [nir]}}", 'the name "a.b" must match'),
        ("data.split={rule: site, test_sites: [banx]}", 'data.split.test_sites = "banx" is unknown. Known: banks, peel'),
        ("data.split={rule: site, test_sites: [peel], val_sites: [peel]}", 'val_sites = "peel" is in test_sites too'),
    ],
)  # fmt: skip
def test_what_only_tasks_could_find_is_found_when_the_config_is_loaded(given: str, wanted: str) -> None:
    assert wanted in refusal(given)
