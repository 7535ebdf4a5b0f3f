"""What the pages show works: their Python and their commands run, on small data, as written.

README's, too, as far as they are Python or `segmenter-fast`. A block after an HTML comment
"not run: ..." needs a GPU, a download or somebody's data.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from segmenter_fast.cli import app
from segmenter_fast.data import Scenes

ROOT = Path(__file__).parents[1]
PAGES = [
    "quick-start",
    "own-data",
    "checkpoints",
    "evaluation",
    "cpu",
    "kernels",
]  # analyses: its own test
# How many of a page's pictures its blocks draw.
DRAWN = {"quick-start": 1, "checkpoints": 1, "evaluation": 1, "own-data": 1}
BLOCK = re.compile(r"(<!-- not run:.*?-->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
# A page shows what is sensible, a test has no hour.
SHORTER = {
    "--epochs 50": "--steps 1 --batch-size 1",
    "--image-size 256": "--image-size 64",
    "--model Seg-T-Mask/16": "--model Seg-N-Mask/16",
    "segmenter-fast demo": "segmenter-fast demo --size 48,64 --scenes 1 --repeats 1",
}
SMALLER = {
    "Seg-S-Mask/16": "Seg-N-Mask/16",
    "image_size=512": "image_size=64",
    ', pretrained="S_16-i21k.npz"': "",  # a download
}


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGMENTER_FAST_HOME", str(tmp_path / "cache"))
    image, labels = Scenes(1, size=(96, 128), split="val")[0]
    picture, mask = image.permute(1, 2, 0).numpy(), np.asarray(labels)
    Image.fromarray(picture).save("photo.jpg")
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
    two = np.where(mask % 2, 1, 0).astype(np.uint8)
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            (Path("my_data") / kind / split).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(picture).save(f"my_data/images/{split}/{i}.jpg")
            Image.fromarray(two).save(f"my_data/annotations/{split}/{i}.png")
            Image.fromarray(picture).save(f"photos/{i}.jpg")
            Image.fromarray(two).save(f"masks/{i}.png")
    Path("names.txt").write_text("even\nodd\n")
    torch.manual_seed(0)
    return tmp_path


def blocks(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    return [(kind, code) for skipped, kind, code in BLOCK.findall(text) if not skipped]


def pictures(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)


def shown(line, shorter):
    for long, short in shorter.items():
        line = line.replace(long, short)
    return line


def run_command(line):
    result = CliRunner().invoke(app, shlex.split(shown(line, SHORTER))[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


@pytest.mark.parametrize("page", PAGES)
def test_page(somewhere, page):
    """Blocks run in their order, those of Python in one namespace, and draw the page's pictures."""
    names, found = {}, blocks(f"docs/{page}.md")
    assert found
    for kind, code in found:
        if kind == "python":
            exec(compile(code, f"{page}.md", "exec"), names)
            continue
        for line in code.splitlines():
            program = line.split()[0]
            assert program == "segmenter-fast", f"{page}.md runs {line!r} in a test"
            run_command(line)
    drawn = [name for name in pictures(page) if Path(name).exists()]
    assert len(drawn) >= DRAWN.get(page, 0)
    for name in drawn:
        with Image.open(name) as new, Image.open(ROOT / "docs" / name) as old:
            assert new.size == old.size, name


def test_readme(somewhere):
    """Its Python runs on less; of its commands those that are not of pip, pytest or torchrun."""
    image, target = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.uint8)
    names, ran = {"loader": [(image, target)]}, 0
    for kind, code in blocks("README.md"):
        if kind == "python":
            exec(compile(shown(code, SMALLER), "README.md", "exec"), names)
            ran += 1
            continue
        for line in code.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                if command.split()[:1] == ["segmenter-fast"]:
                    run_command(command)
                    ran += 1
    assert ran >= 3


@pytest.mark.parametrize("page", sorted(page.stem for page in ROOT.glob("docs/*.md")))
def test_page_has_a_picture(page):
    """A page that says what comes out shows it, in files that are there and no burden."""
    found = pictures(page)
    assert found
    for name in found:
        size = (ROOT / "docs" / name).stat().st_size
        assert 0 < size < (1_000_000 if "benchmarks" in name else 300_000), name


def test_links_lead_somewhere():
    """Every relative link of README, CONTRIBUTING and docs/, and the heading it names."""
    missing = []
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    for page in [*pages, *ROOT.glob("benchmarks/**/*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in link:
                continue
            path, _, heading = link.partition("#")
            target = (page.parent / path) if path else page
            if not target.exists():
                missing.append(f"{page.name}: {link}")
            elif heading:
                headings = re.findall(
                    r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE
                )
                slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
                if heading not in slugs:
                    missing.append(f"{page.name}: {link}")
    assert not missing


def test_every_page_is_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{page.name}" in readme for page in ROOT.glob("docs/*.md"))


def test_readme_commands_exist():
    """The README's own blocks are parsed, not run: every option of every command is known."""
    import typer

    commands = typer.main.get_command(app).commands
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        line.strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    seen = 0
    for line in lines:
        match = re.search(r"(?:segmenter-fast |-m segmenter_fast\.)(\S+)(.*)", line)
        if match is None:
            continue
        known = {name for option in commands[match[1]].params for name in option.opts}
        unknown = set(re.findall(r"--[\w-]+", match[2])) - known
        assert not unknown, f"{line}: {unknown}"
        seen += 1
    assert seen >= 4
