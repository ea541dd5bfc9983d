import multiprocessing
import pickle

import cv2
import h5py
import numpy as np
import pytest

import tool_make_dbgan_dataset as tool
from harness.validation import HeldOutPatches
from ldm.data.image import photographs, read_image, write_image
from ldm.data.patches import Patches, SourceDataset, open_patches


@pytest.fixture
def folders(tmp_path):
    """Write a GoPro tree of two frames of 50 x 40 pixels and three blurred photographs of another size."""
    image = read_image(photographs(("coffee.png",))[0])
    for kind, dim in (("blur", 2), ("sharp", 1)):
        (tmp_path / "gopro" / "GOPR1" / kind).mkdir(parents=True)
        for frame in (1, 2):
            crop = image[frame : frame + 40, :50] // dim
            write_image(tmp_path / "gopro" / "GOPR1" / kind / f"{frame:06d}.png", crop)
    (tmp_path / "RWBI").mkdir()
    for number in range(3):
        write_image(tmp_path / "RWBI" / f"{number}.png", image[100 * number : 100 * number + 35, 90:130])
    return tmp_path


def settings(folders, unpaired=False, **changes):
    paths = {"blur_train_path": folders / "train.h5", "blur_valid_path": folders / "valid.h5"}
    data = {"deblur_train_data": folders / "gopro", "deblur_valid_data": folders / "gopro"}
    if unpaired:
        data |= {"blur_train_data": folders / "RWBI", "blur_valid_data": folders / "RWBI"}
    return tool.Settings(**{**paths, **data, "patch_size": 16, **changes})


