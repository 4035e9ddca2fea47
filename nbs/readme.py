"Make README.md from nbs/index.ipynb: `python nbs/readme.py`; with `--check`, only say whether it is up to date."
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter
from nbformat import read

nbs = Path(__file__).resolve().parent
readme = nbs.parent/'README.md'


def render() -> str:
    "The index notebook as markdown, without hidden cells, with paths seen from the repository's root."
    nb = read(nbs/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and c.source.startswith('#| hide'))]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'(!\[[^\]]*\]\()(?!http)', r'\1nbs/', text)
    text = re.sub(r'(?<!!)(\[[^\]]*\]\()(?!http|#)', r'\1nbs/', text)
    return '<!-- made from nbs/index.ipynb by nbs/readme.py -->\n\n' + text.strip() + '\n'


if __name__ == '__main__':
    if '--check' in sys.argv:
        sys.exit(0 if readme.read_text(encoding='utf-8') == render() else 'README.md is not made from this nbs/index.ipynb: run python nbs/readme.py')
    readme.write_text(render(), encoding='utf-8')
