"""The command line as a user meets it: files that come out, exit statuses, and what errors say."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from data_trees import write_ade20k, write_cityscapes, write_pascal_context
from PIL import Image
from typer.testing import CliRunner

import segmenter_fast
from segmenter_fast import SegmenterModel, create_model, predict
from segmenter_fast import cli as cli_module
from segmenter_fast import train as train_module
from segmenter_fast import zoo as zoo_module
from segmenter_fast.cli import app
from segmenter_fast.data import Scenes
from segmenter_fast.files import replacing
from segmenter_fast.train import TrainOptions

NAMES = ("grass", "roof [red]", "sky")
PALETTE = ((10, 200, 30), (200, 20, 20), (90, 160, 250))
SCENES = ["--dataset", "scenes", "--count", "6", "--val-count", "2"]
TOY = ["--model", "Seg-N-Mask/16", *SCENES, "--image-size", "32,48", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with few threads and a wide screen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("SEGMENTER_FAST_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def weights(here):
    """A random model of three classes, saved as weights/."""
    torch.manual_seed(0)
    model = create_model(
        "Seg-N-Mask/16", 3, 32, class_names=NAMES, palette=PALETTE, n_layers=1, decoder_n_layers=1
    )
    model.save_pretrained("weights")
    return "weights"


def run(*words, status=0):
    """Output of a command that must end with `status`."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.output


def picture(path, height=40, width=56, seed=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def write_folder_dataset(root, names=None):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            picture(root / "images" / split / f"{i}.jpg", 32, 32, seed=i)
            labels = rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), (32, 32))
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(root / "annotations" / split / f"{i}.png")
    if names:
        (root / "classes.txt").write_text("\n".join(names) + "\n\n", encoding="utf-8")
    return root


# --- Help and errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [[], ["predict"], ["train"], ["prepare"], ["attention"], ["zoo", "download"]]
)
def test_help_does_not_load_torch(command):
    """What makes `--help` quick: nothing heavy is imported for it."""
    code = (
        "import sys\n"
        "from segmenter_fast.cli import main\n"
        "try:\n"
        f"    main({[*command, '--help']!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        *("info", "predict", "prepare", "train", "plot", "evaluate", "convert", "demo", "zoo"),
        *("attention", "attended-area", "class-embeddings", "compare"),
    ],
)
def test_help_names_every_command_and_gives_examples(command):
    assert command in run("--help")
    text = run(command, "--help")
    assert "Usage" in text and "--debug" in text
    if command not in ("info", "demo"):  # these two need no arguments
        assert f"segmenter-fast {command}" in text.split("Usage", 1)[1].split("\n", 1)[1]


def test_train_offers_every_training_option():
    """The command line repeats TrainOptions, which it cannot import before it runs."""
    parameters = {p.name: p for p in typer.main.get_command(app).commands["train"].params}
    for field in dataclasses.fields(TrainOptions):
        default = parameters[field.name].default
        default = default() if callable(default) else default
        if field.name == "steps":
            assert default is None and f"{field.default} unless" in parameters["steps"].help
        elif field.name == "scale":
            assert tuple(map(float, default.split(","))) == field.default
        else:
            assert default == field.default, field.name


