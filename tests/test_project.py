"""The house itself: import arrows, sizes, pins, and documentation that says what the code does."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ablations.planner import plan
from ablations.scale import Scale, load_scale, scale_epochs, scales
from sdae.config import STAGES, dump, load, parse
from sdae.store import Store

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sdae", "ablations", "slurm", "analysis", "cli")
CODE = sorted(path for room in (*ROOMS, "benchmarks", "docs", "examples") for path in (ROOT / room).rglob("*.py"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
TORCH = ("torch", "torchvision", "timm", "safetensors")
FRAMES = ("pandas", "matplotlib", "scipy", "pyarrow", "statsmodels", "seaborn")
IN_A_FUNCTION = {("ablations/budget.py", "scipy")}  # the one file and package that may, when it is needed


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# The house


def test_imports_run_in_one_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module.partition(".")[0]


def test_heavy_packages_stay_in_their_rooms() -> None:
    for path in CODE:
        room = path.relative_to(ROOT).parts[0]
        forbidden = {"sdae": FRAMES, "analysis": TORCH, "docs": TORCH, "benchmarks": ()}.get(room, TORCH + FRAMES)
        tree = ast.parse(path.read_text())
        for node, package in imports(tree):
            allowed = (name(path), package) in IN_A_FUNCTION and node not in tree.body
            assert package not in forbidden or allowed, f"{name(path)}:{node.lineno} imports {package}"


def test_sizes() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in CODE}
    assert {name(path): n for path, n in lines.items() if n > 500} == {}
    assert sum(lines.values()) < 25_000


def test_every_requirement_is_pinned_and_nothing_else_is_said() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*wanted["dependencies"], *(r for extra in wanted["optional-dependencies"].values() for r in extra)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "one pin a line: no address, no option"
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for requirement in requirements:
        package = re.match(r"[\w-]+", requirement)[0].lower()  # type: ignore[index]
        assert package in pins, f"constraints.txt does not pin {package}"
    assert not any(package.startswith(("nvidia", "cuda")) for package in pins), "torch pins those itself"


def test_what_the_requirements_bring_is_pinned_too_and_every_pin_takes_our_oldest_python() -> None:
    """What pip may choose is other tomorrow, or takes an hour of trying; a pin that a Python lacks ends its set-up."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = re.fullmatch(r">=([\d.]+)", asked)[1] + ".0"  # type: ignore[index]
    left, seen = [("sdae-suite", "test")], set()
    while left:
        package, extra = left.pop()
        for requirement in map(Requirement, metadata.requires(package) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needs = [(canonicalize_name(requirement.name), more) for more in ("", *sorted(requirement.extras))]
                left += [need for need in needs if need not in seen]
                seen |= set(needs)
    brought = {package for package, _ in seen}
    torchs = {package for package in brought if package.startswith(("nvidia", "cuda", "triton"))}
    assert sorted(brought - torchs - pins - {"pip", "setuptools"}) == []
    wants = {package: metadata.metadata(package)["Requires-Python"] for package in brought}
    assert [f"{p} {want}" for p, want in wants.items() if want and not SpecifierSet(want).contains(oldest)] == []


def test_the_version_is_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{metadata.version('sdae-suite')}]" in text or "[Unreleased]" in text


# What the pages say


def blocks(path: Path, *languages: str) -> Iterator[str]:
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.M | re.S):
        if language in languages:
            yield text


def commands() -> list[tuple[str, list[str]]]:
    """Every `sdae-cli ..` of the pages, in a code block or in line, without what a shell does with it."""
    found = []
    for path in PAGES:
        lines = [line for text in blocks(path, "", "bash") for line in text.splitlines()]
        lines += re.findall(r"`(sdae-cli [^`]+)`", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S))
        for line in lines:
            match = re.match(r"(?:\$ )?(?:torchrun .*?)?(?:\.venv/bin/)?sdae-cli (.*)", line)
            if match:
                words = shlex.split(re.split(r" [|>]", match[1])[0], comments=True)
                found.append((f"{path.name}: {line}", words))
    return found


def test_commands_of_the_pages_exist(tmp_path: Path) -> None:
    """Each is parsed, with its options and values, by the command line itself; none is run."""
    import typer.main

    from cli.main import app

    assert len(commands()) > 30
    for where, words in commands():
        command: Any = typer.main.get_command(app)
        rest = [w for w in words if w not in ("COMMAND", "--help")]
        while rest and getattr(command, "commands", None):
            assert rest[0] in command.commands, f"{where}: no command {rest[0]!r}"
            command, rest = command.commands[rest[0]], rest[1:]
        if rest and rest not in (["FILE", "-s", "key=value"],):
            try:
                command.make_context(command.name, list(rest))
            except Exception as error:
                pytest.fail(f"{where}: {error}")


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{name(path)}: {target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.M)
            assert anchor in map(slug, headings), f"{name(path)}: {target}: no such heading"


