"""What comments, docstrings, messages and pages name exists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from pipeline.sweep.page import main
from tests.helpers.comparisons import sweep_file
from tests.helpers.named import (
    PACKAGES,
    ROOT,
    Claim,
    claims,
    comments_and_strings,
    known,
    mentioned_keys,
    wrong_commands,
    wrong_keys,
    wrong_links,
    wrong_names,
)
from tests.helpers.sweep_tables import wrong_tables

HERE = Path(__file__).resolve()  # not checked: its examples do not exist, on purpose
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/**/*.md")])
CODE = sorted({ROOT / "pldr.py", *(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))} - {HERE})
YAMLS = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "launch").rglob("*.yaml")])


def none_wrong(wrong: list[str]) -> None:
    """All of them at once, one a line."""
    assert not wrong, "\n".join(["", *wrong])


def test_named_files_and_modules_exist() -> None:
    claimed = [claim for path in [*PAGES, *CODE, *YAMLS] for claim in claims(path)]
    none_wrong([f"{c.path.relative_to(ROOT)}:{c.line}: {name}" for c in claimed for name in wrong_names(c)])


def test_links_resolve() -> None:
    none_wrong([f"{page.name}: {link}" for page in PAGES for link in wrong_links(page, page.read_text("utf-8"))])


def test_configuration_keys_exist() -> None:
    none_wrong([f"{page.name}: {key}" for page in PAGES for key in wrong_keys(page.read_text("utf-8"))])


def test_configuration_keys_in_comments_and_strings_exist() -> None:
    """In backticks only: `model.forward` without them is Python."""
    wrong = []
    for claim in (claim for path in [*CODE, *YAMLS] for claim in claims(path)):
        keys = mentioned_keys(" ".join(re.findall(r"`([^`\n]+)`", claim.text)))
        wrong += [f"{claim.path.relative_to(ROOT)}:{claim.line}: {key}" for key in keys if not known(key)]
    none_wrong(wrong)


def test_commands_exist() -> None:
    texts = {path.relative_to(ROOT): path.read_text("utf-8") for path in [*PAGES, *CODE, *YAMLS]}
    none_wrong([f"{path}: {command}" for path, text in texts.items() for command in wrong_commands(text)])


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_tables_of_sweeps_are_what_their_files_give() -> None:
    """`python -m pipeline.sweep.page docs/experiments/*.json --into docs/experiments.md` writes them."""
    none_wrong(wrong_tables(ROOT / "docs" / "experiments.md", ROOT / "docs" / "experiments"))


def test_they_find_what_is_wrong() -> None:
    here = ROOT / "pipeline" / "errors.py"
    text = "pipeline/no_such.py, science.md, orders.py, `pipeline/io/{urls,gone}.py`, pipeline.io.nothing, pipeline.errors.Nope"
    assert wrong_names(Claim(here, 1, text)) == [
        "orders.py", "pipeline.errors.Nope", "pipeline.io.nothing", "pipeline/io/gone.py", "pipeline/no_such.py", "science.md",
    ]  # fmt: skip
    right = "distributed.py, pipeline/io/, `pipeline/io/{urls,remote}.py`, pipeline.errors.UserError, docs/data.md, https://x.org/a.md"
    assert not wrong_names(Claim(here, 1, right))
    source = '"""a.py"""\nx = "b.py tests.c"  # d.py\n'
    assert [c.text for c in comments_and_strings(here, source)] == ["# d.py", "a.py", "b.py tests.c"]
    assert [c.text for c in comments_and_strings(Path("tests/x.py"), source)] == ["# d.py", "a.py", "tests.c"]
    assert wrong_links(ROOT / "README.md", "[a](docs/none.md) [b](docs/data.md) [c](docs/data.md#no-such-part)") == [
        "docs/none.md", "docs/data.md#no-such-part",
    ]  # fmt: skip
    keys = "`train.setps=3`, model.safetensors\n\n    train:\n      stepz: 1\n\nand\n\n    pldr run X seeds=1 train.steps=2\n"
    assert wrong_keys(keys) == ["seeds", "train.setps", "train.stepz"]
    assert not wrong_keys(
        "`data.slurm.sbatch_args.account`, `train.freeze_g.below=1e-5`, `data.sources`, `model.g_source`"
    )
    assert wrong_keys("a\n\n    name: x\n    config: y\n    set: {train.stepz: 1}\n    grids: {}\n    grid: {seed: [1]}\n") == [
        "grids", "train.stepz",
    ]  # fmt: skip
    commands = "`pldr go X`, `pldr launch slurm|magic X`, `pldr train X --faster`, `pldr train X --resume auto`"
    assert wrong_commands(commands) == ["pldr go X", "pldr launch slurm|magic X", "pldr train --faster"]


def test_they_find_tables_that_are_not_their_files(tmp_path: Path) -> None:
    folder, page = tmp_path / "copies", tmp_path / "page.md"
    sweep = sweep_file(tmp_path)
    page.write_text("<!-- sweep: fair -->\n<!-- end of sweep -->\n")
    assert main([str(sweep), "--copy-to", str(folder)]) == 0
    assert wrong_tables(page, folder) == ["page.md: the table of fair is not what fair.json gives"]
    assert main([str(folder / "fair.json"), "--into", str(page)]) == 0 and wrong_tables(page, folder) == []
    right, file = page.read_text("utf-8"), folder / "fair.json"
    page.write_text(right.replace("0.0591", "0.0691"))  # by hand
    assert wrong_tables(page, folder) == ["page.md: the table of fair is not what fair.json gives"]
    page.write_text(right + "<!-- sweep: gone -->\n<!-- end of sweep -->\n")
    assert wrong_tables(page, folder) == ["page.md: gone.json is not there"]
    page.write_text(right)
    copy = file.read_text("utf-8")
    file.write_text(copy.replace('"mean": -0.0591', '"mean": -0.0691'))  # the comparison, not the children
    assert "fair.json: its comparison does not follow from its children" in wrong_tables(page, folder)
    shutil.copy(sweep, file)
    assert wrong_tables(page, folder) == ["fair.json is no small copy: make it with --copy-to"]
    file.write_text(copy)
    file.rename(folder / "other.json")
    assert wrong_tables(page, folder) == ["other.json is of the sweep fair", "page.md: fair.json is not there"]


def test_every_room_says_what_it_is_for_and_what_goes_in_and_out() -> None:
    rooms = sorted({path.parent for folder in PACKAGES if folder != "tests" for path in (ROOT / folder).rglob("*.py")})
    texts = {room: (room / "__init__.py").read_text("utf-8") for room in rooms}
    form = re.compile(r'"""[^\n]+\n\nIn: .+\nOut: .+\n"""', re.DOTALL)
    none_wrong([str(room.relative_to(ROOT)) for room, text in texts.items() if not form.match(text)])