def test_patches_of_pairs_match(folders, capsys):
    tool.main(settings(folders))
    assert "train.h5 is written: 12 sharp and 12 blurry patches of 16 pixels" in capsys.readouterr().out
    with open_patches(folders / "train.h5") as file:
        assert file.attrs["paired"] and file.attrs["patch_size"] == file.attrs["stride"] == 16
        assert file["sharp"].chunks == (1, 16, 16, 3) and file["sharp"].dtype == np.uint8
        assert np.array_equal(file["sharp"][:] // 2, file["blur"][:])
        image = read_image(folders / "gopro/GOPR1/sharp/000002.png")
        assert np.array_equal(file["sharp"][6 + 1 * 3 + 2], image[16:32, 32:48])  # row 1, column 2 of frame 2
    names = sorted(path.name for path in folders.iterdir())
    assert names == ["RWBI", "gopro", "train.h5", "valid.h5"]  # no temporary file is left


def test_unpaired_patches_with_stride(folders):
    tool.main(settings(folders, unpaired=True, stride=8))
    with open_patches(folders / "valid.h5") as file:
        assert len(file["sharp"]) == 2 * 4 * 5 and len(file["blur"]) == 3 * 3 * 4
        assert not file.attrs["paired"]
        image = read_image(folders / "RWBI/0.png")
        assert np.array_equal(file["blur"][5], image[8:24, 8:24])


def test_finished_file_is_kept_and_other_settings_raise(folders, capsys):
    tool.main(settings(folders))
    before = (folders / "train.h5").read_bytes()
    capsys.readouterr()
    tool.main(settings(folders))
    assert "train.h5 is finished: 12 sharp and 12 blurry patches" in capsys.readouterr().out
    assert (folders / "train.h5").read_bytes() == before
    with pytest.raises(ValueError, match=r"train.h5 was made otherwise \(stride was 16, is 8\)"):
        tool.main(settings(folders, stride=8))


def test_interrupted_run_writes_no_file(folders, monkeypatch):
    original, calls = tool.append, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(tool, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.main(settings(folders))
    assert sorted(path.name for path in folders.iterdir()) == ["RWBI", "gopro"]
    monkeypatch.undo()
    tool.main(settings(folders))
    assert (folders / "train.h5").is_file()


def read_in_child(patches, numbers, queue):
    queue.put([int(patches[number].sum()) for number in numbers])


def test_each_process_opens_its_own_file_handle(folders):
    tool.main(settings(folders))
    patches = Patches(folders / "train.h5", "sharp")
    expected = [int(patches[number].sum()) for number in range(12)]  # opened here, before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(patches, range(12), queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()
    assert pickle.loads(pickle.dumps(patches))[0, 3].sum() == expected[3]  # as in a spawned worker


def test_crops_of_pairs_match(folders):
    tool.main(settings(folders))
    sources = [Patches(folders / "train.h5", key) for key in ("blur", "sharp")]
    data = SourceDataset(*sources, 12, seed=1, augment=True, paired=True)
    for index in range(12):
        item = data[3, index]
        blurry, sharp = (((item[name] + 1) * 127.5).round() for name in ("blurry", "sharp"))
        assert (sharp // 2 == blurry).all() and f"sharp[{index}]" in item["path"]
    assert not (data[0, 0]["sharp"] == data[1, 0]["sharp"]).all()  # another crop in the next epoch
    assert (data[1, 0]["sharp"] == data[1, 0]["sharp"]).all()


def test_unpaired_items_get_random_partners(folders):
    tool.main(settings(folders, unpaired=True))
    sources = [Patches(folders / "train.h5", key) for key in ("blur", "sharp")]
    data = SourceDataset(*sources, 16, seed=1)
    assert len(data) == 12
    names = {data[epoch, 0]["path"] for epoch in range(8)}
    assert len(names) > 2 and all(name.endswith("sharp[0]") for name in names)


def test_held_out_patches_are_pairs(folders):
    tool.main(settings(folders))
    held_out = HeldOutPatches(folders / "valid.h5", limit=5, seed=0, crop=8)
    assert len(held_out) == 5
    for number in range(5):
        blurry, sharp = held_out[number]
        assert blurry.shape == (8, 8, 3) and np.array_equal(sharp // 2, blurry)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 48}, "000001.png is 50x40: no patch of 48 pixels fits"),
        ({"patch_size": 4}, "patch_size must be at least 8"),
        ({"deblur_train_data": None}, "give --deblur_train_data"),
        ({"deblur_train_data": "missing"}, "no such data set: .*missing"),
        ({"blur_train_data": "missing"}, "folder not found: .*missing"),
        ({"blur_train_data": "gopro"}, "the blurry and the sharp images are one folder"),
        ({"blur_valid_path": "train.h5"}, "are one file"),
    ],
)
def test_bad_settings_raise(folders, changes, message):
    changes = {k: folders / v if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tool.main(settings(folders, **changes))
    assert not (folders / "train.h5").exists()


def test_pairs_of_different_sizes_raise(folders):
    write_image(folders / "gopro/GOPR1/blur/000002.png", np.zeros((40, 51, 3), np.uint8))
    with pytest.raises(ValueError, match=r"blur/000002.png is 51x40, .*sharp/000002.png is 50x40"):
        tool.main(settings(folders))
    assert sorted(path.name for path in folders.iterdir()) == ["RWBI", "gopro"]


def write_h5(path, **data):
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value


def test_bad_files_raise(folders):
    path, patches = folders / "bad.h5", np.zeros((4, 16, 16, 3), np.uint8)
    with pytest.raises(FileNotFoundError, match="file of patches not found: .*bad.h5"):
        Patches(path, "sharp")
    write_h5(path, sharp=patches, blurred=patches)
    with pytest.raises(ValueError, match=r"bad.h5 has no patches 'blur', only blurred, sharp"):
        Patches(path, "sharp")
    write_h5(path, sharp=patches, blur=patches.astype(np.float32))
    with pytest.raises(ValueError, match=r"'blur' must be uint8 \(n, size, size, 3\), is float32"):
        Patches(path, "sharp")
    write_h5(path, sharp=patches, blur=patches[:3])
    sources = [Patches(path, key) for key in ("blur", "sharp")]
    with pytest.raises(ValueError, match="bad.h5 has 3 blurry and 4 sharp patches: no pairs"):
        SourceDataset(*sources, 16, seed=0, paired=True)
    with pytest.raises(ValueError, match="crops of 32 pixels from .*bad.h5: its patches have 16"):
        SourceDataset(*sources, 32, seed=0)
    tool.main(settings(folders, unpaired=True, blur_train_path=path.with_name("unpaired.h5")))
    sources = [Patches(path.with_name("unpaired.h5"), "sharp")] * 2
    with pytest.raises(ValueError, match="unpaired.h5 is unpaired"):
        SourceDataset(*sources, 16, seed=0, paired=True)
    path.write_bytes((folders / "unpaired.h5").read_bytes()[:-5000])
    with pytest.raises(ValueError, match="bad.h5 is damaged or no HDF5 file: .*truncated"):
        Patches(path, "sharp")
    path.write_text("no file of patches")
    with pytest.raises(ValueError, match="bad.h5 is damaged or no HDF5 file"):
        Patches(path, "sharp")


def test_by_focus_separates_sharp_and_out_of_focus_patches(tmp_path):
    """`blur` gets out-of-focus parts of photos that are partly in focus, but no flat parts."""
    sharp = read_image(photographs(("coffee.png",))[0])[:384, :256]
    soft = cv2.GaussianBlur(sharp, None, 5)
    half = np.concatenate([sharp, soft, np.full_like(sharp[:, :128], 99)], axis=1)
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "half.png", half)
    write_image(tmp_path / "photos" / "soft.png", soft)
    chosen = {"deblur_train_data": tmp_path / "photos", "by_focus": True, "patch_size": 128}
    paths = {f"blur_{part}_path": tmp_path / f"{part}.h5" for part in ("train", "valid")}
    tool.main(tool.Settings(**chosen, **paths))
    own, other = (tool.cut(image, 128, 128) for image in (sharp, soft))
    with open_patches(tmp_path / "train.h5") as file:
        for key, patches in (("sharp", own), ("blur", other)):
            found = [patch.tobytes() for patch in file[key][:]]
            assert set(found) <= {patch.tobytes() for patch in patches}
            assert len(found) == len(set(found)) >= 3
        assert not file.attrs["paired"] and file.attrs["by_focus"]
    with pytest.raises(ValueError, match=r"train.h5 was made otherwise \(patch_size was 128, is 64"):
        tool.main(tool.Settings(**{**chosen, "patch_size": 64}, **paths))
    (tmp_path / "photos" / "half.png").unlink()
    paths["blur_train_path"] = tmp_path / "soft.h5"
    with pytest.raises(ValueError, match="no part of 1 photos is in focus"):
        tool.main(tool.Settings(**chosen, **paths))
    with pytest.raises(ValueError, match="no --blur_train_data then"):
        tool.main(tool.Settings(**chosen, **paths, blur_train_data=tmp_path))
