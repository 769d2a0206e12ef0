"""Make tiny_sd.ipynb from NOTES.md and tiny_sd.py, and run it:

    python -m extras.tools.notebook

For each section it has the prose, then the code as one cell; pictures and examples are cells with
output. Needs nbformat and nbclient.
"""

import argparse
import re
import subprocess
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from extras.files import replace_atomically

ROOT = Path(__file__).resolve().parents[2]

FIRST = """\
# tiny_sd, as a notebook
{badge}
[NOTES.md](NOTES.md) and the lesson of [tiny_sd.py](tiny_sd.py) in one: each section's prose and
equations, then its code. Change a function, run from there on, and see what it does to the picture.
Training (§8) needs torch.

Needs Python 3.11, and `pip install numpy pillow safetensors tqdm`, in the project's folder.
"""
BADGE = """
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](\
https://colab.research.google.com/github/{0}/blob/main/tiny_sd.ipynb)
(there, first `!git clone https://github.com/{0} tiny && mv tiny/* .`)
"""

LAST = '''\
from IPython.display import display
from PIL import Image


def draw(prompt, steps=20, guidance=None, sampler=ddim, seed=0):
    """Show a picture, and beside it what the network guessed on the way."""
    guesses = []

    def watching(*args):
        denoise = denoiser(*args)

        def watched(x_t, t, alpha_bar):
            x_0, eps = denoise(x_t, t, alpha_bar)
            guesses.append(x_0)
            return x_0, eps
        return watched

    side, levels = model.config.unet.sample_size, evenly_spaced_steps(steps, model.alpha_bars)
    *_, x = generate(model, prompt, guidance=guidance, sampler=sampler, steps=levels,
                     noise=numpy_noise([seed], (side, side, 4)), make_denoiser=watching)
    shown = decode(model, np.concatenate([x, *guesses[::max(1, steps // 5)]]))
    display(Image.fromarray(np.concatenate(list(shown), axis=1)))


model = load("weights/emoji")
draw("red apple on a blue background")
draw("a fox on a light blue background", guidance=1)
draw("a fox on a light blue background", steps=5, sampler=dpm_pp_2m)'''


def parts_of(source):
    """Return the text before section 1, the lesson's sections, and the text after the lesson."""
    lesson, rest = re.split(r"^# ═+\n# The lesson ends here", source, flags=re.M)
    head, *sections = re.split(r"^# ── \d+\. .*\n", lesson, flags=re.M)
    return head, [section.strip() for section in sections], rest


def markdown(text):
    """Convert GitHub's syntax for mathematics to that of notebooks."""
    text = re.sub(r"```math\n(.*?)\n```", r"$$\n\1\n$$", text, flags=re.S)
    text = re.sub(r"\$`(.*?)`\$", r"$\1$", text, flags=re.S)
    return re.sub(r"\]\(#", "](NOTES.md#", text).strip()


def cells_of(text, code=None):
    """Return a section's cells: prose, pictures and examples, with its code before the examples."""
    cells = []
    for piece in re.split(r"(^!\[[^\n]*\n|^```python\n.*?^```\n)", text, flags=re.M | re.S):
        if piece.startswith("!["):
            path = re.search(r"\((.+)\)", piece)[1]
            cells.append(new_code_cell(f'Image.open("{path}")'))
        elif piece.startswith("```python"):
            if code:
                cells.append(new_code_cell(code))
                code = None
            piece = re.sub(r"^import tiny_sd\n", "", piece[len("```python\n"):-len("```\n")],
                           flags=re.M)
            cells.append(new_code_cell(piece.strip()))
        elif piece.strip():
            cells.append(new_markdown_cell(markdown(piece)))
    return cells + ([new_code_cell(code)] if code else [])


def badge(root=ROOT):
    """Return the link to Colab, if this folder is a clone of a repository on GitHub."""
    url = subprocess.run(["git", "remote", "get-url", "origin"], cwd=root, capture_output=True,
                         text=True).stdout
    found = re.search(r"github\.com[:/](\S+?)(\.git)?$", url.strip())
    return BADGE.format(found[1]) if found else ""


def make(notes, source, link=""):
    """Return the notebook of the notes and the file, before it is run."""
    head, sections, rest = parts_of(source)
    head = head.replace("Path(__file__).resolve().parent", "Path.cwd()")
    head = re.sub(r'^""".*?^"""\n|^if __name__ == .*?(?=^\S)', "", head, flags=re.M | re.S)
    reading = rest[rest.index("# ── Torch's operations"):rest.index("# ── The small program")]
    cells = [new_markdown_cell(FIRST.format(badge=link)),
             new_code_cell("from PIL import Image\n\n" + head.strip()
                           + "\n\ntiny_sd = sys.modules[__name__]      # for the examples")]
    course = notes[notes.index("## §1"):notes.index("## Exercises")]
    for text, code in zip(re.split(r"^(?=## §)", course, flags=re.M)[1:], sections):
        cells += cells_of(text, code)
    cells += [new_markdown_cell("## Below the lesson\n\nTorch's operations; reading weights."),
              new_code_cell(reading.strip()),
              new_markdown_cell("## Draw\n\nThe picture, then the guesses on the way to it."),
              new_code_cell(LAST)]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    book = new_notebook(cells=cells)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3",
                                   "language": "python"}
    return book


def run(book):
    """Run all cells, and keep their output."""
    NotebookClient(book, timeout=1200, kernel_name="python3",
                   resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in book.cells:     # drop the times at which they ran
        cell.metadata.pop("execution", None)


def main():
    """Write tiny_sd.ipynb."""
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    book = make((ROOT / "NOTES.md").read_text(encoding="utf-8"),
                (ROOT / "tiny_sd.py").read_text(encoding="utf-8"), badge())
    run(book)
    with replace_atomically(ROOT / "tiny_sd.ipynb") as unfinished:
        nbformat.write(book, str(unfinished))
    print(f"tiny_sd.ipynb: {len(book.cells)} cells")


if __name__ == "__main__":
    main()