def test_usage_errors_end_with_2(weights):
    picture("a.png")
    for words in (
        ["predict"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--scales", "1,big"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--scales", "0"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--window-size", "-3"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--short-side", "short"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--backend", "cuda"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--device", "toaster"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--suffix", "a/b"],
        ["train", *SCENES, "-o", "run"],
        ["train", *TOY, "-o", "run", "--image-size", "1,2,3"],
        ["train", *TOY, "-o", "run", "--steps", 3, "--epochs", 1],
        ["train", *TOY, "-o", "run", "--scale", "0.5"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--scales", "1,"],
        ["predict", "a.png", "-w", weights, "-o", "out", "--scales", ""],
        ["predict", "a.png", "-w", weights, "-o", "out", "--scales", "1,,2"],
        [*"predict a.png -o out --window-size whole --window-stride 8 -w".split(), weights],
        ["train", *TOY, "-o", "run", "--scale", "0.5,x"],
        ["train", *TOY, "-o", "run", "--window-size", "whole", "--window-stride", 8],
        ["evaluate", "-w", weights, "--dataset", "camvid"],
        ["nonsense"],
    ):
        run(*words, status=2)
    assert not Path("out").exists() and not Path("run").exists()


def test_expected_failures_are_one_line_and_debug_shows_the_traceback(weights):
    picture("a.png")
    for words, message in (
        (["-w", "no/such/thing/", "a.png"], "error: no weights 'no/such/thing/'"),
        (["-w", weights, "missing.png"], "error: no such file or folder: missing.png"),
        (
            ["-w", weights, "a.png", "--backend", "triton"],
            "error: backend 'triton' runs on a GPU; the input is on 'cpu'",
        ),
        (["-w", weights, "a.png", "--device", "cuda:97"], "error: no device 'cuda:97'"),
    ):
        text = run("predict", *words, "-o", "out", status=1)
        assert message in text and "Traceback" not in text
    result = CliRunner().invoke(
        app, ["predict", "missing.png", "-w", weights, "-o", "out", "--debug"]
    )
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", [1, 2]), (" 1 2 ", [1, 2]), ("1x2", [1, 2]), ("1 X 2, 3", [1, 2, 3]), ("7", [7]),
        *((wrong, None) for wrong in ("1,x", "1,", "x1", "", " ", "1,,2", "1xx2", "1.5", "a")),
    ],
)  # fmt: skip
def test_numbers_are_read_whole(text, values):
    """What is between two numbers is one sign; what is left over is no number."""
    if values is not None:
        assert cli_module._numbers("--n", text, int, "numbers") == values
        return
    with pytest.raises(typer.BadParameter, match=re.escape(f"expected numbers, got {text!r}")):
        cli_module._numbers("--n", text, int, "numbers")


def test_memory_that_is_not_there_is_an_expected_error(weights, monkeypatch):
    """PyTorch has a class for a GPU's memory, and for the CPU's a RuntimeError like any other."""

    def huge(*args, **options):
        return torch.empty(1 << 50)

    monkeypatch.setattr("segmenter_fast.predict", huge)
    picture("a.png")
    text = run("predict", "a.png", "-w", weights, "-o", "out", status=1)
    assert "error: out of memory: try a smaller --batch-size" in text
    assert "you tried to allocate" in text and "enforce fail" not in text


def test_long_thin_pictures_are_skipped():
    picture("thin.png", 1, 4000)
    text = run("predict", "thin.png", "-w", "street", "-o", "out", status=1)
    assert "skipped: thin.png: an image of 1 x 4000 would have to be enlarged to 360 x 1440" in text


@pytest.mark.parametrize(
    ("words", "option", "kind"),
    [
        (["camvid", "--root", ".", "--ignore-index", 255], "--ignore-index", "folder"),
        (["camvid", "--root", ".", "--num-classes", 3], "--num-classes", "folder"),
        (["ade20k", "--root", ".", "--class-names", "ade20k"], "--class-names", "folder"),
        (["camvid", "--root", ".", "--scene-size", "32,48"], "--scene-size", "scenes"),
        (["folder", "--root", ".", "--data-seed", 0], "--data-seed", "scenes"),
        (["cityscapes", "--root", ".", "--count", 5], "--count", "scenes"),
        (["scenes", "--num-classes", 3], "--num-classes", "folder"),
    ],
)
def test_options_of_other_data_are_refused(weights, words, option, kind):
    for command in (["evaluate", "-w", weights], ["train", "--init", weights, "-o", "run"]):
        text = run(*command, "--dataset", *words, status=2)
        assert option in text and f"is for --dataset {kind}" in text
    assert not Path("run").exists()


def test_options_of_other_data_in_a_recipe_are_no_mistake():
    """A recipe may have them: it holds the defaults of all, and serves for other data."""
    Path("recipe.yaml").write_text("model: Seg-N/16\nscene-size: [32, 48]\nignore-index: 255\n")
    root = write_folder_dataset(Path("data"), names=("a", "b", "c"))
    words = ["--dataset", "folder", "--root", root, "--image-size", 32, "--steps", 1]
    run("train", "--config", "recipe.yaml", *words, "-o", "run")
    run("train", "--config", "run/recipe.yaml", "-o", "again")


