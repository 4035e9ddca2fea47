"""Make README.md from nbs/index.ipynb, and the pictures it shows: `python nbs/readme.py`. With `--check`, run the
index's code anew, and only say whether the README, the pictures and the saved outputs still are what it gives."""
import ast
import base64
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'agg')
import matplotlib.pyplot as plt
from nbconvert import MarkdownExporter
from nbformat import read
from nbformat.v4 import new_markdown_cell
from PIL import Image

nbs = Path(__file__).resolve().parent
readme, summary, wings = nbs.parent/'README.md', nbs/'summary.png', nbs/'wings.png'
wings_text = 'The four wings: their modules, and how many of them import from each wing below'


def run_cell(source: str, names: dict):
    "Run a code cell; the value of its last expression."
    *body, last = ast.parse(source).body
    exec(compile(ast.Module(body, []), 'index.ipynb', 'exec'), names)
    if isinstance(last, ast.Expr): return eval(compile(ast.Expression(last.value), 'index.ipynb', 'eval'), names)
    exec(compile(ast.Module([last], []), 'index.ipynb', 'exec'), names)


def generated(nb) -> tuple[dict[str, str], dict]:
    "Markdown that the index's code cells give, by the cell's id; and which wing imports from which."
    os.chdir(nbs)
    names, texts = {'display': lambda *_: None}, {}
    for cell in nb.cells:
        if cell.cell_type != 'code' or not cell.source.startswith('#| hide_input'): continue
        value = run_cell(cell.source, names)
        texts[cell.id] = f'![{wings_text}]({wings.name})' if plt.get_fignums() else getattr(value, 'data', '')
        if plt.get_fignums() and '--check' not in sys.argv:
            plt.savefig(wings, metadata={'Description': json.dumps(names['uses']), 'Software': None})
        plt.close('all')
    return texts, names['uses']


def render(nb, texts: dict[str, str]) -> str:
    "The index notebook as markdown, generated cells as their text, with paths seen from the repository's root."
    nb.cells = [c if c.cell_type == 'markdown' else new_markdown_cell(texts[c.id])
                for c in nb.cells if c.cell_type == 'markdown' or texts.get(c.id)]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'(!?\[[^\]]*\]\()(?!http|#)', r'\1nbs/', text)
    return '<!-- made from nbs/index.ipynb by nbs/readme.py -->\n\n' + text.strip() + '\n'


def saved_texts(nb) -> dict[str, str]:
    "Markdown among the saved outputs of the code cells, by the cell's id."
    cells = [c for c in nb.cells if c.cell_type == 'code']
    return {c.id: ''.join(o['data'].get('text/markdown', '') for o in c.outputs if 'data' in o) for c in cells}


def summary_picture() -> bytes:
    "The picture of the summary notebook, as PNG."
    cells = read(nbs/'experiments/05_summary.ipynb', as_version=4).cells
    pictures = (o['data']['image/png'] for c in cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {}))
    return base64.b64decode(next(pictures))


def check(nb, texts: dict[str, str], uses: dict) -> str:
    "What is out of date, as a sentence; empty: nothing."
    saved = saved_texts(nb)
    if any(saved.get(cell) != text for cell, text in texts.items() if text and not text.startswith('![')):
        return 'The saved outputs of nbs/index.ipynb are not what its code gives: run the notebook and save it'
    if json.loads(Image.open(wings).text.get('Description', '{}')) != uses:
        return 'nbs/wings.png does not show what the modules import: run python nbs/readme.py'
    if summary.read_bytes() != summary_picture():
        return 'nbs/summary.png is not the picture of nbs/experiments/05_summary.ipynb: run python nbs/readme.py'
    if readme.read_text(encoding='utf-8') != render(nb, texts):
        return 'README.md is not what nbs/index.ipynb gives: run python nbs/readme.py'
    return ''


if __name__ == '__main__':
    index = read(nbs/'index.ipynb', as_version=4)
    texts, uses = generated(index)
    if '--check' in sys.argv: sys.exit(check(index, texts, uses) or 0)
    readme.write_text(render(index, texts), encoding='utf-8')
    summary.write_bytes(summary_picture())
