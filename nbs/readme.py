"Make README.md from nbs/index.ipynb, and its picture from the summary notebook: `python nbs/readme.py`; with `--check`, only say whether they are up to date."
import base64
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter
from nbformat import read

nbs = Path(__file__).resolve().parent
readme, picture = nbs.parent/'README.md', nbs/'summary.png'


def render() -> str:
    "The index notebook as markdown, without hidden cells, with paths seen from the repository's root."
    nb = read(nbs/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and c.source.startswith('#| hide'))]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'(!\[[^\]]*\]\()(?!http)', r'\1nbs/', text)
    text = re.sub(r'(?<!!)(\[[^\]]*\]\()(?!http|#)', r'\1nbs/', text)
    return '<!-- made from nbs/index.ipynb by nbs/readme.py -->\n\n' + text.strip() + '\n'


def summary_picture() -> bytes:
    "The picture of the summary notebook, as PNG."
    cells = read(nbs/'experiments/05_summary.ipynb', as_version=4).cells
    return base64.b64decode(next(o['data']['image/png'] for c in cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})))


if __name__ == '__main__':
    if '--check' in sys.argv:
        if readme.read_text(encoding='utf-8') != render(): sys.exit('README.md is not made from this nbs/index.ipynb: run python nbs/readme.py')
        if picture.read_bytes() != summary_picture(): sys.exit('nbs/summary.png is not the picture of this nbs/experiments/05_summary.ipynb: run python nbs/readme.py')
    else:
        readme.write_text(render(), encoding='utf-8')
        picture.write_bytes(summary_picture())
