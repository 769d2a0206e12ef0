"""Make tiny_sd.ipynb of NOTES.md and tiny_sd.py:

    python -m extras.notebook

Each section's prose and mathematics, and after each paragraph and its equations the functions that
it names, as cells that run in order. Change one, run on, and see the picture change.

Needs nbformat.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com/github/OWNER/tiny_sd/blob/main/tiny_sd.ipynb"

FIRST = """\
# tiny_sd, as a notebook

[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})

The notes and the file [tiny_sd.py](tiny_sd.py) in one: prose, equation, and the function that
computes it, in cells that run in order. Change a function, run from there on, and see what it does
to the picture. The formulas are the file's own, so a picture takes some seconds and not one.

Needs Python 3.11, and `pip install numpy pillow safetensors tqdm ipywidgets`. In Colab, first run
`!git clone https://github.com/OWNER/tiny_sd && mv tiny_sd/* .`; for real Stable Diffusion weights
`!pip install huggingface_hub`, then `from extras.formats import load` and
`model = load("sd15", device="cuda", dtype="float16")`.
"""

LAST = '''\
import ipywidgets as widgets
from PIL import Image

model = load("weights/emoji")


def panel(prompt="red apple on a blue background", seed=0, steps=20, guidance=2.0):
    """Draw a picture, and beneath it what the network guessed on the way."""
    guesses = []

    def watching(model, *args):
        denoise = denoiser(model, *args)

        def watched(x_t, t, alpha_bar):
            x_0, eps = denoise(x_t, t, alpha_bar)
            guesses.append(x_0)
            return x_0, eps
        return watched

    *_, x = generate(model, prompt, seeds=[seed], steps=steps, guidance=guidance,
                     denoiser=watching)
    film = decode(model, np.concatenate(guesses[:: max(1, steps // 8)]))
    display(Image.fromarray(decode(model, x)[0]).resize((256, 256), Image.Resampling.NEAREST))
    display(Image.fromarray(np.concatenate(list(film), axis=1)))


widgets.interact_manual(panel, seed=(0, 99), steps=(1, 50), guidance=(1.0, 15.0))
panel(steps=8)'''


class Definition:
    """A top-level statement of tiny_sd.py: its source, the names it makes, and those it needs."""

    def __init__(self, node, source):
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        self.source = "\n".join(source.split("\n")[start - 1:node.end_lineno])
        self.line, self.names = start, names_made(node)
        self.needs = names_needed(node)
        self.uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def names_made(node):
    """Return the names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [])
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def names_needed(node):
    """Return the names that must exist when the statement runs, not only when it is called."""
    if isinstance(node, ast.FunctionDef):
        types = [argument.annotation for argument in node.args.args]
        parts = [*node.decorator_list, *node.args.defaults, *node.args.kw_defaults, *types,
                 node.returns]
    elif isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, (ast.AnnAssign, ast.Assign))]
        methods = [d for n in node.body if isinstance(n, ast.FunctionDef) for d in n.args.defaults]
        parts = [*node.decorator_list, *node.bases, *fields, *methods]
    else:
        parts = [node]
    return {n.id for part in parts if part for n in ast.walk(part) if isinstance(n, ast.Name)}


def definitions(source):
    """Return (the statements before section 1 as text, [[definitions of §1], [of §2], ...])."""
    lines = source.split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(r"# ── \d+\. ", line)] + [len(lines)]
    head, sections = [], [[] for _ in starts[:-1]]
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) or (isinstance(node, ast.Expr) and node.lineno == 1):
            continue        # what runs it as a program, and its docstring
        definition = Definition(node, source)
        section = sum(start < node.lineno for start in starts) - 1
        if section < 0:
            text = definition.source.replace("Path(__file__).resolve().parent", "Path.cwd()")
            head.append(text)
        else:
            sections[section].append(definition)
    return "\n".join(head), sections


def markdown(text):
    """Turn GitHub's way of writing mathematics into a notebook's."""
    text = re.sub(r"```math\n(.*?)\n```", r"$$\n\1\n$$", text, flags=re.S)
    return re.sub(r"\$`(.*?)`\$", r"$\1$", text, flags=re.S)