@pytest.mark.parametrize("command", ["demo", "plot", "kernels"])
def test_pictures_and_pages_that_cannot_be_written(command):
    """Found out before the work."""
    Path("a.png").mkdir()
    words = ["nothing"] if command == "plot" else []
    text = run(command, *words, "--output", "a.png", status=1)
    assert "error: --output: a.png is a folder; give the name of a file in it" in text


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody can write into")
def test_folders_that_cannot_be_written(weights):
    picture("a.png")
    for output in ("/proc", "/proc/none/deep"):
        text = run("predict", "a.png", "-w", weights, "-o", output, status=1)
        assert "error: --output: cannot write into /proc: " in text
    text = run("evaluate", "-w", weights, "--dataset", "scenes", "--json", "/proc/a", status=1)
    assert "error: --json: /proc/a cannot be written: " in text


def test_errors_of_writing_name_the_file_that_was_asked_for():
    """Not the temporary one beside it, which is gone by then."""
    Path("folder").mkdir()
    for path, kind in (("folder", IsADirectoryError), ("none/a.txt", FileNotFoundError)):
        with pytest.raises(kind) as caught, replacing(path) as temporary:
            temporary.write_text("a")
        assert caught.value.filename == path and ".tmp" not in str(caught.value)
    with pytest.raises(OSError, match="No space left") as caught, replacing("b.txt"):
        raise OSError(28, "No space left on device")  # as a write says it: without a name
    assert caught.value.filename == "b.txt"
    with pytest.raises(FileNotFoundError) as caught, replacing("b.txt"):
        Path("other").read_text()
    assert caught.value.filename == "other"
    assert os.listdir() == ["folder"]


def test_a_bug_is_not_dressed_up_as_a_user_error(weights, monkeypatch):
    def broken(*args, **options):
        raise TypeError("a fault of the program")

    monkeypatch.setattr("segmenter_fast.images.load_image", broken)
    picture("a.png")
    result = CliRunner().invoke(app, ["predict", "a.png", "-w", weights, "-o", "out"])
    assert isinstance(result.exception, TypeError)


