"""House rules: import directions, `settings` only in scripts, file names in the docs, help lines, wording."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = "ldm cldm harness web extras benchmarks tests docs".split()
LIBRARY = "ldm cldm harness web".split()
# A file imports only from lower levels. tests, benchmarks and extras import all, and nothing imports them.
LEVELS = {
    **{"ldm": 0, "harness": 1, "cldm": 2, "web": 2},
    **{"tool_": 3, "train_": 4, "tutorial_train_": 4},
    **{"infer": 5, "evaluate": 5, "gradio_restore": 6},
}
PAGES = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "training" / "README.md"]
# Names of files that users create, and of third-party files.
NOT_OURS = {"deblur.md": {"walk.yaml"}}
NOT_OURS |= {"srn.md": {"data_list.py"}, "names.md": {"config.py"}, "names_zh.md": {"config.py"}}


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *library()]


def library() -> list[Path]:
    return [path for room in LIBRARY for path in (ROOT / room).rglob("*.py")]


def level(name: str) -> int:
    """Return the level of a folder or script by its longest known prefix."""
    return LEVELS[max((known for known in LEVELS if name.startswith(known)), key=len)]


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, outside of `if __name__ == "__main__"`."""
    body = [
        part
        for part in ast.parse(path.read_text(encoding="utf-8")).body
        if not (isinstance(part, ast.If) and "__name__" in ast.unparse(part.test))
    ]
    names = set()
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_only_to_lower_levels(path):
    """docs/contributing.md has a diagram of the levels."""
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = {"ldm", "cldm", "harness", "web", *(script.stem for script in ROOT.glob("*.py"))}
    found = imported(path)
    assert not found & {"tests", "benchmarks", "extras"}
    wrong = [name for name in found & ours - {here} if level(name) >= level(here)]
    assert not wrong, f"{here} imports {', '.join(wrong)}"


@pytest.mark.parametrize("path", library(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_library_takes_values_not_settings(path):
    """Messages of ldm and cldm name no command-line flags either, since scripts have different ones."""
    if path == ROOT / "harness" / "settings.py":  # it reads the command line
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert "settings" not in names
    if path.relative_to(ROOT).parts[0] in ("ldm", "cldm"):
        flags = [text for text in messages(tree) if re.search(r"(?<![\w-])--[a-z]", text)]
        assert not [text for text in flags if not text.startswith("uv pip install")]


def messages(tree: ast.Module) -> list[str]:
    """Return all string constants that are not docstrings."""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, described) and node.body and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in constants if isinstance(node.value, str) and id(node) not in docstrings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_named_in_the_docs_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    if page.name.startswith("names"):  # the first table column has names of other projects
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    begins = rf"(?<![\w./-])(?:{'|'.join(ROOMS)})"
    named = re.findall(rf"{begins}/[\w./-]*\w|(?<![\w./-])[\w./-]*\w\.(?:py|md|yaml|toml)\b", text, re.A)
    for name in {*named} - NOT_OURS.get(page.name, set()):
        assert any((folder / name).exists() for folder in (ROOT, page.parent, ROOT / "docs")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_whole(page):
    """A table begins with a header and a rule; an empty line among its rows would end it."""
    lines = ["", *page.read_text(encoding="utf-8").split("\n"), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|") and not before.startswith("|"):
            assert after.startswith("|--"), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_modules_named_in_the_docs_exist(page):
    """The attribute named after the module must occur in its source."""
    text = page.read_text(encoding="utf-8")
    for name in {*re.findall(rf"(?<![\w./-])(?:{'|'.join(ROOMS)})(?:\.\w+)+", text, re.A)}:
        parts, file = name.split("."), None
        while parts and file is None:
            place = ROOT.joinpath(*parts)
            files = (place.with_suffix(".py"), place / "__main__.py", place / "__init__.py")
            file = next((path for path in files if path.is_file()), None)
            last = name.split(".")[len(parts) :]
            parts = parts[:-1]
        if (ROOT / "docs" / name).is_file():  # benchmarks.md
            continue
        assert file is not None, name
        assert not last or re.search(rf"\b{last[0]}\b", file.read_text(encoding="utf-8")), name


def help_lines(path: Path) -> list[tuple[str, str]]:
    """Return (setting, comment) for a script; tyro shows the comment behind or above a field as its help."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        is_settings = isinstance(node, ast.ClassDef) and any(map(is_dataclass, node.decorator_list))
        if not is_settings or not (node.name == "Settings" or path.name == "infer.py"):
            continue
        for setting in node.body:
            if not isinstance(setting, ast.AnnAssign):
                continue
            _, behind, comment = lines[setting.end_lineno - 1].partition("  # ")
            above = setting.lineno - 2
            while not behind and lines[above].lstrip().startswith("# "):
                comment = f"{lines[above].strip()[2:]} {comment}".strip()
                above -= 1
            found.append((setting.target.id, comment))
    return found


def is_dataclass(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).partition("(")[0] == "dataclass"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_help_lines_are_unique_and_self_contained(path):
    found = help_lines(path)
    for name, comment in found:
        words = comment.split()
        assert words[:1] != ["----"], f"{name}: its help would begin with the group's name"
        assert len(words) >= 4, f"{name}: {comment!r} is too short to be understood alone"
        assert words[0] not in "a an the of to in on at by for with from as".split(), f"{name}: {comment}"
    repeated = Counter(comment for name, comment in found if path.name != "infer.py")
    assert [comment for comment, count in repeated.items() if count > 1] == []


# Words to avoid -> the usual terms (docs/contributing.md has the full list).
BANNED = {
    r"com(es|ing|e) along": "included, pretrained",
    r"taught|teach(es|ing)?": "trained, learned",
    r"the truth": "ground truth",
    r"what is held out|held out pictures": "held-out set",
    r"averaged weights": "EMA weights",
    r"main memory": "CPU memory",
    r"in earnest|by heart|players?|knobs?|riddles?": "plain words",
    r"pictures?": "image, photo",
    r"spoil(s|ed|t)?": "degrade",
}


def prose(path: Path) -> str:
    """Return a page's text outside code blocks, or the docstrings, comments and strings of a source file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.sub(r"^```.*?^```|^    .*?$|`[^`]*`|\]\([^)]*\)|^\|[^|]*\|", " ", text, flags=re.M | re.S)
    text = re.sub(r'(?<!")"[^"\n]*"\.split\(\)', "[]", text)  # lists of words are data
    kinds = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in kinds)


@pytest.mark.parametrize(
    "path",
    [*sources(), *(page for page in PAGES if "zh" not in page.name)],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_banned_words(path):
    text = prose(path)
    found = {word: use for word, use in BANNED.items() if re.search(rf"\b({word})\b", text, re.IGNORECASE)}
    assert not found, f"{path.name}: " + ", ".join(f"/{word}/ (use: {use})" for word, use in found.items())


@pytest.mark.slow
def test_infer_imports_no_training_library():
    """infer.py imports these modules; importing Lightning or torchvision would take seconds each time."""
    unwanted = ("lightning_fabric", "pytorch_lightning", "torchvision", "transformers", "open_clip")
    imports = "import sys, train_srn, train_dbgan, ldm.models.kontext"
    code = f"{imports}; print([n for n in {unwanted} if n in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
