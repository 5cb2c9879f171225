from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rtshpc.core.cell import Cell
from rtshpc.core.config import SiteConfig
from rtshpc.core.errors import ConfigError
from rtshpc.core.grid import cells
from rtshpc.core.load import (
    FOLDERS,
    find_config,
    known_names,
    load_data,
    load_model,
    load_run,
    load_site,
    parse_set,
    parse_yaml,
    read_cell,
    read_run_config,
    write_cell,
    write_run_config,
)
from rtshpc.core.sizing.request import load_programme, load_request

DATA = """
name: small
scenes: {generated: {sites: [a], scenes_per_site: 2, size_px: 64}}
modalities: {rgb: {bands: [red, green, blue]}, ndvi: {bands: [ndvi]}, nir: {bands: [nir]}}
primary: rgb
chip: {size_px: 64, overlap_px: 0}
"""

SWEEP = """
name: fusion
data: small
model: {name: m}
finetune: {modalities: [rgb, ndvi]}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configs of its own, as a clone has."""
    for folder in FOLDERS.values():
        (tmp_path / "configs" / folder).mkdir(parents=True)
    (tmp_path / "configs/data/small.yaml").write_text(DATA)
    (tmp_path / "configs/sweeps/fusion.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*sets: str, sweep: str = "fusion") -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(sweep, sets)
    text = str(caught.value)
    assert "\n" not in text
    return text


def rewrite(place: Path, old: str, new: str) -> None:
    path = place / "configs/sweeps/fusion.yaml"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_shipped_config_loads(kind: str) -> None:
    loaders = {"sweep": load_run, "data": load_data, "model": load_model, "site": load_site}
    loaders |= {"request": load_request, "programme": load_programme}
    names = known_names(kind)
    assert names
    for name in names:
        loaders[kind](name)


def test_a_name_and_a_path_give_the_same_sweep(place: Path) -> None:
    assert (
        load_run("fusion") == load_run("configs/sweeps/fusion.yaml") == load_run(place / "configs/sweeps/fusion.yaml")
    )


def test_set_overrides_keys_of_the_sweep_and_of_named_files(place: Path) -> None:
    sets = ("finetune.epochs=3", "data.chip.size_px=32", "site=local", "site.max_jobs=7", "data.root=/x")
    config = load_run("fusion", sets)
    assert (config.finetune.epochs, config.data.chip.size_px, config.data.root) == (3, 32, "/x")
    assert config.site.max_jobs == 7


def test_set_values_are_yaml(place: Path) -> None:
    config = load_run("fusion", ["finetune.modalities=[rgb, nir]", "pretrain.augment.flip=false", "seed=5"])
    assert config.finetune.modalities == ("rgb", "nir")
    assert config.pretrain.augment.flip is False
    assert config.seed == 5


def test_set_takes_a_dotted_key_of_the_grid_and_keeps_the_grids_order(place: Path) -> None:
    rewrite(place, "finetune:", "grid: {finetune.epochs: [1], seed: [0]}\nfinetune:")
    assert list(load_run("fusion", ["grid.finetune.epochs=[1, 2]"]).grid.items()) == [
        ("finetune.epochs", (1, 2)),
        ("seed", (0,)),
    ]


def test_a_section_may_start_from_a_named_file(place: Path) -> None:
    rewrite(place, "data: small", "data: {base: small, chip: {size_px: 48}, modalities: {nir: null}}")
    config = load_run("fusion")
    assert config.data.chip.size_px == 48
    assert config.data.chip.overlap_px == 0
    assert list(config.data.modalities) == ["rgb", "ndvi"]


def test_a_file_may_start_from_another_of_its_kind(place: Path) -> None:
    (place / "configs/data/larger.yaml").write_text("base: small\nname: larger\nchip: {size_px: 128}\n")
    assert load_data("larger").chip.size_px == 128
    assert load_data("larger").chip.overlap_px == 0


def test_a_base_that_leads_back_is_refused(place: Path) -> None:
    (place / "configs/data/one.yaml").write_text("base: two\n")
    (place / "configs/data/two.yaml").write_text("base: one\n")
    with pytest.raises(ConfigError, match=r"one\.yaml: base leads back to this file"):
        load_data("one")


def test_a_wrong_name_is_named_with_file_key_known_names_and_a_guess(place: Path) -> None:
    rewrite(place, "{modalities: [rgb, ndvi]}", "{modalities: [rgb, ndvi], primary: rbg}")
    assert refusal() == (
        'configs/sweeps/fusion.yaml: finetune.primary = "rbg" is unknown. Known: ndvi, nir, rgb. Did you mean "rgb"?'
    )


def test_a_mistake_of_set_is_placed_there(place: Path) -> None:
    assert refusal("finetune.primary=rbg").startswith('--set: finetune.primary = "rbg" is unknown. Known: ndvi')


def test_an_unknown_key_lists_the_known_ones_and_a_guess(place: Path) -> None:
    rewrite(place, "{modalities: [rgb, ndvi]}", "{modalities: [rgb, ndvi], epoch: 3}")
    text = refusal()
    assert text.startswith("configs/sweeps/fusion.yaml: finetune.epoch is no known key. Known: ")
    assert text.endswith('Did you mean "epochs"?')


def test_a_mistake_in_a_named_file_is_placed_in_that_file(place: Path) -> None:
    path = place / "configs/data/small.yaml"
    path.write_text(path.read_text().replace("size_px: 64, overlap", "size_px: big, overlap"))
    assert refusal() == 'configs/data/small.yaml: chip.size_px = "big" must be a whole number'
    rewrite(place, "data: small", "data: {base: small, chip: {size_px: 8}}")
    assert refusal() == "configs/sweeps/fusion.yaml: data.chip.size_px = 8 must be at least 16"
    assert refusal("data.chip.size_px=9") == "--set: data.chip.size_px = 9 must be at least 16"


def test_a_check_over_two_keys_is_placed_at_the_key_it_names(place: Path) -> None:
    text = refusal("data.chip.overlap_px=80")
    assert text == "--set: data.chip.overlap_px = 80 must be less than size_px = 64"


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("finetune.epochs=many", 'finetune.epochs = "many" must be a whole number'),
        ("finetune.epochs=2.5", "finetune.epochs = 2.5 must be a whole number"),
        ("finetune.learning_rate=fast", 'finetune.learning_rate = "fast" must be a number'),
        ("finetune.learning_rate=0", "finetune.learning_rate = 0 must be more than 0"),
        ("finetune.modalities=rgb", 'finetune.modalities = "rgb" must be a list'),
        ("finetune.augment=3", "finetune.augment = 3 must be a section of keys and values"),
        ("finetune.augment.flip=perhaps", 'finetune.augment.flip = "perhaps" must be true or false'),
        ("finetune.schedule=cosin", 'schedule = "cosin" is unknown. Known: cosine, steps. Did you mean "cosine"?'),
        ("data.modalities=[1]", "data.modalities = [1] must be a mapping of names to values"),
        ("name=../x", 'name = "../x" must match'),
        ("model.backbone.kind=mvt", 'model.backbone.kind = "mvt" is unknown. Known: mvit, resnet.'),
        ("data=smal", 'data: data "smal" is unknown.'),
        ("finetune.epochs.x=1", "finetune.epochs"),
        ("grid.finetune.epoch=[1]", 'grid = "finetune.epoch" is no key of a sweep.'),
        ("grid.pretrain.epochs=[1]", 'grid = "pretrain.epochs" cannot be varied by a grid.'),
        ("grid.finetune.epochs=[]", "grid.finetune.epochs = [] must have at least one value"),
        ("grid.finetune.epochs=[1, no]", "finetune.epochs = "),
    ],
)
def test_wrong_values_say_what_is_allowed(place: Path, setting: str, wanted: str) -> None:
    text = refusal(setting)
    assert text.startswith("--set")
    assert wanted in text


