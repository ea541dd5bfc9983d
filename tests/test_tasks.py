import shutil
from collections import Counter
from pathlib import Path

import cv2
import pytest
import torch

from ldm.data.image import photographs, read_image, write_image
from ldm.data.tasks import KEYS, make_data, read_tasks
from train_kontext_lora import Settings

TASKS = """
grain:
  instance_prompt: remove the grain
  degradation_types: [film_grain, jpeg]
  damage_strength: 0.2,0.9
  jpeg_quality: [30, 60]
shake:
  hr_root: {few}
  instance_prompt: sharpen
  degradation_types: motion_blur
  damage_strength: 0.5
  degradation_rounds: 2
  weight: 2
"""


@pytest.fixture
def settings(tmp_path) -> Settings:
    for number, path in enumerate(photographs()):
        image = cv2.resize(read_image(path), None, fx=0.2, fy=0.2)
        for folder in ("many", *["few"] * (number < 2)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / f"{path.stem}.png", image)
    (tmp_path / "tasks.yaml").write_text(TASKS.format(few=tmp_path / "few"))
    return Settings(hr_root=tmp_path / "many", tasks=tmp_path / "tasks.yaml", resolution=48, seed=3)


def test_tasks_come_in_their_shares_and_pictures_equally_often(settings):
    data, previews, kept = make_data(settings)
    assert len(data) == 8 and data.counts == [3, 5] and list(previews) == ["grain", "shake"]
    items = [data[(epoch, index)] for epoch in range(6) for index in range(8)]
    assert Counter(item["prompts"] for item in items) == {"remove the grain": 18, "sharpen": 30}
    assert Counter(item["index"] for item in items) == dict.fromkeys(range(6), 3) | {6: 15, 7: 15}
    assert len({item["seed"] for item in items}) == 48
    grain, shake = data.datasets.values()
    assert grain.values["damage_strength"] == (0.2, 0.9) and grain.values["jpeg_quality"] == (30, 60)
    assert (shake.rounds, shake.types, shake.values["damage_strength"]) == (2, ("motion_blur",), 0.5)
    assert grain.types == ("film_grain", "jpeg") and grain.values["lr_scale"] == 8  # of the command line
    assert kept["shake"]["weight"] == "2.0" and "2 pictures; 5 an epoch" in data.describe()
    assert data.prompts == ["remove the grain", "sharpen"] and data.fixed == (False, False)


def test_without_a_yaml_it_is_the_one_data_set(settings):
    settings.tasks = None
    data, previews, kept = make_data(settings)
    only = data.datasets[""]
    for key in ((0, 1), (3, 5)):
        assert all(torch.equal(data[key][name], only[key][name]) for name in ("control", "target"))
        assert data[key]["seed"] == only[key]["seed"] and data[key]["index"] == key[1]
    assert len(data) == 6 and kept == {} and list(previews) == [""]
    assert not previews[""].random_crop and only.random_crop


def test_folders_of_a_task_leave_those_of_the_command_line_behind(settings, tmp_path):
    settings.lr_root = settings.validation_root = shutil.copytree(tmp_path / "many", tmp_path / "copy")
    data, previews, _ = make_data(settings)
    grain, shake = data.datasets.values()
    assert grain.controls is not None and shake.controls is None
    assert len(previews["shake"]) == 2 and len(previews["grain"]) == 6


def test_captions_of_a_task_and_unsaid_prompts(settings, tmp_path):
    (tmp_path / "few" / "camera.txt").write_text("a man and his camera")
    text = settings.tasks.read_text() + "  captions: true\n"
    settings.tasks.write_text(text)
    settings.caption_dropout = 0.1
    (tmp_path / "few" / "astronaut.txt").write_text("")
    data, previews, _ = make_data(settings)
    assert data.prompts == ["remove the grain", "sharpen", "a man and his camera", ""]
    assert "1 without a caption take the prompt" in data.describe()
    assert previews["shake"].caption_dropout == 0
    (tmp_path / "few" / "camera.txt").unlink()
    with pytest.raises(ValueError, match=r"tasks.yaml: shake: no picture in .*few has a caption"):
        make_data(settings)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: {instance_promt: x}", "a: instance_promt is not known: did you mean instance_prompt"),
        ("a: {rank: 4}", "a: rank is not known: A task may have hr_root, lr_root"),
        ("a: {noise_level: loud}", "a: noise_level must be a number or LOW,HIGH, not loud"),
        ("a: {noise_level: [0.1, 0.2, 0.3]}", "a: noise_level must be a number or LOW,HIGH, not 0.1,0.2,0.3"),
        ("a: {noise_level: '0.2,0.1'}", "a: noise_level 0.2,0.1 is reversed: write 0.1,0.2"),
        ("a: {weight: 0}", "a: weight must be a number above 0, not 0"),
        ("a: {degradation_types: rain}", "a: unknown degradation rain: choose from downsample, noise"),
        ("a: {degradation_order: any}", "a: degradation_order must be fixed, given or random"),
        ("a: {captions: 3}", "a: captions must be true or false, not 3"),
        ("a: {instance_prompt: }", "a: instance_prompt must be a text, not None"),
        ("a: {hr_root: absent}", "a: no clean photographs at absent"),
        ("a: {hr_root: EMPTY}", "a: no images .* in .*empty"),
        ("a b: {weight: 1}", "a task's name must be letters, digits, _ or -, not 'a b'"),
        ("- hr_root: x", "must hold names of tasks"),
        ("a: 3", "must hold names of tasks"),
        ("", "must hold names of tasks"),
        ("a: {weight: 1", "is not a yaml"),
    ],
)
def test_bad_lists_name_file_task_and_key(settings, tmp_path, text, message):
    (tmp_path / "empty").mkdir()
    settings.tasks.write_text(text.replace("EMPTY", str(tmp_path / "empty")))
    with pytest.raises((ValueError, FileNotFoundError), match=f"tasks.yaml.*{message}"):
        make_data(settings)


def test_every_key_is_a_setting_and_an_absent_list_is_named():
    assert {*KEYS} - {"weight"} <= {*Settings.__dataclass_fields__}
    with pytest.raises(FileNotFoundError, match="list of tasks not found: absent.yaml"):
        read_tasks(Path("absent.yaml"))