def test_as_a_process(weights):
    """The exit status and the two streams of a real process."""
    words = [sys.executable, "-m", "segmenter_fast", "predict", "missing.png", "-w", weights]
    done = subprocess.run([*words, "-o", "out"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: no such file or folder: missing.png\n"


# --- info and zoo --------------------------------------------------------------------------------


def test_info():
    facts = json.loads(run("info", "--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0]["device"] == "cpu" and facts["devices"][0]["auto"] == "native"
    assert facts["compiled"]["simd_level"] in facts["compiled"]["simd_levels"]
    level = facts["compiled"]["simd_level"]
    assert facts["operations"]["labels (upsample + argmax)"] == f"compiled, {level}"
    assert facts["operations"]["normalised mask product"] == "PyTorch"
    text = run("info")
    for word in (torch.__version__, facts["compiled"]["simd_level"], "native", "triton"):
        assert word in text


def test_info_without_the_compiled_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmenter_fast._C", None)
    monkeypatch.delattr("segmenter_fast._C", raising=False)
    facts = json.loads(run("info", "--json"))
    assert facts["compiled"] is None and "pip install" in facts["compiled_problem"]
    assert set(facts["operations"].values()) == {"not compiled"}
    assert "pip install" in run("info")


def test_zoo_lists_what_is_there(here):
    rows = json.loads(run("zoo", "--json"))
    assert [row["name"] for row in rows] == zoo_module.list_zoo()
    assert not any(row["downloaded"] for row in rows)
    folder = here / "cache" / "zoo" / rows[0]["name"]
    folder.mkdir(parents=True)
    for file in zoo_module.FILES:
        (folder / file).write_bytes(b"x")
    assert json.loads(run("zoo", "--json"))[0]["downloaded"]
    text = run("zoo")
    assert "cityscapes/seg_large_mask" in text and "81.3" in text


def test_zoo_download_fails_clearly(monkeypatch):
    monkeypatch.setenv("SEGMENTER_FAST_ZOO_URL", "http://127.0.0.1:9")
    text = run("zoo", "download", "Seg-T-Mask/16", "--timeout", 2, status=1)
    assert text.splitlines()[-1].startswith("error: cannot download http://127.0.0.1:9/")
    assert "no model 'Seg-Z'" in run("zoo", "download", "Seg-Z", status=1)


# --- predict -------------------------------------------------------------------------------------


def test_predict_writes_label_map_and_overlay(weights):
    source = picture("photos/in put.jpg")
    text = run("predict", source, "-w", weights, "-o", "deep/out")
    assert "1 image in" in text and "images/s" in text
    assert sorted(os.listdir("deep/out")) == ["in put.overlay.png", "in put.png"]
    with Image.open("deep/out/in put.png") as labels:
        assert labels.mode == "P" and labels.size == (56, 40)
        assert labels.getpalette()[:9] == [value for colour in PALETTE for value in colour]
        model = SegmenterModel.from_pretrained(weights)
        np.testing.assert_array_equal(np.asarray(labels), predict(model, source).numpy())
    with Image.open("deep/out/in put.overlay.png") as overlay:
        assert overlay.mode == "RGB"
        assert overlay.width >= 56 and overlay.height >= 40
        assert overlay.size != (56, 40)  # the legend stands outside of the picture


def test_predict_options_reach_the_prediction(weights):
    source = picture("a.png", 48, 80)
    options = {
        "window_size": 32,
        "window_stride": 16,
        "scales": (0.5, 1.0),
        "flip": True,
        "short_side": 40,
    }
    words = "--window-size 32 --window-stride 16 --scales 0.5,1.0 --flip --short-side 40".split()
    model = SegmenterModel.from_pretrained(weights)
    run("predict", source, "-w", weights, "-o", "out", *words, "--no-overlay", "--suffix", "_x")
    assert os.listdir("out") == ["a_x.png"]
    with Image.open("out/a_x.png") as labels:
        expected = predict(model, source, **options).numpy()
        np.testing.assert_array_equal(np.asarray(labels), expected)
    run("predict", source, "-w", weights, "-o", "whole", "--window-size", "whole")
    with Image.open("whole/a.png") as labels:
        expected = predict(model, source, window_size="whole").numpy()
        np.testing.assert_array_equal(np.asarray(labels), expected)


def test_predict_turns_photographs_upright(weights):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn
    Image.new("RGB", (60, 40)).save("phone.jpg", exif=exif)
    run("predict", "phone.jpg", "-w", weights, "-o", "out")
    with Image.open("out/phone.png") as labels:
        assert labels.size == (40, 60)


def test_predict_skips_what_it_cannot_read(weights):
    picture("photos/good.png")
    Path("photos/broken.png").write_bytes(b"not a picture")
    whole = picture("photos/cut.jpg").read_bytes()
    Path("photos/cut.jpg").write_bytes(whole[: len(whole) // 2])
    Path("photos/notes.txt").write_text("no picture, no complaint")
    text = run("predict", "photos", "gone.png", "-w", weights, "-o", "out", status=1)
    assert sorted(os.listdir("out")) == ["good.overlay.png", "good.png"]
    for name in ("broken.png", "cut.jpg", "gone.png"):
        assert sum(name in line for line in text.splitlines()) == 1, text
    assert "notes.txt" not in text
    assert "1 image in" in text and "error: 3 of 4 pictures skipped" in text


def test_predict_never_overwrites_unless_told(weights):
    picture("a.png")
    picture("b.png")
    Path("out").mkdir()
    Path("out/b.overlay.png").write_bytes(b"mine")
    text = run("predict", "a.png", "b.png", "-w", weights, "-o", "out", status=1)
    assert "out/b.overlay.png: exists already" in text and "a.png" not in text
    assert os.listdir("out") == ["b.overlay.png"]  # refused before it began
    assert Path("out/b.overlay.png").read_bytes() == b"mine"
    run("predict", "a.png", "b.png", "-w", weights, "-o", "out", "--overwrite")
    assert Path("out/b.overlay.png").read_bytes() != b"mine"
    assert len(os.listdir("out")) == 4


def test_predict_never_overwrites_an_input(weights):
    before = picture("a.png").read_bytes()
    text = run("predict", "a.png", "-w", weights, "-o", ".", "--overwrite", status=1)
    assert "a.png is an input and would be overwritten" in text
    assert Path("a.png").read_bytes() == before
    run("predict", "a.png", "-w", weights, "-o", ".", "--suffix", "_labels")
    assert Path("a_labels.png").exists() and Path("a.png").read_bytes() == before


def test_predict_refuses_two_pictures_for_one_file(weights):
    picture("x/a.png")
    picture("y/a.jpg")
    text = run("predict", "x/a.png", "y", "-w", weights, "-o", "out", status=1)
    assert "x/a.png and y/a.jpg would both be written to out/a.png" in text
    assert not Path("out").exists()
    picture("z/b.png")
    picture("z/b.overlay.png")
    text = run("predict", "z", "-w", weights, "-o", "out", status=1)
    assert "would both be written to out/b.overlay.png" in text
    # The same file by two names is one picture.
    run("predict", "x", "x/../x/a.png", "-w", weights, "-o", "out")
    assert len(os.listdir("out")) == 2


def test_predict_folders(weights):
    picture("photos/a.png")
    picture("photos/deep/a.png")
    run("predict", "photos", "-w", weights, "-o", "flat", "--no-overlay")
    assert os.listdir("flat") == ["a.png"]
    run("predict", "photos", "-w", weights, "-o", "photos/out", "--no-overlay", "--recursive")
    found = {str(path.relative_to("photos/out")) for path in Path("photos/out").rglob("*.png")}
    assert found == {"a.png", "deep/a.png"}
    # Results inside the folder are not taken for pictures the second time.
    run("predict", "photos", "-w", weights, "-o", "photos/out", "--no-overlay", "-r", "--overwrite")
    assert len(list(Path("photos/out").rglob("*.png"))) == 2
    Path("empty/deep").mkdir(parents=True)
    text = run("predict", "empty", "-w", weights, "-o", "out", status=1)
    assert "error: no pictures" in text and "empty" in text
    text = run("predict", "photos", "-w", weights, "-o", "photos/a.png", status=1)
    assert "is a file, not a folder" in text


def test_predict_names_a_failing_disk(weights, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device", "out/a.png")

    monkeypatch.setattr("segmenter_fast.visualize.save_label_png", full)
    picture("a.png")
    picture("b.png")
    text = run("predict", "a.png", "b.png", "-w", weights, "-o", "out", status=1)
    assert "error: No space left on device: out/a.png" in text


# --- train and evaluate --------------------------------------------------------------------------


def test_train_interrupt_resume_evaluate_predict(monkeypatch):
    """The life of a toy model."""
    words = [
        "train",
        *TOY,
        "--steps",
        5,
        "--save-every",
        3,
        "--output",
        "run",
        "--optimizer",
        "adamw",
    ]
    real = train_module.poly_lr

    def interrupted(step, options):
        if step == 4:
            raise KeyboardInterrupt
        return real(step, options)

    monkeypatch.setattr(train_module, "poly_lr", interrupted)
    assert "the same command with --resume continues run" in run(*words, status=130)
    monkeypatch.setattr(train_module, "poly_lr", real)

    assert "run holds a run" in run(*words, status=1)
    text = run(*words, "--resume", "--lr", 0.5, status=1)
    assert "lr: 0.001 then, 0.5 now" in text
    text = run(*words, "--resume", "--data-seed", 3, status=1)
    assert "data_seed: 0 then, 3 now" in text
    text = run(*words, "--resume")
    assert "best mIoU" in text and "segmenter-fast predict IMAGE --weights run/best" in text
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 5]

    text = run(
        "evaluate", "-w", "run/best", "--dataset", "scenes", "--count", 2, "--json", "result.json"
    )
    result = json.loads(Path("result.json").read_text())
    assert result["miou"] == pytest.approx(max(row["miou"] for row in rows), abs=1e-9)
    assert list(result["iou"]) == list(Scenes.class_names)
    assert f"mIoU {100 * result['miou']:.2f} %" in text and "pole" in text
    assert "windows of 32 pixels every 32, scales 1, no mirror images" in text
    assert result["protocol"]["window_size"] == 32 and result["images"] == 2

    picture("a.png")
    run("predict", "a.png", "-w", "run/best", "-o", "out")
    assert Path("out/a.overlay.png").exists()


def test_train_again_from_its_recipe():
    run("train", *TOY, "--steps", 2, "--output", "one", "--seed", 5, "--ema", 0.5)
    recipe = yaml.safe_load(Path("one/recipe.yaml").read_text())
    assert recipe["seed"] == 5 and recipe["model"] == "Seg-N-Mask/16" and "output" not in recipe
    run("train", "--config", "one/recipe.yaml", "--output", "two")
    one, two = (torch.load(f"{name}/state.pt", weights_only=True) for name in ("one", "two"))
    assert one["options"] == two["options"]
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5)


def test_the_command_line_wins_over_a_recipe():
    Path("recipe.yaml").write_text(
        "model: Seg-N/16\ndataset: scenes\ncount: 6\nval-count: 2\nimage-size: [32, 48]\n"
        "scale: [0.5, 1]\nsteps: 50\nbatch-size: 2\nlr: 2e-3\nwindow-size: whole\namp: false\n"
    )
    run("train", "--config", "recipe.yaml", "-o", "run", "--epochs", "0.5", "--min-lr", "1e-4")
    state = torch.load("run/state.pt", weights_only=True)
    options = state["options"]
    assert state["step"] == options["steps"] == 2  # half of six images, two at a time
    assert (options["lr"], options["min_lr"], options["scale"]) == (2e-3, 1e-4, (0.5, 1.0))
    config = SegmenterModel.from_pretrained("run/best").config
    assert config.window_size is None and config.image_size == (32, 48)


# A miniature; then epochs, batch, rate, crop, window, stride and shorter side of a validation
# image of the official code.
PRESETS = {
    "ade20k": (write_ade20k, 64, 8, 1e-3, 512, 512, 512, 512),
    "pascal-context": (write_pascal_context, 256, 16, 1e-3, 480, 480, 320, 520),
    "cityscapes": (write_cityscapes, 216, 8, 1e-2, 768, 768, 512, 1024),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_papers(monkeypatch, preset):
    """What --preset makes the defaults; everything else of the recipe is the trainer's default."""
    write, epochs, batch, lr, crop, window, stride, side = PRESETS[preset]
    write(Path("data"))
    runs = []

    def train(network, train_set, val_set, output, options, resume):
        runs.append((network.config, len(train_set), options))
        return {"finished": False, "steps": 0}

    monkeypatch.setattr(train_module, "train", train)
    words = ["train", "--preset", preset, "--model", "Seg-T-Mask/16", "--root", "data"]
    run(*words, "-o", "one")
    # The command line wins, and its steps over the preset's epochs.
    run(*words, "-o", "two", "--lr", 0.5, "--steps", 3)
    (config, count, options), (_, _, changed) = runs
    assert config.image_size == (crop, crop) and config.dataset == preset.replace("-", "_")
    assert (config.window_size, config.window_stride, config.short_side) == (window, stride, side)
    assert (config.drop_path_rate, config.decoder_dropout) == (0.1, 0.1)
    steps = math.ceil(count * epochs / batch)
    often = {"save_every": options.save_every, "val_every": options.val_every}
    assert options == TrainOptions(steps=steps, batch_size=batch, lr=lr, **often)
    assert changed == dataclasses.replace(options, steps=3, lr=0.5)


def test_train_with_a_preset():
    """A step of the paper's recipe, in its resolution, on a miniature of ADE20K."""
    write_ade20k(Path("ade"))
    run(
        "train", "--preset", "ade20k", "--root", "ade", "--model", "Seg-N-Mask/32", "-o", "run",
        "--batch-size", 1, "--steps", 1, "--val-limit", 1,
    )  # fmt: skip
    config = SegmenterModel.from_pretrained("run/best").config
    assert config.image_size == (512, 512) and config.n_cls == 150 and config.dataset == "ade20k"
    assert config.class_names[0] == "wall"


def test_bundled_recipes():
    folder = Path(segmenter_fast.__file__).parent / "weights"
    recipes = [path.relative_to(folder) for path in folder.glob("*/recipe*.yaml")]
    assert len(recipes) == 4
    wrong = ("--root", ".", "--init", "x", "--device", "no", "-o", "run")
    for recipe in recipes:  # every option is known, so it is the device that is refused
        assert "--device" in run("train", "--config", str(recipe), *wrong, status=2)
    text = run("train", "--config", "street/none.yaml", "-o", "run", status=2)
    assert "street/recipe-2.yaml" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("epoch: 3\n", "unknown options epoch"), ("- a\n", "expected lines"), ("a: [\n", "not YAML")],
)
def test_bad_recipes(content, message):
    Path("recipe.yaml").write_text(content)
    assert message in run("train", "--config", "recipe.yaml", "-o", "run", status=2)
    assert "no file 'gone.yaml'" in run("train", "--config", "gone.yaml", "-o", "run", status=2)


def test_train_on_a_folder_from_weights(weights):
    """Fine-tuning: other classes, another crop, the class names kept with the weights."""
    root = write_folder_dataset(Path("data"), names=("left", "right", "none"))
    text = run(
        "train", "--init", weights, "--dataset", "folder", "--root", root, "--image-size", "48,32",
        "--steps", 1, "--batch-size", 2, "--output", "run", "--drop-path", 0.0, "--min-lr", 0,
        "--lr", 0,
    )  # fmt: skip
    assert "run/best" in text
    before, after = (SegmenterModel.from_pretrained(name) for name in (weights, "run/best"))
    assert after.config.class_names == ("left", "right", "none")
    assert after.config.image_size == (48, 32) and after.config.dataset == "data"
    assert after.config.drop_path_rate == 0.0 and after.config.n_layers == 1
    states = before.state_dict(), after.state_dict()
    for name in states[0]:
        if name != "encoder.pos_embed":  # resampled; the learning rate was 0
            torch.testing.assert_close(states[1][name], states[0][name])
    text = run("evaluate", "-w", "run/best", "--dataset", "folder", "--root", root, "--limit", 1)
    assert "1 images" in text and "left" in text

    text = run(
        "train", "--init", weights, "--model", "Seg-B/16", "--dataset", "folder", "--root", root,
        "-o", "other", status=1,
    )  # fmt: skip
    assert "does not fit a model of 12 layers, width 768, linear (Seg-B/16)" in text


def test_class_names_of_folders(weights):
    root = write_folder_dataset(Path("data"))
    words = ["--dataset", "folder", "--root", root]
    toy = ["train", "--model", "Seg-N/16", *words, "--image-size", 32, "-o", "run", "--steps", 1]
    text = run(*toy, status=1)
    assert "the classes of data are not known" in text and "classes.txt" in text
    assert "no file 'gone.txt'" in run(*toy, "--class-names", "gone.txt", status=1)
    # Evaluation takes the names of the weights.
    assert "roof [red]" in run("evaluate", "-w", weights, *words)
    Path("four.json").write_text(
        '[["a", [1, 2, 3]], ["b", [4, 5, 6]], ["c", [7, 8, 9]], ["d", [0, 0, 0]]]'
    )
    text = run("evaluate", "-w", weights, *words, "--class-names", "four.json", status=1)
    assert "know 3 classes but the data have 4" in text
    text = run(*toy, "--class-names", "four.json", "--num-classes", 3, status=1)
    assert "--num-classes is 3 but there are 4" in text
    run(*toy, "--class-names", "four.json")
    assert SegmenterModel.from_pretrained("run/best").config.palette[1] == (4, 5, 6)
    text = run("evaluate", "-w", weights, *words, "--split", "test", status=1)
    assert "no such folder: data/images/test" in text


def test_train_reports_a_diverging_loss():
    text = run("train", *TOY, "--steps", 20, "--lr", 1e30, "--output", "run", status=1)
    assert "error: the loss is" in text and "lower the learning rate" in text


# --- demo ----------------------------------------------------------------------------------------


def test_demo(here):
    torch.manual_seed(0)
    model = create_model("Seg-N-Mask/16", len(Scenes.class_names), 32, n_layers=1)
    model.save_pretrained("weights")
    words = ["demo", "-w", "weights", "--size", "32,48", "--scenes", 2, "--repeats", 1]
    for _ in range(2):  # the demo may replace its own picture
        text = run(*words)
        assert "segmenter_fast_demo.png" in text and "mIoU" in text
    assert Path("segmenter_fast_demo.png").exists()
    assert "error: " in run(*words, "--output", "no/such/folder/x.png", status=1)
