import shutil
from collections import Counter
from pathlib import Path

import cv2
import pytest
import torch

from ldm.data.image import photographs, read_image, write_image
from ldm.data.tasks import Task, make_data, read_tasks

TASKS = """
grain:
  instance_prompt: remove the grain
  degradation_types: [film_grain, jpeg]
  degradation_strength: 0.2,0.9
  jpeg_quality: [30, 60]
shake:
  hr_root: {few}
  instance_prompt: sharpen
  degradation_types: motion_blur
  degradation_strength: 0.5
  degradation_rounds: 2
  weight: 2
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """Folders of six and of two photographs, and a yaml of two tasks."""
    for number, path in enumerate(photographs()):
        image = cv2.resize(read_image(path), None, fx=0.2, fy=0.2)
        for folder in ("many", *["few"] * (number < 2)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / f"{path.stem}.png", image)
    (tmp_path / "tasks.yaml").write_text(TASKS.format(few=tmp_path / "few"))
    return tmp_path


def data_of(place: Path, **values):
    """What make_data makes of the yaml."""
    return make_data(Task(place / "many", **values), place / "tasks.yaml", 48, seed=3)


def test_tasks_come_in_their_shares_and_images_equally_often(place):
    data, previews, kept = data_of(place, lr_scale=4)
    assert len(data) == 8 and data.counts == [3, 5] and list(previews) == ["grain", "shake"]
    items = [data[(epoch, index)] for epoch in range(6) for index in range(8)]
    assert Counter(item["prompts"] for item in items) == {"remove the grain": 18, "sharpen": 30}
    few = {str(path): 15 for path in (place / "few").iterdir()}
    many = {str(path): 3 for path in (place / "many").iterdir()}
    assert Counter(item["name"] for item in items) == few | many
    assert len({item["seed"] for item in items}) == 48
    grain, shake = data.datasets.values()
    assert grain.values["degradation_strength"] == (0.2, 0.9) and grain.values["jpeg_quality"] == (30, 60)
    assert (shake.rounds, shake.types, shake.values["degradation_strength"]) == (2, ("motion_blur",), 0.5)
    assert grain.types == ("film_grain", "jpeg") and grain.values["lr_scale"] == 4  # of the base
    assert kept["shake"]["weight"] == "2" and "2 images; 5 an epoch" in data.describe()
    assert data.prompts == ["remove the grain", "sharpen"]


def test_without_a_yaml_it_is_the_one_data_set(place):
    data, previews, kept = make_data(Task(place / "many"), None, 48, seed=3)
    only = data.datasets[""]
    for key in ((0, 1), (3, 5)):
        assert all(torch.equal(data[key][name], only[key][name]) for name in ("control", "target"))
        assert data[key]["seed"] == only[key]["seed"]
    assert len(data) == 6 and kept == {} and list(previews) == [""]
    assert only.types == ("downsample", "noise", "blur")
    assert not previews[""].random_crop and only.random_crop


def test_folders_of_a_task_leave_those_of_the_base_behind(place):
    copy = shutil.copytree(place / "many", place / "copy")
    data, previews, _ = data_of(place, lr_root=copy, validation_root=copy)
    grain, shake = data.datasets.values()
    assert grain.controls is not None and shake.controls is None
    assert len(previews["shake"]) == 2 and len(previews["grain"]) == 6


def test_captions_of_a_task(place):
    (place / "few" / "camera.txt").write_text("a man and his camera")
    (place / "few" / "astronaut.txt").write_text("")
    with (place / "tasks.yaml").open("a") as file:
        file.write("  captions: true\n  random_flip: false\n")
    data, _, _ = data_of(place)
    assert data.prompts == ["remove the grain", "sharpen", "a man and his camera"]
    assert "1 without a caption take the prompt" in data.describe()
    assert [dataset.random_flip for dataset in data.datasets.values()] == [True, False]
    (place / "few" / "camera.txt").unlink()
    with pytest.raises(ValueError, match=r"tasks.yaml: shake: no image in .*few has a caption"):
        data_of(place)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "a: {instance_promt: x}",
            "a: instance_promt: Key 'instance_promt' not in 'Task'. Did you mean: 'instance_prompt'",
        ),
        ("a: {rank: 4}", "a: rank: Key 'rank' not in 'Task'"),
        ("a: {noise_level: loud}", "a: noise_level must be a number or a range LOW,HIGH, not loud"),
        (
            "a: {noise_level: [0.1, 0.2, 0.3]}",
            r"a: noise_level must be a number or a range LOW,HIGH, not \[0.1, 0.2, 0.3\]",
        ),
        ("a: {noise_level: '0.2,0.1'}", "a: noise_level 0.2,0.1 is reversed: write 0.1,0.2"),
        ("a: {weight: 0}", "a: weight must be a number above 0, not 0.0"),
        ("a: {degradation_types: rain}", "a: unknown degradation rain: choose from downsample, noise"),
        ("a: {degradation_types: 3}", "a: unknown degradation 3: choose from"),
        ("a: {degradation_order: any}", "a: degradation_order must be one of"),
        ("a: {captions: maybe}", "a: captions: Value 'maybe' is not a valid bool"),
        (
            "a: {degradation_rounds: 1.5}",
            "a: degradation_rounds: Value '1.5' of type 'float' could not be converted",
        ),
        ("a: {instance_prompt: }", "a: instance_prompt: Incompatible value 'None' for field of type 'str'"),
        ("a: {hr_root: absent}", "a: .*absent"),
        ("a: {hr_root: EMPTY}", "a: no images .* in .*empty"),
        ("a b: {weight: 1}", "a task's name must be letters, digits, _ or -, not 'a b'"),
        ("- hr_root: x", "must hold names of tasks"),
        ("a: 3", "must hold names of tasks"),
        ("", "must hold names of tasks"),
        ("a: {weight: 1", "is not a yaml"),
    ],
)
def test_bad_lists_name_file_task_and_key(place, text, message):
    (place / "empty").mkdir()
    (place / "tasks.yaml").write_text(text.replace("EMPTY", str(place / "empty")))
    with pytest.raises((ValueError, FileNotFoundError), match=f"tasks.yaml.*{message}"):
        data_of(place)


def test_an_absent_list_is_named():
    with pytest.raises(FileNotFoundError, match="list of tasks not found: absent.yaml"):
        read_tasks(Path("absent.yaml"))