def test_a_missing_key_says_what_it_is(place: Path) -> None:
    rewrite(place, "name: fusion\n", "")
    assert refusal() == "configs/sweeps/fusion.yaml: name is missing (name of the run and of its folder)"


def test_a_duplicate_key_is_refused_with_its_line(place: Path) -> None:
    rewrite(place, "data: small", "data: small\ndata: other")
    assert refusal() == 'configs/sweeps/fusion.yaml:4: not valid YAML: key "data" is given twice'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "is empty"),
        ("- a\n", "must be a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("a: !!python/object:os.x {}\n", "not valid"),
    ],
)
def test_files_that_are_no_config_are_one_line(place: Path, text: str, wanted: str) -> None:
    (place / "odd.yaml").write_text(text)
    assert wanted in refusal(sweep="odd.yaml")


def test_a_binary_file_is_refused(place: Path) -> None:
    (place / "odd.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(sweep="odd.yaml")


def test_unknown_names_and_paths_are_refused_with_a_guess(place: Path) -> None:
    assert 'Did you mean "fusion"?' in refusal(sweep="fusoin")
    assert "no such file" in refusal(sweep="nowhere/fusion.yaml")


def test_set_without_a_value_is_refused() -> None:
    for text in ("finetune.epochs", "=3", "a..b=1"):
        with pytest.raises(ConfigError, match="write it as key=value"):
            parse_set(text)


def test_a_runs_config_reads_back_the_same(place: Path) -> None:
    config = load_run("fusion", ["finetune.learning_rate=1e-5"])
    write_run_config(place / "config.yaml", config, {"commit": "abc"})
    again, provenance = read_run_config(place / "config.yaml")
    assert again == config
    assert provenance == {"commit": "abc"}
    assert load_run(place / "config.yaml") == config


def test_a_cell_reads_back_the_same(place: Path) -> None:
    config = load_run("fusion", ["grid.finetune.backbones=[pretrained, full]"])
    for cell in cells(config, "f" * 64):
        write_cell(place / "cell.yaml", cell)
        assert read_cell(place / "cell.yaml") == cell
        assert Cell.model_validate(yaml.safe_load((place / "cell.yaml").read_text())) == cell


def test_configs_of_the_current_folder_come_before_the_shipped_ones(place: Path) -> None:
    (place / "configs/sites/local.yaml").write_text("name: mine\n")
    assert find_config("site", "local").resolve() == place / "configs/sites/local.yaml"
    assert load_site("slurm-a100").executor == "slurm"


@pytest.mark.parametrize(
    "text",
    ["a: \x01", "a: \0", "{a: &x [*x]}", "[" * 1000, "a: !!int _", "-0b: 0b_", "a: !!bool x", "a: !!timestamp 2020-99-99"],
)  # fmt: skip
def test_whatever_yaml_cannot_be_read_is_one_line_with_its_file(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^f\.yaml(:\d+)?: not valid YAML: .") as caught:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(caught.value)


def test_a_key_that_yaml_takes_for_a_number_or_true_is_named_and_guessed(place: Path) -> None:
    assert "finetune.1 is no known key. Known: augment, " in refusal("finetune={1: 2}")
    assert "finetune.true is no known key. Known: augment, " in refusal("finetune={on: 2}")


def test_a_set_without_a_value_is_asked_for_one(place: Path) -> None:
    assert refusal("finetune.epochs=") == (
        "--set finetune.epochs=: gives no value; write finetune.epochs=null to take the key away"
    )
    assert load_run("fusion", ["finetune.epochs=3", "finetune.epochs=null"]).finetune.epochs == 36


def test_the_name_of_a_site_is_text_whatever_yaml_would_make_of_it(place: Path) -> None:
    (place / "configs/sites/12.yaml").write_text("name: twelve")
    config = load_run("fusion", ["site.max_jobs=7"], site="12")
    assert (config.site.name, config.site.max_jobs) == ("twelve", 7)
    with pytest.raises(ConfigError, match=r'^--site: .*"a: \[b" is unknown'):
        load_run("fusion", site="a: [b")


@pytest.mark.parametrize("name", ["slurm-a5000", "slurm-a100"])
def test_a_template_of_a_site_names_and_explains_every_field(name: str) -> None:
    lines = find_config("site", name).read_text().splitlines()
    told = {line.partition(":")[0]: line.partition(" # ")[2] for line in lines if not line.startswith("#")}
    assert told.keys() == SiteConfig.model_fields.keys()
    assert all(told[key] or key == "name" for key in told), told


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["gpus=5"], "gpus = 5 asks for 5 of a node, node_gpus = 4"),
        (["nodes=2", "gpus=4", "node_cpus=20"], "cpus = 8 asks for 32 of a node, node_cpus = 20"),
        (["node_memory_gb=16"], "memory_gb = 32 asks for 32 of a node, node_memory_gb = 16"),
        (["charge_per_gpu_hour=1", "charge_per_node_hour=2"], "a site charges for one of them"),
        (["charge_per_node_hour=2", "node_gpus=0"], "charge_per_node_hour is given without node_gpus or node_cpus"),
        (["gpus=2", "tasks_per_node=3"], "tasks_per_node = 3: there are gpus = 2, and each task needs its own"),
        (["executor=local", "gpus=0", "tasks_per_node=2"], "tasks_per_node = 2 needs executor: slurm"),
        (["gpus=0", "tasks_per_node=4", "node_memory_gb=100"], "memory_gb = 32 asks for 128 of a node"),
        (["stage_shards=true"], "stage_shards is given without scratch"),
        (["scratch=$TMPDIR"], "scratch = .* must match"),
    ],
)
def test_a_site_that_contradicts_itself_is_refused_in_one_line(sets: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_site("slurm-a5000", sets)
    assert "\n" not in str(caught.value)