def table(path: Path, heading: str) -> list[list[str]]:
    """Rows of the first table whose head is `| heading |`, cells without backticks."""
    rows = path.read_text().partition(f"| {heading} |")[2].splitlines()[2:]
    found = []
    for row in rows:
        if not row.startswith("|"):
            break
        found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]])
    return found


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def test_config_page_has_every_key_and_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", (ROOT / "docs/config.md").read_text(), re.M)
    page = {key: re.split(r" \| ", cells, maxsplit=len(STAGES)) for key, cells in rows}
    for column, stage in enumerate(STAGES):
        found = {k: yaml.safe_load(v[column].strip("`")) for k, v in page.items() if v[column] != "–"}
        assert found == flat(dump(parse({"stage": stage}))), stage
    assert all(cells[-1].strip() for cells in page.values())


def test_config_page_has_a_config(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "docs/config.md", "yaml")
    (tmp_path / "one.yaml").write_text(text)
    assert load(tmp_path / "one.yaml").stage == "pretrain"


def test_store_page_tells_what_a_run_leaves(tmp_path: Path) -> None:
    from sdae.run import execute

    page = (ROOT / "docs/store.md").read_text()
    pretrain = tiny(optim={"epochs": 1}, probe={"knn_every": 1})
    result = execute(pretrain, Store(tmp_path))
    tuned = execute(tiny("finetune", optim={"epochs": 1}, init={"run": result["id"]}), Store(tmp_path))
    told = {word for row in table(ROOT / "docs/store.md", "key | meaning") for word in re.findall(r"`(\w+)`", row[0])}
    assert set(result) == set(tuned) == told
    for metric in result["metrics"] | tuned["metrics"] | Store(tmp_path).run(result["id"]).metrics()[-1]:
        assert f"`{metric}`" in page, metric
    for file in Store(tmp_path).run(result["id"]).path.iterdir():
        assert file.name in page, file.name


def test_store_page_has_the_frame(tmp_path: Path) -> None:
    from analysis.frame import COLUMNS, collect

    rows = table(ROOT / "docs/store.md", "column | dtype | meaning")
    assert [row[0].strip("`") for row in rows] == list(COLUMNS)
    frame = collect(Store(tmp_path))
    assert [row[1] for row in rows] == [str(frame[column].dtype) for column in COLUMNS]


def test_ablations_page_has_every_key() -> None:
    from ablations.artifact import ArtifactFile, ColumnFile, RowFile

    page = ROOT / "docs/ablations.md"
    for heading, schema in (
        ("key | meaning", ArtifactFile),
        ("column key | default | meaning", ColumnFile),
        ("row key | meaning", RowFile),
    ):
        assert {w for row in table(page, heading) for w in re.findall(r"`(\w+)`", row[0])} == set(schema.model_fields)
    scale = page.read_text().partition("## The scale file")[2]
    keys = {
        word
        for row in re.findall(r"^\| (`.*?) \|", scale.partition("\n## ")[0], re.M)
        for word in re.findall(r"`(\w+)`", row)
    }
    assert keys == set(Scale.model_fields) | {"extends"}


def test_every_artifact_and_scale_of_the_pages_plans(tmp_path: Path) -> None:
    shown = {text for page in ("README.md", "docs/ablations.md") for text in blocks(ROOT / page, "yaml")}
    for number, text in enumerate(sorted(shown)):
        file = tmp_path / f"shown{number}.yaml"
        file.write_text(text)
        sweep = plan(["table5"], file) if "extends" in yaml.safe_load(text) else plan([file], "paper")
        assert sweep.unique >= 6
    assert (ROOT / "examples/mask_ratio.yaml").read_text() in shown


def test_readme_tells_the_scales() -> None:
    rows = {
        row[0].strip("`"): row
        for row in table(ROOT / "README.md", "scale | pictures | network | 300 epochs become | for")
    }
    assert set(rows) == set(scales())
    for key, (_, pictures, network, epochs, _) in rows.items():
        scale = load_scale(key)
        assert pictures.startswith(f"{scale.pictures:,} ")
        assert pictures.endswith(f", {scale.data['image_size']} px")
        assert network in scale.title
        assert int(epochs) == scale_epochs(300, scale.epochs.pretrain)


def test_the_first_ablation_has_ten_lines_and_shares_with_the_paper() -> None:
    file = ROOT / "examples/mask_ratio.yaml"
    assert len(file.read_text().splitlines()) <= 10
    alone, together = plan([file], "mini"), plan([file, "figure4b"], "mini")
    assert alone.unique == 6
    assert together.requested - together.unique == 2


def test_the_example_scale(tmp_path: Path) -> None:
    scale = load_scale(ROOT / "examples/pocket.yaml")
    sweep = plan((), scale)
    assert scale.name == "pocket"
    assert sweep.unique == plan((), "mini").unique


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path) -> None:
    """The README's first ablation at the example's scale, from the plan to the table."""
    from analysis.publish import publish
    from slurm.local import run_local

    sweep = plan([ROOT / "examples/mask_ratio.yaml"], ROOT / "examples/pocket.yaml")
    store = Store(tmp_path / "runs")
    assert run_local(sweep, store, jobs=2).ok
    publish(store, sweep.artifacts, ROOT / "examples/pocket.yaml", (0,), tmp_path / "paper")
    assert "0.75" in (tmp_path / "paper/mask_ratio.md").read_text()
