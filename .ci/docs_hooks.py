"""Pages link to files of this repository beside docs/, such as ../bench/results/README.md. A site has only the pages.

Pictures from there are taken along. Another file becomes a link to the repository, where mkdocs.yml knows its address
(`repo_url`), else its path in the text. A file that is not there is left, for the strict build to complain of.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>\.\./[^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    here = pathlib.Path(config.docs_dir, page.file.src_uri).parent

    def instead(link: re.Match[str]) -> str:
        path, _, anchor = link["target"].partition("#")
        there = pathlib.Path(os.path.normpath(here / path))
        if not there.exists() or not there.is_relative_to(ROOT) or there.is_relative_to(config.docs_dir):
            return link[0]
        where = there.relative_to(ROOT).as_posix()
        if link["picture"]:
            if files.get_file_from_path(where) is None:
                files.append(File.generated(config, where, abs_src_path=str(there)))
            up = "../" * page.file.src_uri.count("/")
            return f"![{link['text']}]({up}{where})"
        if config.repo_url:
            at = f"{config.repo_url.rstrip('/')}/blob/main/{where}"
            return f"[{link['text']}]({at}{f'#{anchor}' if anchor else ''})"
        return link["text"] if where in link["text"] else f"{link['text']} (`{where}`)"

    made, end = "", 0
    for block in CODE.finditer(markdown):
        made += LINK.sub(instead, markdown[end : block.start()]) + block[0]
        end = block.end()
    return made + LINK.sub(instead, markdown[end:])