def anchor(title):
    """Return a heading's name in a link, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def link(cells):
    """Let the links within NOTES.md lead to the cells' headings, or else to the file.

    Jupyter, Colab and VS Code name headings in three ways, so each gets a name of its own.
    """
    text = "\n".join(cell["source"] for cell in cells)
    names = {anchor(title) for title in re.findall(r"^##+ (.+)$", text, re.M)}
    for cell in cells:
        cell["source"] = re.sub(r"^##+ (.+)$", lambda heading:
                                f'<a id="{anchor(heading[1])}"></a>\n\n{heading[0]}',
                                cell["source"], flags=re.M)
        cell["source"] = re.sub(r"\]\(#([^)]+)\)", lambda target:
                                target[0] if target[1] in names else f"](NOTES.md#{target[1]})",
                                cell["source"])


def continues(text, after):
    """Does the next block belong to this one: an equation, or the prose about it?"""
    if text.startswith("```math"):
        return after != "" and not after.startswith(("#", "**"))     # a new subject
    return after.startswith("```math") or text.endswith((":", ","))


def blocks(text):
    """Split notes into paragraphs and fenced blocks; Python code stays apart."""
    pieces = re.split(r"(```python\n.*?\n```)", text, flags=re.S)
    for piece in pieces:
        if piece.startswith("```python"):
            yield "code", piece[len("```python\n"):-len("\n```")]
        else:
            parts = re.split(r"\n{2,}(?=(?:[^`]|`(?!``)|```[\s\S]*?```)*$)", piece.strip())
            yield from (("text", part) for part in parts if part.strip())


class Notebook:
    """Cells in order; each definition is written once, after those that it needs."""

    def __init__(self, all_definitions):
        self.cells, self.written, self.ready = [], set(), set()
        self.by_name = {name: d for d in all_definitions for name in d.names}

    def say(self, text):
        """Add prose, joined to prose before it."""
        text = markdown(text)
        if self.cells and self.cells[-1]["cell_type"] == "markdown":
            self.cells[-1]["source"] += "\n\n" + text
        else:
            self.cells.append(new_markdown_cell(text))

    def define(self, definition, to_run=False):
        """Add the cell of a definition; with all that it calls, if it is to run at once."""
        if definition.line in (self.ready if to_run else self.written):
            return
        is_new = definition.line not in self.written
        self.written.add(definition.line)
        if to_run:
            self.ready.add(definition.line)
        for name in sorted(definition.uses if to_run else definition.needs):
            if name in self.by_name:
                self.define(self.by_name[name], to_run)
        if is_new:
            self.cells.append(new_code_cell(definition.source))

    def run(self, code):
        """Add a cell of the notes' own, after the definitions that it takes from tiny_sd."""
        for name in re.findall(r"tiny_sd\.(\w+)", code):
            if name in self.by_name:
                self.define(self.by_name[name], to_run=True)
        self.cells.append(new_code_cell(re.sub(r"^import tiny_sd\n", "", code, flags=re.M)))


def make(notes, source):
    """Return the notebook of the notes and the file."""
    head, sections = definitions(source)
    book = Notebook([d for section in sections for d in section])
    book.say(FIRST.format(colab=COLAB))
    book.cells.append(new_code_cell(head + "\n\ntiny_sd = sys.modules[__name__]"))

    for part in re.split(r"\n(?=## )", notes):
        number = re.match(r"## §(\d+)", part)
        mine = sections[int(number[1]) - 1] if number and int(number[1]) <= len(sections) else []
        if number and int(number[1]) > len(sections):
            continue
        found, pieces = [], list(blocks(part))
        for (kind, text), (_, after) in zip(pieces, [*pieces[1:], ("text", "")]):
            if kind == "code":      # where tiny_sd is the notebook itself
                book.run(text)
                continue
            book.say(text)
            if not text.startswith("|"):        # a table sums up, it does not introduce
                found += [book.by_name.get(name) for name in re.findall(r"`(\w+)`", text)]
            if not continues(text, after):
                for definition in found:
                    if definition in mine:
                        book.define(definition)
                found = []
        for definition in mine:
            book.define(definition)
    book.say("## Draw\n\nThe whole of it at work. Move the sliders and press the button.")
    book.cells.append(new_code_cell(LAST))
    link([cell for cell in book.cells if cell["cell_type"] == "markdown"])
    for i, cell in enumerate(book.cells):
        cell["id"] = f"cell-{i}"
    notebook = new_notebook(cells=book.cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3",
                                       "language": "python"}
    return notebook


def main():
    """Write tiny_sd.ipynb."""
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    notebook = make((HERE / "NOTES.md").read_text(encoding="utf-8"),
                    (HERE / "tiny_sd.py").read_text(encoding="utf-8"))
    nbformat.write(notebook, HERE / "tiny_sd.ipynb")
    print(f"tiny_sd.ipynb: {len(notebook.cells)} cells")


if __name__ == "__main__":
    sys.exit(main())
